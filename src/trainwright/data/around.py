"""What stands around a data set, a sampler or a loader, and changes one thing of it.

Owns: asking the object inside for everything else. Leaves to others: the one thing.
"""

from __future__ import annotations

from typing import Any


class Around:
    """`_inside` names the attribute that holds the object inside."""

    _inside: str

    def __getattr__(self, name: str) -> Any:
        try:
            inner = self.__dict__[self._inside]
        except KeyError:  # not there yet while this object is copied or unpickled
            raise AttributeError(name) from None
        return getattr(inner, name)
