"""Which errors of a push are tried again, and after how long."""

import datetime
import email.utils
import threading
from types import SimpleNamespace

import pytest

from trainwright.hub import retry


class Refused(Exception):
    def __init__(self, status, **headers):
        super().__init__(f"status {status}")
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.response = SimpleNamespace(status_code=status, headers=headers)


class ConnectTimeout(Exception):
    """As of a client that derives its errors from none of Python's."""


class OfflineModeIsEnabled(ConnectionError):
    """As of huggingface_hub."""


PASSING = [Refused(status) for status in (408, 409, 412, 429, 500, 502, 503, 504)] + [
    ConnectionResetError(), TimeoutError(), ConnectTimeout(), OSError(5, "I/O"), RuntimeError("of a native library")
]  # fmt: skip
LASTING = [Refused(status) for status in (400, 401, 403, 404, 413)] + [
    OfflineModeIsEnabled(), ValueError(), FileNotFoundError(), PermissionError(), ImportError(), KeyboardInterrupt()
]  # fmt: skip


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_what_may_pass_is_tried_again(error):
    assert retry.may_pass(error)


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_what_will_not_pass_is_not_tried_again(error):
    assert not retry.may_pass(error)


class Waits(threading.Event):
    """Notes what it is asked to wait."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def wait(self, timeout=None):
        self.waits.append(timeout)
        return False


def failing(*errors):
    left = list(errors)

    def function():
        if left:
            raise left.pop(0)
        return "done"

    return function


def test_the_waits_grow_and_the_last_error_is_raised():
    stop = Waits()
    assert retry.with_retries(failing(*[Refused(503)] * 3), "it", stop=stop) == "done"
    assert stop.waits == list(retry.RETRY_DELAYS_S) == sorted(retry.RETRY_DELAYS_S)
    with pytest.raises(Refused, match="status 503"):
        retry.with_retries(failing(*[Refused(503)] * 4), "it", stop=Waits())


def test_a_server_may_ask_for_a_longer_wait_but_not_for_any():
    date = email.utils.format_datetime(datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=100))
    for headers, least in (
        ({"Retry_After": "120"}, 120), ({"Retry_After": date}, 90), ({"RateLimit": '"api";r=0;t=55'}, 55)
    ):  # fmt: skip
        stop = Waits()
        assert retry.with_retries(failing(Refused(429, **headers)), "it", stop=stop) == "done"
        assert least <= stop.waits[0] <= 120
    for headers in ({"Retry_After": "soon"}, {"RateLimit": '"api";r=7;t=55'}, {}):
        assert retry.asked_wait_s(Refused(429, **headers)) == 0
    with pytest.raises(Refused):
        retry.with_retries(failing(Refused(429, Retry_After="86400")), "it", stop=Waits())
    stop = Waits()
    with pytest.raises(Refused):
        retry.with_retries(failing(*[Refused(429, Retry_After="200")] * 3), "it", stop=stop)
    assert stop.waits == [200]  # a second one would exceed the most that is waited in all


def test_a_run_that_is_about_to_end_waits_for_nothing():
    stop = threading.Event()
    stop.set()
    with pytest.raises(Refused):
        retry.with_retries(failing(Refused(503)), "it", stop=stop, delays_s=(10**6,))


def test_each_refusal_has_its_cure():
    for status, words in (
        (401, "hf auth login"),
        (403, "may not write to me/model"),
        (404, "hub_revision"),
        (429, "rate"),
    ):
        assert words in retry.cure_of(Refused(status), "me/model")
    assert "HF_HUB_OFFLINE" in retry.cure_of(OfflineModeIsEnabled(), "me/model")
    assert retry.cure_of(Refused(500), "me/model") == ""


def test_an_error_is_shown_in_one_line():
    assert retry.one_line(ValueError("a\n\nb")) == "ValueError: a b"
    assert len(retry.one_line(ValueError("x" * 1000))) < 320
