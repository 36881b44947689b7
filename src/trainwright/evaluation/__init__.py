"""Owns: running a model over a dataset, keeping what it returned, and turning that into metrics and reports.

Leaves to others: what one batch of prediction does (the Trainer's `prediction_step`), when to evaluate, and logging.
"""
