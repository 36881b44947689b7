"""Every collator by its documented name.

Owns: the list. Leaves to others: the collators (`collate_*`).
"""

from trainwright.data.collate_base import (
    DataCollator,
    DataCollatorMixin,
    DefaultDataCollator,
    InputDataClass,
    default_data_collator,
    numpy_default_data_collator,
    tf_default_data_collator,
    to_numpy,
    tolist,
    torch_default_data_collator,
)
from trainwright.data.collate_flattening import DataCollatorWithFlattening
from trainwright.data.collate_language import DataCollatorForLanguageModeling
from trainwright.data.collate_language_older import DataCollatorForSOP, DataCollatorForWholeWordMask
from trainwright.data.collate_padding import (
    DataCollatorForMultipleChoice,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    _numpy_collate_batch,
    _tf_collate_batch,
    _torch_collate_batch,
    pad_without_fast_tokenizer_warning,
)
from trainwright.data.collate_permutation import DataCollatorForPermutationLanguageModeling

__all__ = [
    "DataCollator",
    "DataCollatorForLanguageModeling",
    "DataCollatorForMultipleChoice",
    "DataCollatorForPermutationLanguageModeling",
    "DataCollatorForSOP",
    "DataCollatorForSeq2Seq",
    "DataCollatorForTokenClassification",
    "DataCollatorForWholeWordMask",
    "DataCollatorMixin",
    "DataCollatorWithFlattening",
    "DataCollatorWithPadding",
    "DefaultDataCollator",
    "InputDataClass",
    "_numpy_collate_batch",
    "_tf_collate_batch",
    "_torch_collate_batch",
    "default_data_collator",
    "numpy_default_data_collator",
    "pad_without_fast_tokenizer_warning",
    "tf_default_data_collator",
    "to_numpy",
    "tolist",
    "torch_default_data_collator",
]
