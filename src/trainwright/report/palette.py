"""The colours of curves and of the pieces of a bar.

Owns: which colour a number has, on a light and on a dark page, so that a curve, its key and a piece of a bar are the
same. Leaves to others: what is drawn in it. Imports nothing outside the standard library.
"""

from __future__ import annotations

# Distinct for colour-blind readers, too; the first six were chosen for that, the others for runs with many phases.
LIGHT = (
    "#2b6cb0", "#dd6b20", "#2f855a", "#b83280", "#6b46c1", "#b7791f",
    "#0e7490", "#c53030", "#4d7c0f", "#1e3a8a", "#78716c", "#9d174d",
)  # fmt: skip
DARK = (
    "#63b3ed", "#f6ad55", "#68d391", "#f687b3", "#b794f4", "#f6e05e",
    "#67e8f9", "#fc8181", "#bef264", "#93c5fd", "#d6d3d1", "#fda4af",
)  # fmt: skip


def color_of(index: int) -> str:
    """The CSS colour of the curve, or piece of a bar, with this number.

    >>> color_of(0), color_of(12)
    ('var(--c0)', 'var(--c0)')
    """
    return f"var(--c{index % len(LIGHT)})"


def variables(colors: tuple[str, ...]) -> str:
    """
    >>> variables(("#000000", "#ffffff"))
    '--c0: #000000; --c1: #ffffff;'
    """
    return " ".join(f"--c{index}: {color};" for index, color in enumerate(colors))
