"""A notebook with a training in it, executed cell by cell in a real kernel: what stands below each cell at the end."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

SHARED = Path(__file__).parents[1] / "shared"
PREPARE = f"""\
import sys
sys.path.insert(0, {str(SHARED)!r})
from line import LineData, LineModel
from trainwright import Trainer, TrainingArguments
args = TrainingArguments("out", max_steps=6, per_device_train_batch_size=4, eval_strategy="steps", eval_steps=3,
                         logging_steps=3, save_steps=3, report_to="none", use_cpu=True)
trainer = Trainer(LineModel(), args, train_dataset=LineData(), eval_dataset=LineData(8))"""
FAILS = """\
class Broken(LineModel):
    def forward(self, x, labels=None):
        if self.training and trainer.state.global_step == 2:
            raise RuntimeError("this model is broken")
        return super().forward(x, labels)
trainer = Trainer(Broken(), args, train_dataset=LineData(), eval_dataset=LineData(8))
trainer.train()"""
CELLS = {
    "prepare": PREPARE,
    "plan": "trainer.plan_report()",
    "train": "result = trainer.train()",
    "log": "trainer.state.log_history",
    "evaluate": "metrics = trainer.evaluate()",
    "predict": "output = trainer.predict(LineData(8))",
    "fails": FAILS,
    "after": "result = Trainer(LineModel(), args, train_dataset=LineData(), eval_dataset=LineData(8)).train()",
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Cell -> its outputs, as the page would show them; the cell "fails" is allowed to."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in CELLS.values()])
    notebook.cells[list(CELLS).index("fails")].metadata["tags"] = ["raises-exception"]
    folder = tmp_path_factory.mktemp("notebook")
    kernels = folder / "kernels" / "this"
    kernels.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernels / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "this", "language": "python"}))
    client = nbclient.NotebookClient(
        notebook, timeout=240, kernel_name="this", resources={"metadata": {"path": folder}}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(folder))
        client.execute()
    return {name: cell.outputs for name, cell in zip(CELLS, notebook.cells)}


def pages(outputs: list[dict[str, Any]]) -> list[str]:
    return [output["data"]["text/html"] for output in outputs if "text/html" in output.get("data", {})]


def text(outputs: list[dict[str, Any]]) -> str:
    return "".join(output.get("text", "") for output in outputs)


def rows(page: str) -> list[list[str]]:
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]


def test_a_training_leaves_one_table_with_a_row_for_each_evaluation(outputs: dict[str, list[dict[str, Any]]]) -> None:
    (page,) = pages(outputs["train"])
    header, *body = rows(page)
    assert header == ["Step", "Training Loss", "Validation Loss"]
    log = ast.literal_eval(outputs["log"][0]["data"]["text/plain"])
    losses = {line["step"]: line["loss"] for line in log if "loss" in line}
    evaluated = {line["step"]: line["eval_loss"] for line in log if "eval_loss" in line}
    assert body == [[str(step), f"{losses[step]:.6f}", f"{evaluated[step]:.6f}"] for step in (3, 6)]
    assert "[6/6" in page and "Epoch" in page


def test_no_bar_of_an_evaluation_is_left_and_no_raw_line_is_printed(outputs: dict[str, list[dict[str, Any]]]) -> None:
    (page,) = pages(outputs["train"])
    assert page.count("<progress") == 1
    assert "{" not in text(outputs["train"]) and "\r" not in text(outputs["train"])


@pytest.mark.parametrize(("cell", "name"), [("evaluate", "Evaluating"), ("predict", "Predicting")])
def test_an_evaluation_and_a_prediction_are_called_so(
    outputs: dict[str, list[dict[str, Any]]], cell: str, name: str
) -> None:
    (page,) = pages(outputs[cell])
    assert name in page and "[1/1" in page


def test_a_plan_at_the_end_of_a_cell_is_shown_whole(outputs: dict[str, list[dict[str, Any]]]) -> None:
    (shown,) = outputs["plan"]
    lines = shown["data"]["text/plain"].splitlines()
    assert any(line.split()[:1] == ["updates"] and " 6" in line for line in lines), lines


def test_an_error_ends_its_cell_at_the_step_it_came_to(outputs: dict[str, list[dict[str, Any]]]) -> None:
    (error,) = (output for output in outputs["fails"] if output["output_type"] == "error")
    assert error["evalue"].startswith("this model is broken")
    assert "[2/6" in pages(outputs["fails"])[-1]


def test_a_training_after_one_that_failed_has_a_table_of_its_own_steps(
    outputs: dict[str, list[dict[str, Any]]],
) -> None:
    (page,) = pages(outputs["after"])
    assert [row[0] for row in rows(page)] == ["Step", "3", "6"] and "[6/6" in page
