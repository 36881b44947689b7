"""Wrappers of a data set, a sampler or a loader that change one thing of it.

Owns: asking the object inside for everything else. Leaves to others: the one thing.
"""

from __future__ import annotations

from typing import Any

# How the object inside is copied and pickled, which would lose the wrapper.
OF_COPIES = {"__copy__", "__deepcopy__", "__getstate__", "__setstate__", "__reduce__", "__reduce_ex__"}


class Proxy:
    """`_inside` names the attribute that holds the object inside."""

    _inside: str

    def __getattr__(self, name: str) -> Any:
        if self._inside not in self.__dict__ or name in OF_COPIES:  # not there yet while this object is unpickled
            raise AttributeError(name)
        return getattr(self.__dict__[self._inside], name)
