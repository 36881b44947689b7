"""Which modules are mutated, and which tests must notice: the one place to change when a file is renamed.

A module is named by its path below src/trainwright, a test by its path below tests. Only tests that take a second or so
belong here: each is run again for every mutant of the functions that it calls.
"""

from __future__ import annotations

MODULES: dict[str, list[str]] = {
    "loss": ["unit/test_loss.py"],
    "window": ["unit/test_window.py"],
    "state": ["unit/test_state.py"],
    "run/loop_state": ["unit/run/test_resume.py"],
    "run/resume": ["unit/run/test_resume.py"],
    "data/data_position": ["unit/data/test_data_position.py"],
    "data/seek": ["unit/data/test_seek.py"],
    "data/samplers": ["unit/data/test_samplers.py"],
    "data/length_grouping": ["unit/data/test_length_grouping.py"],
    "data/resumable_sampler": ["unit/data/test_samplers.py", "unit/data/test_seek.py"],
    "data/rebalance": ["unit/data/test_rebalance.py"],
    "data/distributed_samplers": ["unit/data/test_distributed_samplers.py"],
    "data/collate_base": ["unit/data/test_collate_base.py"],
    "data/collate_flattening": ["unit/data/test_collate_flattening.py"],
    "data/collate_language": ["unit/data/test_collate_language.py"],
    "data/collate_language_older": ["unit/data/test_collate_language.py"],
    "data/collate_packing": ["unit/data/test_packing.py", "unit/data/test_collate_language.py"],
    "data/collate_padding": ["unit/data/test_collate_padding.py"],
    "data/collate_permutation": ["unit/data/test_collate_language.py"],
    "checkpoint/manifest": ["unit/checkpoint/test_manifest.py"],
    "checkpoint/best": ["unit/checkpoint/test_best.py"],
    "checkpoint/layout": ["unit/checkpoint/test_layout.py"],
    "checkpoint/leftovers": ["unit/checkpoint/test_leftovers.py"],
    "args/renamed": ["unit/args/test_renamed.py"],
    "argparser": ["unit/test_argparser.py"],
}

# They ask for the line of the caller, which mutmut's switch between a function and its mutants stands before.
LEFT_OUT = ["unit/test_argparser.py::test_older_flags_are_accepted_and_reported_at_the_callers_line"]
