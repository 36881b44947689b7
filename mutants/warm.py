"""A plugin of pytest for the process that the tests of all mutants are forked from.

It imports there what a small run imports only where it is used, so that not every mutant does it again (two seconds,
where its tests take tenths), and has the garbage collector leave alone what is there.
"""

import gc

import accelerate  # noqa: F401
import pytest
import safetensors.torch  # noqa: F401
import torch._dynamo  # noqa: F401
import transformers.data.data_collator
import transformers.trainer_pt_utils  # noqa: F401

import trainwright.trainer  # noqa: F401


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly:
        gc.collect()
        gc.freeze()
