"""Training from a file: `trainwright train config.yaml`, and the templates and the schema for writing one.

Owns: reading the file and its overrides, checking both, starting the task. Leaves to others: what a task does
(`tasks/`, whose arguments are the sections of the file), what arguments mean (`args/`).
"""
