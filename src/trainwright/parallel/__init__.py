"""One process or many.

Owns: the few operations that differ between backends (`strategy`), and building an Accelerator.
Leaves to others: the training loop, which calls them and knows no backend by name.
"""
