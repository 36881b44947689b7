"""One process or many.

Owns: the few questions that backends answer differently (`strategy`), and building an Accelerator.
Leaves to others: the training story, which asks those questions and knows no backend by name.
"""
