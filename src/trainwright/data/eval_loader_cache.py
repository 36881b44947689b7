"""Evaluation loaders whose workers outlive a pass (`dataloader_persistent_workers`).

Owns: which loader serves which data set again, and ending their workers. Leaves to others: building loaders
(`from_args`), iterating. A loader that is not cached ends its workers after each pass, so that every evaluation begins
with starting them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.data import DataLoader


class EvalLoaderCache:
    """A loader for each evaluation set of a run, and for one other set at a time, each with its workers."""

    def __init__(self) -> None:
        self._cached: list[tuple[Any, tuple[Any, ...], Any]] = []  # data set, what the loader was built for, loader
        self._abandoned: list[Any] = []  # loaders in the middle of a pass that is not continued

    def get(
        self, dataset: Any, built_for: tuple[Any, ...], eval_dataset: Any, build: Callable[[], DataLoader[Any]]
    ) -> DataLoader[Any]:
        """The loader of `dataset`, cached where it was built for the same; `build` makes it otherwise. `eval_dataset`:
        the evaluation set of the run, or a dict of several.

        A loader in the middle of a pass is left to its reader: its workers cannot serve two passes at once.
        """
        wanted = [dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])]
        cached, self._cached = self._cached, []
        found: Any = None
        for entry in cached:
            one, for_what, loader = entry
            if one is dataset and self._is_read(loader):
                continue
            if not any(one is other for other in wanted) or (one is dataset and not _same(for_what, built_for)):
                _end_workers(loader)
                continue
            found = loader if one is dataset else found
            self._cached.append(entry)
        self._abandoned = [loader for loader in self._abandoned if loader is not found]
        if found is None:
            found = build()
            self._cached.append((dataset, built_for, found))
        elif getattr(found, "generator", None) is not None:
            found.generator.manual_seed(found.generator.initial_seed())  # as a new loader would draw
        return found  # type: ignore[no-any-return]

    def abandon(self, loader: Any) -> None:
        """The pass that `loader` is in will not be continued."""
        self._abandoned.append(loader)

    def close(self) -> None:
        """End all workers. Loaders that are asked for later are built anew."""
        for _, _, loader in self._cached:
            _end_workers(loader)
        self._cached, self._abandoned = [], []

    def _is_read(self, loader: Any) -> bool:
        """Whether `loader` is in the middle of a pass: its workers still owe batches."""
        iterator = _iterator_of(loader)
        owes = getattr(iterator, "_tasks_outstanding", 0) > 0
        return owes and not any(loader is other for other in self._abandoned)


def _same(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    return len(first) == len(second) and all(one is other or one == other for one, other in zip(first, second))


def _holder(loader: Any) -> Any:
    """The torch loader that has the workers: what accelerate shares out may have it inside."""
    return getattr(loader, "base_dataloader", loader)


def _iterator_of(loader: Any) -> Any:
    return getattr(_holder(loader), "_iterator", None)


def _end_workers(loader: Any) -> None:
    iterator = _iterator_of(loader)
    if iterator is not None:
        _holder(loader)._iterator = None
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()
