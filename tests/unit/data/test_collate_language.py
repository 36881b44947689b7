"""Language modelling collators: equal masks from equal seeds, and the promised shares of masks."""

import copy
import pickle
import types

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from trainwright.data import collate as ours
from trainwright.data import collate_language
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


def test_the_ends_of_each_probability_are_probabilities(tokenizer):
    for options in (
        {"mlm_probability": 0},
        {"mlm_probability": 1},
        {"mask_replace_prob": 0, "random_replace_prob": 1},
        {"mask_replace_prob": 1, "random_replace_prob": 0},
    ):
        ours.DataCollatorForLanguageModeling(tokenizer, **options)
    for name in ("mlm_probability", "mask_replace_prob", "random_replace_prob"):
        for value in (-0.1, 1.1, None):
            with pytest.raises(ValueError, match=f"{name}={value}"):
                ours.DataCollatorForLanguageModeling(tokenizer, **{name: value})


def test_causal_modelling_needs_no_mask_token_and_no_probability(tokenizer):
    bare = types.SimpleNamespace()
    collator = ours.DataCollatorForLanguageModeling(bare, mlm=False, mlm_probability=None)
    assert collator.generator is None
    with pytest.raises(ValueError, match=r"tokenizer \(SimpleNamespace\) has none"):
        ours.DataCollatorForLanguageModeling(bare)


def test_whole_words_are_always_masked_unless_shares_were_asked_for(tokenizer):
    collator = ours.DataCollatorForLanguageModeling(tokenizer, whole_word_mask=True)
    assert (collator.mask_replace_prob, collator.random_replace_prob) == (1.0, 0.0)
    for shares in ((0.8, 0.0), (0.7, 0.1)):
        names = ("mask_replace_prob", "random_replace_prob")
        collator = ours.DataCollatorForLanguageModeling(tokenizer, whole_word_mask=True, **dict(zip(names, shares)))
        assert (collator.mask_replace_prob, collator.random_replace_prob) == shares
    plain = ours.DataCollatorForLanguageModeling(tokenizer)
    assert (plain.mask_replace_prob, plain.random_replace_prob) == (0.8, 0.1)


def test_the_generator_of_a_process_is_made_once_and_anew_in_a_worker(tokenizer, monkeypatch):
    workers = [None]
    monkeypatch.setattr(collate_language, "get_worker_info", lambda: workers[-1])
    unseeded = ours.DataCollatorForLanguageModeling(tokenizer)
    unseeded.create_rng()
    assert unseeded.generator is None
    collator, seeds = ours.DataCollatorForLanguageModeling(tokenizer, seed=5), []
    assert collator.get_generator(7).initial_seed() == 7
    for number in (None, None, 2, 2, 0):
        workers.append(None if number is None else types.SimpleNamespace(id=number))
        before = collator.generator
        collator.create_rng()
        seeds.append((collator.generator.initial_seed(), collator.generator is before))
    assert seeds == [(5, False), (5, True), (5 + 2, False), (5 + 2, True), (5, False)]


def test_causal_labels_are_the_tokens_without_padding(tokenizer):
    batch = ours.DataCollatorForLanguageModeling(tokenizer, mlm=False)([{"input_ids": row} for row in ROWS])
    assert batch["labels"].tolist() == [ROWS[0], [*ROWS[1], -100, -100, -100]]
    assert batch["input_ids"].tolist() == [ROWS[0], [*ROWS[1], 0, 0, 0]]
    bare = types.SimpleNamespace(pad_token_id=None)
    batch = ours.DataCollatorForLanguageModeling(bare, mlm=False)([[0, 5], [6, 0]])
    assert batch["labels"].tolist() == [[0, 5], [6, 0]]
    wide = ours.DataCollatorForLanguageModeling(tokenizer, mlm=False, pad_to_multiple_of=6)
    for rows in (ROWS, [{"input_ids": row} for row in ROWS]):
        assert wide(rows)["labels"].shape == (2, 12)
    arrays = ours.DataCollatorForLanguageModeling(tokenizer, mlm=False, return_tensors="np")(ROWS)
    assert all(isinstance(value, np.ndarray) for value in arrays.values())


def test_tokens_that_are_given_as_special_are_never_masked(tokenizer):
    rows = [{"input_ids": [5, 6, 7, 8], "special_tokens_mask": [0, 1, 0, 1]}] * 4
    batch = ours.DataCollatorForLanguageModeling(
        tokenizer, mlm_probability=1.0, mask_replace_prob=1.0, random_replace_prob=0
    )(rows)
    assert batch["labels"].tolist() == [[5, -100, 7, -100]] * 4
    assert batch["input_ids"].tolist() == [[4, 6, 4, 8]] * 4
    assert "special_tokens_mask" not in batch


def test_arrays_are_masked_by_the_same_methods_as_tensors(tokenizer):
    collator = ours.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5, seed=3)
    inputs = np.array([[2, 5, 6, 7, 8, 9, 3]] * 3)
    collator.create_rng()
    arrays = collator.numpy_mask_tokens(inputs)
    collator.generator.manual_seed(3)
    tensors = collator.torch_mask_tokens(torch.tensor(inputs))
    for array, tensor in zip(arrays, tensors):
        assert isinstance(array, np.ndarray) and array.tolist() == tensor.tolist()
    special = np.array([[0, 1, 1, 1, 1, 1, 1]] * 3)
    _, labels = collator.numpy_mask_tokens(inputs, special)
    assert (labels[:, 1:] == -100).all()
    words = ours.DataCollatorForLanguageModeling(tokenizer, whole_word_mask=True, mlm_probability=1.0, seed=3)
    offsets = np.array([[(0, 0), (0, 1), (1, 2), (3, 4), (4, 5), (6, 7), (0, 0)]] * 3)
    _, labels = words.numpy_mask_tokens(inputs, None, offsets)
    assert labels.tolist() == [[-100, 5, 6, 7, 8, 9, -100]] * 3


def test_offsets_are_padded_on_the_side_of_the_tokenizer(tokenizer):
    left = copy.deepcopy(tokenizer)
    left.padding_side = "left"
    collator = ours.DataCollatorForLanguageModeling(left, whole_word_mask=True, mlm_probability=1.0)
    offsets = [[(0, 0), (0, 2), (2, 6), (0, 0)], [(0, 0), (0, 3), (0, 0)]]
    rows = [
        {"input_ids": [2, 5, 6, 3], "offset_mapping": offsets[0]},
        {"input_ids": [2, 8, 3], "offset_mapping": offsets[1]},
    ]
    batch = collator(rows)
    assert batch["labels"].tolist() == [[-100, 5, 6, -100], [-100, -100, 8, -100]]
    assert batch.keys() == {"input_ids", "attention_mask", "labels"} | set(batch.keys() & {"token_type_ids"})


def test_pieces_of_a_word_are_masked_together_where_padding_stands_before_them(tokenizer):
    left = copy.deepcopy(tokenizer)
    left.padding_side = "left"
    rows = [
        {"input_ids": [2, 8, 9, 12, 3], "offset_mapping": [(0, 0), (0, 3), (4, 7), (8, 9), (0, 0)]},
        {"input_ids": [2, 5, 6, 3], "offset_mapping": [(0, 0), (0, 2), (2, 6), (0, 0)]},
    ]
    collator = ours.DataCollatorForLanguageModeling(left, whole_word_mask=True, mlm_probability=0.5, seed=3)
    pieces = (collator(rows * 40)["labels"] != -100)[1::2, 2:4]  # (40, 2)
    assert torch.equal(pieces[:, 0], pieces[:, 1]) and len(pieces.unique()) == 2


def test_a_word_goes_on_where_the_token_before_ended_and_was_no_special_one():
    offsets = torch.tensor([[(0, 0), (0, 2), (2, 4), (5, 6), (6, 8), (0, 0), (0, 3)]])
    special = torch.tensor([[True, False, False, False, False, True, False]])
    starts = collate_language.word_starts(offsets, special)
    assert starts.tolist() == [[False, True, False, True, False, False, True]]
    chosen = torch.tensor([[False, True, False, False, False, False, True]])
    spread = collate_language.spread_over_words(chosen, starts)
    assert spread.tolist() == [[False, True, True, False, False, False, True]]


def test_the_share_of_random_tokens_is_of_those_that_were_not_masked(tokenizer):
    rows = [[8] * 3000] * 2
    options = {"mlm_probability": 1.0, "mask_replace_prob": 0.5, "random_replace_prob": 0.5}
    batch = collate(ours, "DataCollatorForLanguageModeling", tokenizer, rows, **options)
    kept = (batch["input_ids"] == 8).float().mean().item()
    assert kept == pytest.approx(0.5 / len(tokenizer), abs=0.02)  # those that became themselves by chance


# The collators that only generation 4 has.


def older(tokenizer, **options):
    return ours.DataCollatorForWholeWordMask(tokenizer, **{"seed": 3, "mlm_probability": 0.5, **options})


def test_whole_word_pieces_are_chosen_while_they_fit_and_at_least_one_token_is(tokenizer):
    rows = [[2, 8, 9, 10, 12, 13, 3, 0, 0, 0, 0]] * 50  # padding is none of the tokens
    for probability, budget in ((0.5, round(7 * 0.5)), (0.01, 1), (0.0, 1), (1.0, 5)):
        batch = older(tokenizer, mlm_probability=probability, mask_replace_prob=1.0, random_replace_prob=0)(rows)
        chosen = batch["labels"] != -100
        assert chosen.sum(1).tolist() == [budget] * 50
        assert not chosen[:, [0, 6, 7, 8, 9, 10]].any()
        assert (batch["input_ids"][chosen] == 4).all()
    assert len({tuple(row) for row in chosen.tolist()}) == 1
    few = older(tokenizer, mlm_probability=0.3)(rows)["labels"] != -100
    assert len({tuple(row) for row in few.tolist()}) > 1  # another word each time


def test_without_a_padding_token_every_token_counts_for_the_budget_of_pieces(tokenizer):
    unpadded = copy.deepcopy(tokenizer)
    unpadded.pad_token = None
    unpadded.pad = lambda rows, **_: {"input_ids": torch.tensor([row["input_ids"] for row in rows])}
    chosen = older(unpadded, mlm_probability=0.5)([[2, 8, 9, 10, 12, 3]] * 20)["labels"] != -100
    assert chosen.sum(1).tolist() == [3] * 20


def test_words_are_drawn_from_the_collators_own_generator(tokenizer):
    rows, found = [[2, 8, 9, 10, 12, 13, 3]] * 20, []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(older(tokenizer, mlm_probability=0.3)(rows)["labels"].tolist())
    assert found[0] == found[1]


def test_a_word_that_does_not_fit_is_left_and_a_later_one_that_does_is_taken(tokenizer):
    rows = [[2, 5, 6, 7, 8, 3]] * 50  # a word of three pieces and one of one; two tokens may be chosen
    chosen = older(tokenizer, mlm_probability=2 / 6)(rows)["labels"] != -100
    assert chosen.tolist() == [[False, False, False, False, True, False]] * 50


def test_a_piece_without_its_beginning_is_a_word(tokenizer):
    chosen = older(tokenizer, mlm_probability=1.0)([[6, 7, 3, 2]] * 3)["labels"] != -100
    assert chosen.tolist() == [[True, True, False, False]] * 3


def test_labels_and_special_tokens_of_samples_are_not_padded_as_columns(tokenizer):
    rows = [
        {"input_ids": [8, 9, 10], "labels": labels, "label": 2, "special_tokens_mask": [0, 1, 0]}
        for labels in ([1], [1, 2], [])
    ]
    batch = older(tokenizer, mlm_probability=1.0)(rows)
    assert "label" not in batch and "special_tokens_mask" not in batch
    assert batch["labels"].tolist() == [[8, -100, 10]] * 3


def test_marks_of_0_and_1_say_what_is_masked_but_never_special_tokens(tokenizer):
    collator = older(tokenizer, mask_replace_prob=1.0, random_replace_prob=0)
    inputs, marks = np.array([[2, 8, 9, 3]]), np.array([[1, 1, 0, 1]])
    masked, labels = collator.numpy_mask_tokens(inputs, marks)
    assert isinstance(masked, np.ndarray) and isinstance(labels, np.ndarray)
    assert masked.tolist() == [[2, 4, 9, 3]] and labels.tolist() == [[-100, 8, -100, -100]]


def test_sentence_order_has_its_labels_in_either_framework(tokenizer):
    rows = [{"input_ids": r, "token_type_ids": [1] * len(r), "sentence_order_label": 1, "more": [1]} for r in ROWS]
    for framework, kind in (("pt", torch.Tensor), ("np", np.ndarray)):
        batch = ours.DataCollatorForSOP(tokenizer)(rows, return_tensors=framework)
        assert all(isinstance(value, kind) for value in batch.values())
        assert batch["sentence_order_label"].tolist() == [1, 1] and "more" not in batch
        assert batch["token_type_ids"].tolist() == [[1] * 8, [1] * 5 + [0] * 3]
    with pytest.raises(ValueError, match=r"^sentence_order_label hold 0\.5 in row 0"):
        ours.DataCollatorForSOP(tokenizer)([rows[0] | {"sentence_order_label": 0.5}])


def test_attention_of_sentence_order_leaves_out_padding_where_there_is_some(tokenizer):
    collator = ours.DataCollatorForSOP(tokenizer, seed=3)
    attended = collator.mask_tokens(torch.tensor([[2, 8, 3, 0]]))[2]
    assert attended.dtype == torch.int64 and attended.tolist() == [[1, 1, 1, 0]]
    assert collator.generator is not None
    bare = types.SimpleNamespace(
        pad_token_id=None, mask_token="[MASK]", mask_token_id=4, all_special_ids=[2, 3], __len__=lambda: 14
    )
    collator = ours.DataCollatorForSOP(bare, mask_replace_prob=1.0, random_replace_prob=0)
    assert collator.mask_tokens(torch.tensor([[2, 8, 3, 0]]))[2].tolist() == [[1, 1, 1, 1]]


# Permutation language modelling.


def test_spans_hold_their_share_of_the_tokens_and_follow_each_other(tokenizer):
    collator = ours.DataCollatorForPermutationLanguageModeling(tokenizer, plm_probability=0.5, max_span_length=1)
    torch.manual_seed(0)
    batch = collator([[8] * 1000] * 2)
    predicted = batch["labels"] != -100
    # Spans of one token, each in a context of two: one of every pair.
    assert predicted.reshape(2, 500, 2).sum(2).eq(1).all()
    assert batch["input_ids"][predicted].eq(4).all() and batch["input_ids"][~predicted].eq(8).all()
    assert torch.equal(batch["target_mapping"], torch.eye(1000).expand(2, 1000, 1000))


def test_arrays_of_permutations_are_those_of_tensors(tokenizer):
    collator = ours.DataCollatorForPermutationLanguageModeling(tokenizer)
    inputs = [[2, *[8] * 20, 3]] * 2
    torch.manual_seed(0)
    tensors = collator.torch_mask_tokens(torch.tensor(inputs))
    torch.manual_seed(0)
    arrays = collator.numpy_mask_tokens(np.array(inputs))
    for array, tensor in zip(arrays, tensors, strict=True):
        assert isinstance(array, np.ndarray) and np.array_equal(array, tensor.numpy())


def test_samples_of_different_lengths_are_padded_before_they_are_permuted(tokenizer):
    batch = ours.DataCollatorForPermutationLanguageModeling(tokenizer)([[2, 8, 8, 3], [2, 3]])
    assert batch["input_ids"][1].tolist() == [2, 3, 0, 0] and batch["perm_mask"].shape == (2, 4, 4)


def test_permutation_names_the_tokenizer_that_has_no_mask_token():
    with pytest.raises(ValueError, match=r"the tokenizer \(SimpleNamespace\) has none"):
        ours.DataCollatorForPermutationLanguageModeling(types.SimpleNamespace(pad_token_id=0))([[5, 6]])
