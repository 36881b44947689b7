import pytest
import torch


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao compiles each step, half a minute the first time. test_battery.py ends with a test of compiled ones."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
