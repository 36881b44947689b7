"""Owns: profiling a run: time of the loop's phases, speeds, MFU, profiler traces.
Leaves to others: the loop (`trainer`), pictures (`report/`). Off unless an argument asks."""
