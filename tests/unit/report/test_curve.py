"""The PNG of a log history."""

import subprocess
import sys
from pathlib import Path

import pytest

from trainwright.report.curve import plot_history

HISTORY = [{"loss": 2.0 / step, "learning_rate": 1e-3 / step, "step": step} for step in range(1, 6)]


def size_of(png: Path) -> tuple[int, int]:
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_the_figure_is_a_png_that_grows_with_its_panels(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    one = plot_history([{"loss": 1.0, "step": 1}, {"loss": 0.5, "step": 2}], tmp_path / "sub" / "one.png")
    two = plot_history(HISTORY, str(tmp_path / "two.png"), title="a run")
    three = plot_history([*HISTORY, {"eval_f1": 0.5, "step": 5}], tmp_path / "three.png")
    assert one == tmp_path / "sub" / "one.png"
    assert size_of(two)[0] == 2 * size_of(one)[0] and size_of(two)[1] == size_of(one)[1]
    assert size_of(three)[1] == 2 * size_of(two)[1]


def test_the_figure_draws_where_the_values_are(tmp_path: Path) -> None:
    matplotlib_image = pytest.importorskip("matplotlib.image")
    falling = [{"loss": 10.0 - step, "step": step} for step in range(10)]
    picture = matplotlib_image.imread(plot_history(falling, tmp_path / "falling.png"))  # (height, width, 4)
    blue = (picture[..., 2] - picture[..., 0]) > 0.3  # (height, width)
    rows = [column.nonzero()[0].mean() for column in blue.T if column.any()]
    assert rows[0] < rows[len(rows) // 2] < rows[-1]  # from the upper left to the lower right


def test_a_history_without_anything_to_draw_is_an_error_that_says_what_to_pass(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing to draw.*trainer\.state\.log_history"):
        plot_history([{"train_runtime": 3.0, "step": 1}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_drawing_leaves_the_global_state_of_matplotlib_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    code = (
        "import sys; from trainwright.report.curve import plot_history; assert 'matplotlib' not in sys.modules;"
        f"plot_history({HISTORY!r}, {str(tmp_path / 'x.png')!r}); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
