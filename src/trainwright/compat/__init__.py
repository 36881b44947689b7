"""Compatibility with scripts written for other releases: the drop-in, older names, defaults of other generations.

Owns: names and defaults that differ from the current ones. Leaves to others: what they do. Imported only where a value
enters (`trainer`, `cli`, `__init__`).
"""
