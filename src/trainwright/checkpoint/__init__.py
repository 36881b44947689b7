"""Checkpoints: what is written, how it becomes visible all at once, what may be deleted, and how it is read back.

Owns: the directory `checkpoint-N` and every file in it. Leaves to others: when to save, and what the numbers mean.
"""
