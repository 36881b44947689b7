"""Generators that a collator keeps for itself: found, seeded for a batch, saved and put back."""

import functools
import json
import random

import numpy as np
import pytest
import torch

from trainwright.data import collator_rng


class Holder:
    def __init__(self, seed=1):
        self.generator = torch.Generator().manual_seed(seed)
        self.parts = [random.Random(seed), {"numpy": np.random.default_rng(seed)}]
        self.legacy = np.random.RandomState(seed)

    def draw(self, samples=None):
        python, parts = self.parts
        return [
            torch.rand((), generator=self.generator).item(),
            python.random(),
            parts["numpy"].random(),
            self.legacy.rand(),
        ]


class Lazy:
    generator = None

    def __init__(self, seed=1):
        self.seed = seed

    def __call__(self, samples):
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(self.seed)
        return torch.rand((), generator=self.generator).item()


PATHS = ["generator", "parts.0", "parts.1.numpy", "legacy"]


def test_generators_are_found_in_attributes_lists_and_dicts():
    assert list(collator_rng.find(Holder())) == PATHS


def test_they_are_found_in_what_a_collator_wraps():
    holder = Holder()

    def closes_over(samples):
        return holder.draw(samples)

    for wrapper in (functools.partial(holder.draw, samples=[]), holder.draw, closes_over):
        assert len(collator_rng.find(wrapper)) == 4
    assert collator_rng.find(len) == collator_rng.find(torch.stack) == {}


def test_nothing_is_found_in_a_model_or_in_data():
    class WithData:
        model = torch.nn.Linear(1, 1)

        def __init__(self):
            self.rows = [random.Random(1)] * 1000
            self.module = random

    assert collator_rng.find(WithData()) == {} and not collator_rng.is_made_late(WithData())


@pytest.mark.parametrize("collator, late", [(Lazy(), True), (Holder(), True), (torch.stack, False), (dict, False)])
def test_only_a_collator_that_may_make_a_generator_is_rehearsed(collator, late):
    assert collator_rng.is_made_late(collator) == late


def test_the_same_seed_gives_the_same_numbers_and_each_generator_its_own():
    one, other = Holder(1), Holder(2)
    collator_rng.reseed(one, 7)
    collator_rng.reseed(other, 7)
    drawn = one.draw()
    assert drawn == other.draw() and len(set(drawn)) == 4
    collator_rng.reseed(other, 8)
    assert not set(drawn) & set(other.draw())


def test_states_come_back_through_json():
    before, after = Holder(1), Holder(2)
    before.draw()
    saved = json.loads(json.dumps(collator_rng.states(before)))
    expected = [before.draw() for _ in range(2)]
    collator_rng.restore(after, saved)
    assert [after.draw() for _ in range(2)] == expected


def test_a_generator_that_is_not_there_yet_is_made():
    before, after = Lazy(), Lazy()
    before([])
    saved = collator_rng.states(before)
    collator_rng.restore(after, saved)
    assert after([]) == before([])


def test_a_file_cannot_choose_which_attribute_is_set():
    lazy = Lazy()
    state = collator_rng.states(Holder())["generator"]
    collator_rng.restore(lazy, {"seed": state, "other": state, "__class__": state})
    assert vars(lazy) == {"seed": 1}


def test_what_earlier_releases_saved_is_understood():
    before, after = Holder(1), Holder(2)
    collator_rng.restore(after, collator_rng.states(before)["generator"]["state"])
    assert before.draw()[0] == after.draw()[0]


def test_without_generators_nothing_is_saved():
    assert collator_rng.states(torch.stack) is None
    collator_rng.restore(torch.stack, None)


def test_differently_seeded_collators_stay_different():
    seen = {collator_rng.fingerprint(collator) for collator in (Lazy(1), Lazy(2), Holder(1), Holder(2), len)}
    assert len(seen) == 5
