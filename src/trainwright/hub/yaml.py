"""Write YAML for the header of a model card.

Owns: mappings, lists and scalars as text. Leaves to others: reading YAML, and the content of the header.
The card needs no more, so it needs no library.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

_NOT_IN_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")


def to_yaml(value: Any, indent: int = 0) -> str:
    """Mappings, lists and scalars as YAML, in the order given.

    >>> print(to_yaml({"tags": ["a", "yes"], "model-index": [{"name": "m", "value": 0.5}]}))
    tags:
    - a
    - "yes"
    model-index:
    - name: m
      value: 0.5
    """
    pad = " " * indent
    lines = []
    for key, item in value.items():
        name = _yaml_scalar(key)
        if isinstance(item, Mapping) and item:
            lines.append(f"{pad}{name}:\n{to_yaml(item, indent + 2)}")
        elif isinstance(item, (list, tuple)) and item:
            lines.append(f"{pad}{name}:")
            for element in item:
                nested = isinstance(element, Mapping) and element
                body = to_yaml(element, indent + 2).lstrip() if nested else _yaml_scalar(element)
                lines.append(f"{pad}- {body}")
        else:
            lines.append(f"{pad}{name}: {_yaml_scalar(item)}")
    return "\n".join(lines)


def _yaml_scalar(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else (".inf" if value > 0 else "-.inf")
    if value is None or isinstance(value, (bool, int, float)) or value in ([], {}, ()):
        # JSON writes 1e-05, which YAML 1.1 reads as text; with a fraction it is a number.
        text = json.dumps(value)
        return text.replace("e", ".0e", 1) if re.fullmatch(r"-?\d+e[-+]\d+", text) else text
    text = str(value)
    plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9_./ -]*[A-Za-z0-9_]|[A-Za-z]", text)
    reserved = text.lower() in {"true", "false", "yes", "no", "on", "off", "null", "none", "y", "n", "nan", "inf"}
    # A JSON string is a YAML string in double quotes, but for characters that YAML does not print or takes for a line's
    # end.
    return (
        text
        if plain and not reserved
        else _NOT_IN_YAML.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(text, ensure_ascii=False))
    )
