"""Modules that tests share are imported by their bare names, from several directories on the path of one run."""

from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parents[1]
NOT_IMPORTED_BY_NAME = {"conftest.py", "__init__.py"}


def test_no_two_helpers_have_one_name():
    names = Counter(
        path.name
        for path in TESTS.rglob("*.py")
        if not path.name.startswith("test_") and path.name not in NOT_IMPORTED_BY_NAME
    )
    assert len(names) > 40
    assert [name for name, count in names.items() if count > 1] == []
