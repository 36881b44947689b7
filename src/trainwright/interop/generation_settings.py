"""Settings of generation: a `GenerationConfig` in any form, and the padding token of generated sequences.

Owns: reading a config and refusing one that cannot work; the order in which a pad token is looked up. Leaves to
others: generating (`seq2seq.py` of the package), the arguments (`args/seq2seq.py`).
"""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainwright.interop.optional import require
from trainwright.names import closest


def read_config(given: Any) -> Any:
    """A validated `GenerationConfig`: from one, from its settings as a dict or JSON text, from a directory or a JSON
    file, or from a model's name on the hub.

    Raises ValueError for an unknown setting, and for settings that `generate` could not use.
    """
    transformers = require("transformers", "generation_config", extra="transformers")
    if isinstance(given, str) and given.lstrip().startswith("{"):
        given = json.loads(given)
    if isinstance(given, transformers.GenerationConfig):
        config = copy.deepcopy(given)
    elif isinstance(given, Mapping):
        _check_names(given, transformers.GenerationConfig())
        config = transformers.GenerationConfig.from_dict(dict(given))
    else:
        path = Path(os.fspath(given))
        if path.is_file():
            config = transformers.GenerationConfig.from_pretrained(path.parent, config_file_name=path.name)
        else:  # a directory, or a name on the hub
            config = transformers.GenerationConfig.from_pretrained(os.fspath(given))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            try:
                config.validate(strict=True)
            except TypeError:  # releases before 4.56 have no `strict`
                config.validate()
        except ValueError as error:
            raise ValueError(f"generation_config={given!r} cannot be used: {error}") from error
    if caught:
        raise ValueError(f"generation_config={given!r} contradicts itself: {'; '.join(str(w.message) for w in caught)}")
    return config


def _check_names(given: Mapping[str, Any], config: Any) -> None:
    """Raise ValueError for unknown names, which `from_dict` would accept and `generate` ignore."""
    known = sorted({*vars(config), *config.to_dict(), "transformers_version", "return_dict_in_generate"})
    if unknown := [name for name in given if name not in known]:
        raise ValueError(
            f"generation_config={dict(given)!r} has {', '.join(map(repr, unknown))}, which "
            f"{'is no setting' if len(unknown) == 1 else 'are no settings'} of GenerationConfig."
            f"{closest(unknown[0], known)}"
        )


def padding_token(processing_class: object, model: object) -> int | None:
    """The token that rows are padded with: the pad token, or the end token where there is none, of the tokenizer, then
    those of the model. None where there is neither.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)  # that of a processor
    sources = ((tokenizer,), (getattr(model, "config", None), getattr(model, "generation_config", None)))
    for parts in sources:
        for name in ("pad_token_id", "eos_token_id"):
            for part in parts:
                token = getattr(part, name, None)
                if isinstance(token, (list, tuple)):  # several end tokens
                    token = token[0] if token else None
                if token is not None:
                    return int(token)
    return None
