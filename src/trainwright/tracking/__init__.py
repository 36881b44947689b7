"""Owns: sending log lines, settings and checkpoints to experiment trackers, one file per tracker.

Leaves to others: when a log line is written (the loop and `callbacks/flow`) and what is in it (`Trainer.log`).
"""
