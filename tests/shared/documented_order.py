"""The order of events as `callbacks/base.py` writes it, to hold runs against."""

import re

from trainwright.callbacks import base


def documented_events() -> list[str]:
    """The events of the loop above in the order in which they first occur."""
    return list(dict.fromkeys(re.findall(r"<(on_\w+)>", base.__doc__)))


def documented_order(heading: str, text: str = base.__doc__ or "") -> re.Pattern[str]:
    """The events that a part of the loop ("train", "evaluate", ...; `base.py` has it) may fire, as a pattern.

    It matches event names joined by one space, each followed by one: `"".join(f"{event} " for event in recorded)`.
    A line that starts with "for" repeats its block, with "if" makes it optional; a heading stands for its block.
    """
    lines = [(len(line) - len(line.lstrip()), line.strip()) for line in text.splitlines()]
    loop = [(indent, text) for indent, text in lines if indent >= 4 and text]

    def block_after(position: int) -> str:
        indent, pattern = loop[position][0], ""
        inside = position + 1
        while inside < len(loop) and loop[inside][0] > indent:
            if loop[inside][0] == indent + 4:
                pattern += pattern_of(inside)
            inside += 1
        return pattern

    def pattern_of(position: int) -> str:
        text = loop[position][1]
        if name := re.match(r"<(\w+)>", text):
            return name[1] + " "
        if text.endswith(":"):
            return f"(?:{block_after(position)}){'*' if text.startswith('for ') else '?'}"
        return block_after(headings[text]) if text in headings else ""

    headings = {text[:-1]: position for position, (indent, text) in enumerate(loop) if indent == 4}
    return re.compile(block_after(headings[heading]))
