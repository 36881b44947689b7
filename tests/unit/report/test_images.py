"""Curves as image files."""

import os
import xml.etree.ElementTree as ElementTree

import pytest

from trainwright.cli import main
from trainwright.report import images
from trainwright.report.images import overview_image, panel_images, write_images

SVG = "{http://www.w3.org/2000/svg}"
HISTORY = [
    {"loss": 2.0, "learning_rate": 0.1, "step": 1},
    {"eval_loss": 1.5, "eval_f1": 0.5, "eval_runtime": 1.0, "step": 1},
    {"loss": 1.0, "learning_rate": 0.05, "step": 2},
    {"eval_loss": 1.25, "eval_f1": 0.75, "eval_runtime": 1.0, "step": 2},
]


def read(text):
    return ElementTree.fromstring(text.encode())


def test_each_panel_is_an_image_of_its_own_that_needs_nothing_from_outside():
    drawn = panel_images(HISTORY)
    assert list(drawn) == ["loss", "eval_f1", "learning_rate"]
    for text in drawn.values():
        root = read(text)
        assert root.tag == f"{SVG}svg" and float(root.get("width")) > 0 and float(root.get("height")) > 0
        assert "var(" not in text and "href" not in text and "<script" not in text


def test_the_key_has_the_colours_of_the_curves():
    root = read(panel_images(HISTORY)["loss"])
    lines = [line.get("stroke") for line in root.iter(f"{SVG}polyline")]
    keys = [rect.get("fill") for rect in root.iter(f"{SVG}rect") if rect.get("height") == "3"]
    assert len(lines) == 2 and keys == lines


def test_everything_is_inside_the_image():
    for text in (*panel_images(HISTORY).values(), overview_image(HISTORY)):
        root = read(text)
        width, height = float(root.get("width")), float(root.get("height"))
        for inner in root.iter(f"{SVG}svg"):
            assert float(inner.get("x", 0)) + float(inner.get("width")) <= width
            assert float(inner.get("y", 0)) + float(inner.get("height")) <= height


def test_an_overview_has_losses_and_metrics_but_not_the_schedule():
    labels = {element.text for element in read(overview_image(HISTORY)).iter(f"{SVG}text")}
    assert {"Loss", "F1"} <= labels and "Learning rate" not in labels
    assert overview_image([]) == overview_image([{"learning_rate": 0.1, "step": 1}]) == ""


@pytest.mark.parametrize(
    "name", ["<script>", "a/b", "../../up", "\x00\ud800", "a&b", "x" * 500, "", ".hidden", "$\\frac{$"]
)
def test_a_metric_of_any_name_is_a_file_in_the_directory_that_any_reader_opens(name, tmp_path):
    history = [{f"eval_{name}": 1.0, "step": 1}, {f"eval_{name}": 2.0, "eval_a": 1.0, "eval_a_": 2.0, "step": 2}]
    paths = [path for path in write_images(tmp_path / "images", history) if path.suffix == ".svg"]
    assert len(set(paths)) == 3 and sorted(os.listdir(tmp_path)) == ["images"]
    assert all(path.parent == tmp_path / "images" and not path.name.startswith(".") for path in paths)
    for path in paths:
        read(path.read_text())


def test_without_matplotlib_there_are_svg_files_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "is_installed", lambda module: False)
    assert [path.name for path in write_images(tmp_path, HISTORY)] == ["loss.svg", "eval_f1.svg", "learning_rate.svg"]


def test_with_matplotlib_a_png_has_all_of_them(tmp_path):
    pytest.importorskip("matplotlib")
    assert write_images(tmp_path, HISTORY)[-1].read_bytes().startswith(b"\x89PNG")


def test_the_report_writes_images_where_they_are_asked_for(make_trainer, tmp_path, capsys):
    make_trainer(max_steps=2, eval_strategy="steps", eval_steps=1).train()
    assert main(["report", str(tmp_path / "out"), "--images", str(tmp_path / "images")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert str(tmp_path / "images" / "loss.svg") in printed
    assert {"loss.svg", "learning_rate.svg", "grad_norm.svg"} <= set(os.listdir(tmp_path / "images"))
