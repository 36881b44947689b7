"""Owns: techniques that trade precision, memory and speed: half precision, activation checkpointing, regional
compilation, averaged weights. Leaves to others: when a run switches them on and off (Trainer), their arguments (args/).
"""
