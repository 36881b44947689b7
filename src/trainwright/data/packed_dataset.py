"""Data whose samples are packs: lists of tokenised samples that together fill a sequence.

Owns: `PackedDataset` (by index), `PackedStream` (one after the other). Leaves to others: which samples go together
(packing), tensors (collate_packing). To everything else (orders, batches, positions, shares of processes) a pack is the
sample, so nothing else has to know of packing.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from trainwright.data.collate_base import Array, to_numpy
from trainwright.data.packing import PackingPlan, plan_packs
from trainwright.names import closest

logger = logging.getLogger(__name__)

Piece = dict[str, Array]  # "input_ids" and perhaps "labels", each (num_tokens,)

PACKS_AHEAD = 64  # a stream holds this many packs' worth of tokens: more would waste less and take more memory
FULL = 0.995  # a stream gives away packs that are this full, and packs the samples of the others again
LEAST_GIVEN = 4  # one in four at the least, so that a stream whose samples do not fit together is not packed forever


class PackedDataset(Dataset[list[Piece]]):
    """Packs of the samples of an indexed data set, by a plan that was made from their lengths.

    `refused`: columns that a sample must not have, because the model takes them and they cannot be packed.
    `collate_whole`: makes the batches of an evaluation, whose samples are whole, whatever the length they were planned
    with.
    """

    def __init__(
        self, dataset: Any, plan: PackingPlan, refused: frozenset[str] = frozenset(), collate_whole: Any = None
    ) -> None:
        self.dataset = dataset
        self.plan = plan
        self.refused = refused
        self.collate_whole = collate_whole

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> list[Piece]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[list[Piece]]:
        """The packs of a batch. Their samples are asked for together where the data set can give several at once."""
        plan = self.plan
        for index in indices:
            if not 0 <= index < len(plan):
                raise IndexError(
                    f"There is no pack {index}: packing=True made {len(plan)} packs of {len(plan.lengths)} samples. A "
                    "sampler must count packs: build it on the data set it is given, not on the unpacked one."
                )
        places = [range(plan.offsets[index], plan.offsets[index + 1]) for index in indices]
        numbers = plan.samples[list(itertools.chain.from_iterable(places))].tolist()
        fetch = getattr(self.dataset, "__getitems__", None)
        samples = iter(fetch(numbers) if fetch is not None else [self.dataset[number] for number in numbers])
        return [[self._piece(next(samples), place) for place in of_pack] for of_pack in places]

    def _piece(self, sample: Any, place: int) -> Piece:
        number, begin, end = (int(values[place]) for values in (self.plan.samples, self.plan.begins, self.plan.ends))
        tokens = token_columns(sample, number, self.refused)
        if self.collate_whole is not None:
            return tokens
        found, planned = len(tokens["input_ids"]), int(self.plan.lengths[number])
        if found != planned:
            raise ValueError(
                f"Sample {number} has {found} tokens, but had {planned} when packs were planned. packing=True needs "
                "lengths that stay: a transform that changes them has to run before, and a column that "
                "length_column_name names must count tokens (set it to None to have them counted)."
            )
        return {name: values[begin:end] for name, values in tokens.items()}


class PackedStream(IterableDataset[list[Piece]]):
    """Packs of the samples of a stream, made from a buffer of `PACKS_AHEAD` packs' worth of tokens as they come."""

    def __init__(
        self,
        dataset: Any,
        packing_length: int,
        *,
        long_samples: str = "split",
        seed: int = 0,
        refused: frozenset[str] = frozenset(),
    ) -> None:
        self.dataset = dataset
        self.packing_length = packing_length
        self.long_samples = long_samples
        self.seed = seed
        self.refused = refused

    def __getattr__(self, name: str) -> Any:
        # What decides the order of a stream. Its length is in samples, not packs, and is not passed on.
        if name not in ("set_epoch", "generator"):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __iter__(self) -> Iterator[list[Piece]]:
        waiting: list[Piece] = []
        num_tokens, has_warned = 0, False
        for number, sample in enumerate(self.dataset):
            tokens = token_columns(sample, number, self.refused)
            if len(tokens["input_ids"]) > self.packing_length and not has_warned:
                has_warned = True
                self._tell_of_long_sample(number, len(tokens["input_ids"]))
            for piece in self._pieces(tokens):
                waiting.append(piece)
                num_tokens += len(piece["input_ids"])
            if num_tokens >= PACKS_AHEAD * self.packing_length:
                packs, waiting = self._pack(waiting)
                num_tokens = sum(len(piece["input_ids"]) for piece in waiting)
                yield from packs
        while waiting:
            packs, waiting = self._pack(waiting)
            yield from packs

    def _pieces(self, tokens: Piece) -> list[Piece]:
        length = self.packing_length
        begins = range(0, len(tokens["input_ids"]), length)
        if self.long_samples == "truncate":
            begins = begins[:1]
        return [{name: values[begin : begin + length] for name, values in tokens.items()} for begin in begins]

    def _pack(self, pieces: list[Piece]) -> tuple[list[list[Piece]], list[Piece]]:
        """The packs to give away, fullest first, and the pieces that wait for others to join them."""
        plan = plan_packs([len(piece["input_ids"]) for piece in pieces], self.packing_length, seed=self.seed)
        packs = [[pieces[place] for place in plan.samples[a:b]] for a, b in itertools.pairwise(plan.offsets)]
        sizes = [sum(len(piece["input_ids"]) for piece in pack) for pack in packs]
        fullest = sorted(range(len(packs)), key=lambda pack: -sizes[pack])
        num_full = sum(size >= FULL * self.packing_length for size in sizes)
        given = fullest[: max(num_full, -(-len(packs) // LEAST_GIVEN))]
        left = sorted(set(fullest) - set(given))
        return [packs[pack] for pack in given], [piece for pack in left for piece in packs[pack]]

    def _tell_of_long_sample(self, number: int, length: int) -> None:
        what = {"split": "cut into pieces that do not see each other", "truncate": "cut off there"}
        text = f"sample {number} has {length} tokens, more than packing_length={self.packing_length}"
        if self.long_samples == "error":
            raise ValueError(
                f"packing_long_samples='error', and {text}. Raise packing_length, shorten samples where they are "
                "tokenised, or set packing_long_samples to 'split' or 'truncate'."
            )
        logger.warning("packing: %s. It and others like it are %s.", text, what[self.long_samples])


def token_columns(sample: Any, number: int, refused: frozenset[str] = frozenset()) -> Piece:
    """The tokens of a sample, and its labels where it has them, as arrays. Raises ValueError for other samples."""
    if not isinstance(sample, Mapping):
        sample = vars(sample) if hasattr(sample, "__dict__") else {}
    if "input_ids" not in sample:
        hint = closest("input_ids", sample)
        raise ValueError(
            f"packing=True joins tokenised samples, and sample {number} has no 'input_ids' (it has {list(sample)})."
            f"{hint} Tokenise the data set first, without padding."
        )
    if not refused.isdisjoint(sample):
        names = sorted(refused & set(sample))
        raise ValueError(
            f"packing=True joins 'input_ids' and 'labels', and the samples also have {names}, which the model takes "
            "and which cannot be joined. Remove these columns, or set packing=False."
        )
    tokens = to_numpy(sample["input_ids"])
    mask = sample.get("attention_mask")
    if tokens.ndim != 1:
        raise ValueError(f"packing=True needs one row of tokens per sample; sample {number} has shape {tokens.shape}.")
    if mask is not None and len(mask) and not to_numpy(mask).all():
        raise ValueError(
            f"packing=True: sample {number} is padded already (its attention_mask has zeros). Tokenise with "
            "padding=False; packing fills the sequences with other samples instead."
        )
    if sample.get("labels") is None:
        return {"input_ids": tokens}
    labels = to_numpy(sample["labels"])
    if labels.shape != tokens.shape:
        raise ValueError(
            f"packing=True needs one label per token; sample {number} has {tokens.shape[0]} tokens and labels of shape "
            f"{labels.shape}."
        )
    if labels.dtype.kind == "f" and len(wrong := labels[labels != np.trunc(labels)]):
        raise ValueError(f"packing=True is for labels that are tokens, and sample {number} has {wrong[0]} as a label.")
    return {"input_ids": tokens, "labels": labels}
