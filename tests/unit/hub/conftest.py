import time

import pytest

from local_hub import serve
from trainwright.hub import push, retry, session


class Unhurried:
    """The module `time`, for a client that waits between its retries."""

    def __getattr__(self, name):
        return getattr(time, name)

    def sleep(self, seconds):
        """Not here."""


@pytest.fixture
def hub(monkeypatch):
    """A small Hub on this machine, to which the huggingface_hub of this process talks."""
    http = pytest.importorskip("huggingface_hub.utils._http")
    constants = pytest.importorskip("huggingface_hub.constants")
    fresh_session = getattr(http, "close_session", None) or http.reset_sessions
    with serve() as state:
        monkeypatch.setattr(constants, "ENDPOINT", state.url)  # what HF_ENDPOINT sets in a fresh process
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        fresh_session()  # one made while offline refuses every request
        if hasattr(http, "time"):
            monkeypatch.setattr(http, "time", Unhurried())
        monkeypatch.setattr(retry, "RETRY_DELAYS_S", (0, 0))
        monkeypatch.setattr(session, "FIRST_DELAYS_S", (0,))
        push._api.cache_clear()
        session._license_of.cache_clear()
        yield state
    fresh_session()
    push._api.cache_clear()
