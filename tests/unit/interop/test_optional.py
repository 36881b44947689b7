"""Is a package there, and the one error that says how to get it."""

import sys

import pytest

from trainwright.interop.optional import MissingExtra, installed_version, is_installed, require


def test_looking_for_a_package_does_not_import_it():
    assert is_installed("this_is_no_module") is False
    sys.modules.pop("wsgiref.simple_server", None)
    assert is_installed("wsgiref.simple_server")
    assert "wsgiref.simple_server" not in sys.modules


def test_a_child_of_a_missing_package_and_a_module_without_spec_are_not_installed(monkeypatch):
    assert is_installed("this_is_no_module.child") is False
    monkeypatch.setitem(sys.modules, "a_stub", type(sys)("a_stub"))
    assert is_installed("a_stub") is False


def test_a_release_is_a_tuple_of_integers():
    import torch

    version = installed_version("torch")
    assert version == tuple(int(number) for number in torch.__version__.partition("+")[0].split(".")[:3])
    assert installed_version("this-is-no-package") is None


def test_what_is_there_is_imported():
    assert require("json.decoder", "reading").JSONDecoder


@pytest.mark.parametrize(
    ("extra", "package", "command"),
    [
        ("optuna", None, r"pip install 'trainwright\[optuna\]'"),
        (None, None, "pip install no_such_module"),
        (None, "no-such", "pip install no-such"),
    ],
)
def test_what_is_missing_names_what_needs_it_and_the_command(extra, package, command):
    with pytest.raises(
        MissingExtra, match=rf"^the search needs the package .* is not installed\. Run: {command}$"
    ) as e:
        require("no_such_module.part", "the search", package=package, extra=extra)
    assert (
        isinstance(e.value, ImportError)
        and isinstance(e.value, ValueError)
        and e.value.package == (package or "no_such_module")
    )


def test_a_package_that_lacks_a_package_of_its_own_says_so_itself(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import what_it_needs\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="what_it_needs") as caught:
        require("half_installed", "the search")
    assert not isinstance(caught.value, MissingExtra)
