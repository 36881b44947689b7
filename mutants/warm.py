"""A plugin of pytest: what a small run imports only where it is used, imported where tests are forked from.

Without it each mutant would import it again: two seconds, where its tests take tenths.
"""

import accelerate  # noqa: F401
import safetensors.torch  # noqa: F401
import torch._dynamo  # noqa: F401
import transformers.data.data_collator
import transformers.trainer_pt_utils  # noqa: F401

import trainwright.trainer  # noqa: F401
