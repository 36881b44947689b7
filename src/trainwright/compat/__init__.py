"""The door for scripts written for other releases: the drop-in, older names, defaults of other generations.

Owns: names and defaults that are not today's. Leaves to others: what they do. Nothing below imports this package but
where a value enters (`trainer`, `cli`, `__init__`).
"""
