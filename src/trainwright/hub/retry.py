"""Which errors of a push pass by themselves, how long to wait for that, and the cure of those that do not.

Owns: retries with backoff, and the words for a person. Leaves to others: the calls that fail (push). Errors are judged
by their HTTP status and their kind, so that every generation of `huggingface_hub` is understood without importing it.
"""

from __future__ import annotations

import email.utils
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# The newest `huggingface_hub` retries most requests itself, for some 20 s; older ones do not.
RETRY_DELAYS_S: Sequence[float] = (2, 8, 30)
LONGEST_WAIT_S = 300.0  # of all waits of one push; a server that limits the rate has a window of five minutes

# Statuses of what another moment may answer differently: timeouts, a commit of others in between, a rate limit.
_PASSING_STATUSES = frozenset((408, 409, 412, 423, 425, 429))
_PASSING_KINDS = ("ConnectionError", "ConnectError", "NetworkError", "Timeout", "TransportError", "ProtocolError")


class MissingToken(RuntimeError):
    """Nobody has logged in."""


# Without a status: what is wrong here, or with what was asked.
_LASTING = (
    MissingToken, ValueError, TypeError, AttributeError, ImportError, FileNotFoundError, PermissionError,
    NotADirectoryError,
)  # fmt: skip
_LASTING_KINDS = frozenset(("OfflineModeIsEnabled", "LocalTokenNotFoundError"))


class PushFailed(RuntimeError):
    """A push that somebody waits for failed; the message has the cause, its cure, and the command that pushes later."""


def status_of(error: BaseException) -> int | None:
    """The HTTP status that a server answered with; None where it gave no answer."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def may_pass(error: BaseException) -> bool:
    """Whether the same push may succeed a little later: an error of the server, a rate limit, a lost connection."""
    if not isinstance(error, Exception):
        return False
    status = status_of(error)
    if status is not None:
        return status >= 500 or status in _PASSING_STATUSES
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & _LASTING_KINDS:
        return False
    return any(kind.endswith(_PASSING_KINDS) for kind in kinds) or not isinstance(error, _LASTING)


def cure_of(error: BaseException, repo_id: str) -> str:
    """A sentence that says what a person can do about `error`, or "" where only waiting helps or nothing is known."""
    status, kind = status_of(error), type(error).__name__
    if status == 401 or kind == "LocalTokenNotFoundError":
        return "The token is missing, wrong or expired: run `hf auth login`, or set HF_TOKEN to one with write access."
    if status == 403:
        return f"The token may not write to {repo_id}: give it write access there, or use another one (HF_TOKEN)."
    if status == 404:
        return (
            f"This token sees no repository {repo_id}, or no such revision: check hub_model_id and hub_revision, or "
            f"run `hf repos create {repo_id}`."
        )
    if kind == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set: unset it, or leave push_to_hub out."
    if status == 429:
        return "The Hub limits the rate of requests: save less often, or push later."
    return ""


def with_retries(
    function: Callable[[], Result],
    what: str,
    *,
    stop: threading.Event | None = None,
    delays_s: Sequence[float] | None = None,
) -> Result:
    """`function()`, again after an error that may pass, after longer and longer waits; a server's Retry-After counts.

    what: words for the log. stop: once it is set, nothing is waited for and the error is raised. delays_s: of the
    waits, None for the usual ones.
    """
    stop, left_s = stop or threading.Event(), LONGEST_WAIT_S
    for delay_s in _then_none(RETRY_DELAYS_S if delays_s is None else delays_s):
        try:
            return function()
        except Exception as error:
            if delay_s is None or not may_pass(error):
                raise
            wait_s = max(delay_s, asked_wait_s(error))
            if wait_s > left_s or stop.is_set():
                raise
            left_s -= wait_s
            logger.info("%s failed (%s); again in %.0f s.", what, one_line(error), wait_s)
            if stop.wait(wait_s):
                raise
    raise AssertionError("the last attempt returns or raises")


def asked_wait_s(error: BaseException) -> float:
    """Seconds after which a server wants to be asked again, from its headers; 0 where it does not say."""
    headers: Any = getattr(getattr(error, "response", None), "headers", None) or {}
    text = str(headers.get("Retry-After") or "").strip()
    if text.isdecimal():
        return float(text)
    if text:
        try:
            return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
        except (ValueError, TypeError, OverflowError):
            return 0.0
    # RateLimit: "api";r=0;t=55
    found = re.search(r"\br=0\b.*\bt=(\d{1,6})\b", str(headers.get("RateLimit") or ""))
    return float(found[1]) if found and status_of(error) == 429 else 0.0


def one_line(error: BaseException) -> str:
    """The text of `error` in one line of at most 300 characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else f"{text[:300]}..."


def _then_none(delays_s: Sequence[float]) -> Iterator[float | None]:
    yield from delays_s
    yield None
