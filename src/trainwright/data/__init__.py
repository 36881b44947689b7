"""Owns: everything between a dataset and a batch: collators, samplers, columns, loaders, and the position in the data.

Leaves to others: what a batch is used for. Importing this package imports none of its files.
"""
