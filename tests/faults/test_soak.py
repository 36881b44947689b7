"""A few random kills of one run; `soak.py` with a thousand is a command (docs/reliability.md)."""

import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))

from soak import soak


@pytest.mark.parametrize("async_save", [False, True])
def test_a_run_killed_at_random_moments_ends_like_one_that_nobody_killed(tmp_path, async_save):
    runs, kills = soak(6, 0, tmp_path, async_save)
    assert runs >= 1 and kills == 6
