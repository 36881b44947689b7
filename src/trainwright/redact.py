"""Redaction of secrets: values of arguments named like secrets, and passwords inside URLs.

Owns: which names are secrets, and the placeholder written in place of a value. Leaves to others: where values are
written (`training.py`, `checkpoint/save.py`, the trackers). Standard library only.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

_SECRET = re.compile(
    r"(^|_)(token|passwd|pwd|passphrase)$|api_?key|access_?key|private_?key|password|secret|credential", re.IGNORECASE
)
# Special tokens of a tokenizer, which are not secrets in a dict of options.
_SPECIAL_TOKEN = re.compile(r"^(eos|bos|pad|unk|sep|cls|mask|image|video|audio|boi|eoi|start|end|decoder_start)_token$")
_STARS = "***"
# "user:password@" up to the last "@" before the path, since a password may hold one; a token in place of the user of a
# web address; values of a query that are named like secrets.
_WITH_PASSWORD = re.compile(r"(://[^\s/?#:@]*:)[^\s/?#]*@")
_TOKEN_AS_USER = re.compile(r"(\bhttps?://)[^\s/?#:@]+@", re.IGNORECASE)
_IN_QUERY = re.compile(r"([?&][\w.-]*(?:token|key|passw(?:or)?d|secret|signature|sig)=)[^&\s#]+", re.IGNORECASE)


@functools.lru_cache(maxsize=4096)
def is_secret(name: str) -> bool:
    """Whether an argument of this name holds a secret.

    >>> [is_secret(name) for name in ("hub_token", "my_api_key", "db_password", "include_tokens", "learning_rate")]
    [True, True, True, False, False]
    """
    return _SECRET.search(name) is not None


def placeholder(name: str) -> str:
    """What serialised forms hold in place of the secret `name`."""
    return f"<{name.upper()}>"


def is_hidden(name: str, value: Any) -> bool:
    """Whether `value` is the placeholder of the secret `name`, read back from a serialised form."""
    return isinstance(value, str) and value == placeholder(name) and is_secret(name)


def without_passwords(text: str) -> str:
    """`text` with the passwords of its URLs replaced by stars.

    >>> without_passwords("postgres://me:hidden@db/runs"), without_passwords("see http://host:80/path")
    ('postgres://me:***@db/runs', 'see http://host:80/path')
    """
    if "://" not in text:
        return text
    text = _WITH_PASSWORD.sub(rf"\1{_STARS}@", text)
    return _IN_QUERY.sub(rf"\1{_STARS}", _TOKEN_AS_USER.sub(rf"\1{_STARS}@", text))


def masked(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `values` without secrets, also inside dicts and lists. None and booleans are unchanged, except that a
    documented token always reads as its placeholder.
    """
    return {name: placeholder(name) if name.endswith("_token") else _masked(name, v) for name, v in values.items()}


def _masked(name: Any, value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(name, str) and is_secret(name) and not _SPECIAL_TOKEN.match(name):
        return placeholder(name)
    if type(value) is str:
        return without_passwords(value)
    if type(value) is dict:
        return {key: _masked(key, item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_masked(None, item) for item in value)
    return value


def forget_secrets(attributes: dict[str, Any]) -> None:
    """Redact secrets among the attributes of an object that is about to be pickled: None, or as `masked` does."""
    for name, value in attributes.items():
        if value is not None and not isinstance(value, bool) and is_secret(name):
            attributes[name] = None
        elif type(value) in (str, dict, list, tuple):
            attributes[name] = _masked(name, value)
