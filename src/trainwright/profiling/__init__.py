"""Owns: seeing what a run does with its time: parts of the loop, speeds, use of the device's peak, profiler traces.
Leaves to others: the loop that is watched (`trainer`), pictures (`report/`). Off unless an argument asks."""
