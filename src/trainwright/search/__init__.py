"""Hyper-parameter search.

Owns: search spaces, the engines that propose trials, and writing a trial's values into the arguments.
Leaves to others: training one trial (`Trainer` hands in a callable that does) and what the metrics mean.
"""
