"""Shared parts of training scripts for common tasks: reading data, checking it, showing the plan, running the three
parts.

Owns: command-line arguments of a task, data from files or the hub, errors that name file, row and remedy. Leaves to
others: everything a Trainer does. This package is a client of the public interface, as a user's script is: it stands
above `trainer.py`, which knows nothing of it. `datasets` and `transformers` are imported where they are used.
"""
