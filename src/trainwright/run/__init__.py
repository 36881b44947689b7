"""One call of `train()`: its state, what a resume restores, and what follows a failed attempt.

Owns: what lives as long as a run. Leaves to others: the order of events (`trainer`).
"""
