"""The mistakes in data that people make most, found before the first step, or named where a step fails.

Owns: what a data set, a batch and a model say about each other. Leaves to others: arguments (`checks`, `args/`), trying
metrics (`evaluation/sanity_check`), when to look (Trainer).
"""
