"""README.md, section "Versions", says what is accepted and tested: compared with what pip is told."""

import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def table() -> dict[str, tuple[str, list[str]]]:
    """Package -> (accepted, tested releases), as README.md says."""
    section = (ROOT / "README.md").read_text().split("## Versions", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| (\w+)(?: \(optional\))? \| (>=\S+) \| (.+) \|$", section, re.M)
    return {package.lower(): (accepted, tested.split(", ")) for package, accepted, tested in rows}


def pinned(file: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / file).read_text(), re.M))


def test_what_is_accepted_is_what_pip_accepts():
    extras = PROJECT["optional-dependencies"]
    requirements = [*PROJECT["dependencies"], *extras["transformers"], f"python{PROJECT['requires-python']}"]
    accepted = dict(re.fullmatch(r"([\w-]+)(>=.+)", text).groups() for text in requirements)
    del accepted["tqdm"]  # any that works for the others
    assert {package: row[0] for package, row in table().items()} == accepted


@pytest.mark.parametrize("package", sorted(set(table()) - {"python"}))
def test_what_is_tested_is_what_make_installs(package):
    older = [release for name, release in pinned("tests/requirements-4.55.txt").items() if name == package]
    assert table()[package][1] == [*older, pinned("constraints.txt")[package]]


def test_each_extra_is_tried_alone_with_the_releases_of_the_other_tests():
    """One file includes the other, and pins nothing twice."""
    file = ROOT / "tests" / "minimal" / "constraints.txt"
    (included,) = re.findall(r"^-c (.+)$", file.read_text(), re.M)
    assert (file.parent / included).resolve() == ROOT / "constraints.txt"
    assert not set(pinned("constraints.txt")) & set(pinned("tests/minimal/constraints.txt"))
