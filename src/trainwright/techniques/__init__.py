"""Owns: techniques that trade precision, memory and speed: half precision, activation checkpointing, compilation by
region, averaged weights. Leaves to others: when a run switches them on and off (Trainer), what asks for them (args/).
"""
