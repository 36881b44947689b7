import pytest

from local_hub import serve
from trainwright.hub import push


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
        push._api.cache_clear()
        yield state
    fresh_session()
    push._api.cache_clear()
