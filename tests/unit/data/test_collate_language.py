"""Language modelling collators: equal masks from equal seeds, and the promised shares of masks."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from trainwright.data import collate as ours
from trainwright.data.collate_packing import DataCollatorForPacking

reference = pytest.importorskip("transformers.data.data_collator")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##want", "##ed", "the", "dog", "runs", "##ner", "a", "b"]
ROWS = [[2, 5, 6, 7, 9, 10, 11, 3], [2, 8, 9, 10, 3]]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordPiece({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, mask_token="[MASK]", model_max_length=64, **names)


def collate(module, name, tokenizer, samples, **options):
    torch.manual_seed(7)
    return getattr(module, name)(tokenizer, **options)(copy.deepcopy(samples))


def assert_same(batch, theirs):
    assert set(batch) == set(theirs)
    for name in theirs:
        assert torch.equal(batch[name], theirs[name]), name


SAMPLES = {
    "dicts": [{"input_ids": row} for row in ROWS],
    "lists": ROWS,
    "tensors": [torch.tensor(row) for row in ROWS],
    "given special tokens": [{"input_ids": row, "special_tokens_mask": [0] * len(row)} for row in ROWS],
}
OPTIONS = [
    {"mlm_probability": 0.5},
    {"mlm_probability": 0.9, "mask_replace_prob": 0.4, "random_replace_prob": 0.3},
    {"mlm_probability": 0.9, "mask_replace_prob": 0, "random_replace_prob": 1},
    {"mlm_probability": 0.9, "mask_replace_prob": 1, "random_replace_prob": 0},
    {"mlm_probability": 0.5, "pad_to_multiple_of": 8, "seed": 3},
    {"mlm": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("samples", SAMPLES.values(), ids=SAMPLES.keys())
def test_equal_seeds_mask_as_the_installed_transformers_does(tokenizer, samples, options):
    name = "DataCollatorForLanguageModeling"
    assert_same(
        collate(ours, name, tokenizer, samples, **options), collate(reference, name, tokenizer, samples, **options)
    )


@pytest.mark.parametrize("options", [{}, {"plm_probability": 0.5, "max_span_length": 2}], ids=str)
def test_equal_seeds_permute_as_the_installed_transformers_does(tokenizer, options):
    name, rows = "DataCollatorForPermutationLanguageModeling", [[2, *[5 + place % 8 for place in range(22)], 3]] * 3
    for samples in (rows, [{"input_ids": row} for row in rows]):
        assert_same(
            collate(ours, name, tokenizer, samples, **options), collate(reference, name, tokenizer, samples, **options)
        )
    arrays = collate(ours, name, tokenizer, rows, return_tensors="np", **options)
    assert all(isinstance(value, np.ndarray) for value in arrays.values())


def test_a_predicted_token_never_sees_itself(tokenizer):
    batch = collate(
        ours, "DataCollatorForPermutationLanguageModeling", tokenizer, [[2, *[8] * 30, 3]] * 4, plm_probability=0.5
    )
    predicted = batch["labels"] != -100
    assert predicted.any()
    assert batch["perm_mask"].diagonal(dim1=1, dim2=2)[predicted].eq(1).all()


def test_permutation_needs_even_lengths(tokenizer):
    with pytest.raises(ValueError, match="this one has 5"):
        ours.DataCollatorForPermutationLanguageModeling(tokenizer)([[2, 5, 6, 7, 3]])


def test_arrays_are_masked_like_tensors(tokenizer):
    name = "DataCollatorForLanguageModeling"
    tensors = collate(ours, name, tokenizer, ROWS, mlm_probability=0.5)
    arrays = collate(ours, name, tokenizer, ROWS, mlm_probability=0.5, return_tensors="np")
    for key, value in arrays.items():
        assert isinstance(value, np.ndarray)
        assert value.tolist() == tensors[key].tolist()


def test_shares_of_masked_random_and_kept_tokens_are_as_asked(tokenizer):
    rows = [[2, *[8] * 2000, 3]] * 4
    batch = collate(
        ours,
        "DataCollatorForLanguageModeling",
        tokenizer,
        rows,
        mlm_probability=0.5,
        mask_replace_prob=0.6,
        random_replace_prob=0.3,
    )
    chosen = batch["labels"] != -100
    masked = (batch["input_ids"] == 4)[chosen].float().mean().item()
    kept = (batch["input_ids"] == 8)[chosen].float().mean().item()
    by_chance = 0.3 / len(tokenizer)  # a random token can be any, also the mask or the token itself
    assert chosen.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert masked == pytest.approx(0.6 + by_chance, abs=0.04)
    assert kept == pytest.approx(0.1 + by_chance, abs=0.04)


def test_whole_words_are_masked_together_and_offsets_may_be_ragged(tokenizer):
    offsets = [
        [(0, 0), (0, 2), (2, 6), (6, 8), (9, 12), (13, 17), (17, 20), (0, 0)],
        [(0, 0), (0, 3), (4, 7), (8, 12), (0, 0)],
    ]
    samples = [{"input_ids": row, "offset_mapping": own} for row, own in zip(ROWS, offsets, strict=True)] * 50
    batch = collate(
        ours, "DataCollatorForLanguageModeling", tokenizer, samples, whole_word_mask=True, mlm_probability=0.5
    )
    chosen = batch["labels"] != -100  # (100, 8)
    long = chosen[::2]
    assert torch.equal(long[:, 1], long[:, 2])
    assert torch.equal(long[:, 2], long[:, 3])
    assert torch.equal(long[:, 5], long[:, 6])
    assert not torch.equal(long[:, 1], long[:, 4])
    assert (batch["input_ids"][chosen] == 4).all()
    assert not chosen[:, 0].any()
    assert not chosen[1::2, 4:].any()
    assert long[:, [1, 4, 5]].float().mean().item() == pytest.approx(0.5, abs=0.12)


def test_equal_seeds_mask_the_words_that_the_installed_transformers_does(tokenizer):
    if "whole_word_mask" not in reference.DataCollatorForLanguageModeling.__dataclass_fields__:
        pytest.skip("the installed release has no whole_word_mask")
    offsets = [(0, 0), (0, 2), (2, 6), (6, 8), (9, 12), (13, 17), (17, 20), (0, 0)]
    samples = [{"input_ids": ROWS[0], "offset_mapping": offsets}] * 4
    name, options = "DataCollatorForLanguageModeling", {"whole_word_mask": True, "mlm_probability": 0.5}
    assert_same(
        collate(ours, name, tokenizer, samples, **options), collate(reference, name, tokenizer, samples, **options)
    )


def test_whole_words_need_offsets(tokenizer):
    with pytest.raises(ValueError, match=r"return_offsets_mapping=True.*remove_unused_columns=False"):
        ours.DataCollatorForLanguageModeling(tokenizer, whole_word_mask=True)(SAMPLES["dicts"])


def test_the_older_collator_masks_whole_word_pieces_within_its_budget(tokenizer):
    batch = collate(ours, "DataCollatorForWholeWordMask", tokenizer, ROWS * 40, mlm_probability=0.5)
    chosen = batch["labels"] != -100
    long = chosen[::2]
    assert torch.equal(long[:, 1], long[:, 2])
    assert torch.equal(long[:, 5], long[:, 6])
    assert long.sum(1).max().item() <= round(8 * 0.5)
    assert chosen.any(1).all()
    assert not chosen[:, 0].any()


def test_sentence_order_keeps_its_label(tokenizer):
    samples = [
        {"input_ids": row, "token_type_ids": [0] * len(row), "sentence_order_label": n} for n, row in enumerate(ROWS)
    ]
    collator = ours.DataCollatorForSOP(tokenizer, mlm_probability=0.5)
    batch = collator(samples)
    assert batch["sentence_order_label"].tolist() == [0, 1]
    assert batch["labels"].shape == batch["token_type_ids"].shape == (2, 8)
    _, labels, attended = collator.mask_tokens(torch.tensor([[2, 8, 3, 0]]))
    assert attended.tolist() == [[1, 1, 1, 0]]
    assert labels.shape == (1, 4)


class Generators:
    """A collate_fn that reports where the collator's generator started."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, batch):
        self.collator(batch)
        return self.collator.generator.initial_seed()


@pytest.mark.parametrize(("num_workers", "expected"), [(0, [5, 5, 5, 5]), (2, [5, 6, 5, 6])])
def test_a_seeded_collator_draws_differently_in_each_worker(tokenizer, num_workers, expected):
    collator = ours.DataCollatorForLanguageModeling(tokenizer, seed=5)
    collator(ROWS)  # used in the main process first: workers must not continue its generator
    loader = DataLoader(ROWS * 4, batch_size=2, num_workers=num_workers, collate_fn=Generators(collator))
    assert list(loader) == expected


def test_a_collator_can_be_pickled(tokenizer):
    collator = pickle.loads(pickle.dumps(ours.DataCollatorForLanguageModeling(tokenizer, seed=1)))
    assert collator(ROWS)["input_ids"].shape == (2, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlm_probability": None}, "mlm_probability=None"),
        ({"mlm_probability": 1.5}, "mlm_probability=1.5"),
        ({"random_replace_prob": -1}, "random_replace_prob=-1"),
        ({"mask_replace_prob": 0.8, "random_replace_prob": 0.3}, "exceed 1 together"),
        ({"whole_word_mask": True, "mlm": False}, "needs mlm=True"),
    ],
)
def test_impossible_options_are_refused_by_name(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        ours.DataCollatorForLanguageModeling(tokenizer, **options)


def test_masking_needs_a_mask_token_and_no_tensorflow(tokenizer):
    from transformers import ByT5Tokenizer

    with pytest.raises(ValueError, match="mlm=False"):
        ours.DataCollatorForLanguageModeling(ByT5Tokenizer())
    with pytest.raises(ValueError, match="mask token"):
        ours.DataCollatorForPermutationLanguageModeling(ByT5Tokenizer())([[5, 6]])
    with pytest.raises(NotImplementedError, match="TensorFlow"):
        ours.DataCollatorForLanguageModeling(tokenizer, tf_experimental_compile=True)


TOKENS = [5, 6, 7, 8]
LANGUAGE_COLLATORS = {
    "causal": lambda tokenizer: ours.DataCollatorForLanguageModeling(tokenizer, mlm=False),
    "masked": lambda tokenizer: ours.DataCollatorForLanguageModeling(tokenizer),
    "whole words": lambda tokenizer: ours.DataCollatorForWholeWordMask(tokenizer),
    "permutation": lambda tokenizer: ours.DataCollatorForPermutationLanguageModeling(tokenizer),
    "packing": lambda tokenizer: DataCollatorForPacking(8, copies_labels=True),
}


@pytest.mark.parametrize("kind", LANGUAGE_COLLATORS)
@pytest.mark.parametrize("labels, warnings", [([-100, -100, 7, 8], 1), (TOKENS, 0), (None, 0)])
def test_labels_that_are_replaced_are_warned_of_once_with_what_to_use(kind, labels, warnings, tokenizer, caplog):
    collator = LANGUAGE_COLLATORS[kind](tokenizer)
    row = {"input_ids": TOKENS, **({} if labels is None else {"labels": labels})}
    if kind == "packing":
        row = {name: np.array(values) for name, values in row.items()}
    for _ in range(3):
        batch = collator([[row, row]] if kind == "packing" else [row, row])
    texts = [record.getMessage() for record in caplog.records if "makes labels itself" in record.getMessage()]
    assert len(texts) == warnings
    if warnings:
        remedy = {"causal": "DataCollatorForSeq2Seq(tokenizer)", "packing": "Leave data_collator out"}
        assert remedy.get(kind, "Remove that column") in texts[0]
    if kind == "causal":
        assert batch["labels"].tolist() == [TOKENS, TOKENS]  # as documented


def test_labels_are_compared_with_tokens_at_the_first_batch_alone(tokenizer, monkeypatch):
    compared = []
    compare = np.array_equal
    monkeypatch.setattr(np, "array_equal", lambda *pair: compared.append(1) or compare(*pair))
    collator = LANGUAGE_COLLATORS["causal"](tokenizer)
    for _ in range(3):
        collator([{"input_ids": TOKENS, "labels": TOKENS}] * 2)
    assert len(compared) == 2
