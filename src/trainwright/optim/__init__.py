"""Owns: optimizers by name, parameter groups, learning-rate schedules, and building them for a model.
Leaves to others: when a step is taken (`trainer.py`), and what is saved (`checkpoint/`). Imports nothing.
"""
