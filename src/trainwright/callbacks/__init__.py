"""Owns: code that observes a training loop, and its dispatch. Leaves to others: the loop itself (`trainer.py`) and
callbacks that send logs to a tracker (`tracking/`)."""
