"""Overrides of older forms are called with what they take."""

import functools
import re

import pytest

from trainwright.interop.signatures import CALLED_WITH, GAINED, accepts, check_overrides, compatible


def plain(a, b=1): ...
def keywords(a, **kwargs): ...
def positional(a, b, /): ...
def only_keyword(a, *, b): ...


@pytest.mark.parametrize(
    ("function", "expected"), [(plain, True), (keywords, True), (only_keyword, True), (positional, False), (min, True)]
)
def test_a_keyword_is_accepted_by_name_or_by_any_keyword(function, expected):
    assert accepts(function, "b") == expected


def test_a_missing_keyword_is_not_accepted():
    assert not accepts(plain, "c") and not accepts(positional, "c")


def test_a_function_with_room_is_left_as_it_is():
    assert compatible(plain, ("b",)) is plain and compatible(keywords, ("anything",)) is keywords


def test_a_function_without_room_is_called_without_the_newer_arguments():
    def older(a, b=0):
        """Says what it got."""
        return a, b

    call = compatible(older, ("b", "c", "d"))
    assert call(1, b=2, c=3, d=4) == (1, 2)
    assert call.__name__ == "older" and call.__doc__ == older.__doc__
    with pytest.raises(TypeError, match="'e'"):  # not among the newer ones: a mistake of the caller
        call(1, e=5)


class Base:
    def __getattr__(self, name):
        raise AttributeError(name)


for _name in CALLED_WITH:
    setattr(Base, _name, lambda self, *args, **kwargs: None)


def subclass(**methods):
    return type("Mine", (Base,), methods)()


def test_overrides_that_can_be_called_pass():
    check_overrides(subclass(), Base)
    check_overrides(subclass(compute_loss=lambda self, model, inputs, return_outputs=False: 0), Base)
    check_overrides(subclass(log=lambda self, *args, **kwargs: 0), Base)
    check_overrides(subclass(get_train_dataloader=lambda self: 0), Base)
    check_overrides(subclass(create_optimizer=functools.partialmethod(lambda self, model=None: 0)), Base)
    wrapper = functools.wraps(lambda self: 0)(lambda self, *args, **kwargs: 0)
    check_overrides(subclass(log=wrapper), Base)


@pytest.mark.parametrize("name", [name for name, needed in CALLED_WITH.items() if needed])
def test_an_override_without_the_needed_arguments_is_reported_with_its_place(name):
    def override(self): ...

    called = ", ".join(CALLED_WITH[name])
    with pytest.raises(TypeError) as caught:
        check_overrides(subclass(**{name: override}), Base)
    message = str(caught.value)
    assert message.startswith(f"Mine.{name}() ({__file__}:")
    assert f"cannot be called as {name}({called})" in message and re.search(r":\d+\)", message)


def test_an_override_that_demands_more_is_reported():
    with pytest.raises(TypeError, match="missing a required argument: 'extra'"):
        check_overrides(subclass(get_eval_dataloader=lambda self, extra: 0), Base)


def test_an_override_may_demand_what_every_call_passes():
    check_overrides(subclass(training_step=lambda self, model, inputs, num_items_in_batch: 0), Base)


def test_a_function_set_on_the_instance_counts():
    mine = subclass()
    mine.log = lambda: None
    with pytest.raises(TypeError, match=r"cannot be called as log\(logs\)"):
        check_overrides(mine, Base)


def test_every_hook_of_the_tables_takes_its_arguments():
    from trainwright import Trainer

    for name, gained in GAINED.items():
        assert all(accepts(getattr(Trainer, name), argument) for argument in gained), name
    assert all(hasattr(Trainer, name) for name in CALLED_WITH)
