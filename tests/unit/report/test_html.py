"""The self-contained report page."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from trainwright.report.html import MAX_ROWS, write_report, write_run_report
from trainwright.report.page import json_in_html

HISTORY = [
    {"loss": 2.0, "epoch": 0.5, "step": 1},
    {"eval_loss": 1.5, "eval_f1": 0.25, "eval_runtime": 3.0, "epoch": 0.5, "step": 1},
    {"loss": 1.0, "epoch": 1.0, "step": 1000},
    {"eval_loss": 1.25, "epoch": 1.0, "step": 1000},
]


class Balance(HTMLParser):
    """Fails on a tag that is closed in the wrong place."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.closed: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.closed.append(tag)


def cells(page: str) -> list[list[str]]:
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr[^>]*>(.*?)</tr>", page)]


def test_the_page_is_well_formed_and_needs_nothing_from_outside(tmp_path: Path) -> None:
    path = write_report(tmp_path / "out", HISTORY, {"title": "a & b", "updates": 1000})
    assert path == tmp_path / "out" / "training_report.html"
    page = path.read_text(encoding="utf-8")
    balance = Balance()
    balance.feed(page)
    assert balance.open == [] and balance.closed.count("svg") == 2
    assert not re.search(r"<link|<img|<iframe|@import|url\(| src=| href=", page)
    policy = re.findall(r'Security-Policy" content="(.*?)"', page)[0]
    assert "default-src 'none'" in policy and "connect-src" not in policy and "http" not in policy


def test_only_the_scripts_of_the_page_may_run(tmp_path: Path) -> None:
    page = write_report(tmp_path, HISTORY, {}).read_text(encoding="utf-8")
    allowed = re.findall(r"'sha256-(.*?)'", page.partition("</head>")[0])
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 2 and "uPlot" in scripts[0]
    assert allowed == [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in scripts]
    assert re.findall(r"script-src ([^;\"]*)", page)[0].split() == [f"'sha256-{one}'" for one in allowed]


def test_the_summary_is_shown_in_order_with_readable_numbers_and_escaped_texts(tmp_path: Path) -> None:
    page = write_report(
        tmp_path, HISTORY, {"title": "<run>", "updates": 12800, "note": "<b>", "best": 0.123456}
    ).read_text()
    assert re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page) == [
        ("updates", "12,800"),
        ("note", "&lt;b&gt;"),
        ("best", "0.1235"),
    ]
    assert "<h1>&lt;run&gt;</h1>" in page


def test_each_evaluated_step_has_a_row_with_its_metrics(tmp_path: Path) -> None:
    assert cells(write_report(tmp_path, HISTORY, {}).read_text()) == [
        ["Step", "Epoch", "Validation loss", "F1"],
        ["1", "0.5", "1.5", "0.25"],
        ["1,000", "1", "1.25", ""],
    ]


def test_several_datasets_of_a_step_share_its_row(tmp_path: Path) -> None:
    history = [{"eval_a_loss": 1.0, "step": 3}, {"eval_b_loss": 2.0, "step": 3}]
    assert cells(write_report(tmp_path, history, {}).read_text())[1:] == [["3", "", "1", "2"]]


def test_a_long_run_shows_its_last_evaluations_and_says_so(tmp_path: Path) -> None:
    history = [{"eval_loss": 1.0, "step": step} for step in range(MAX_ROWS + 5)]
    page = write_report(tmp_path, history, {}).read_text()
    assert len(cells(page)) == MAX_ROWS + 1 and cells(page)[1][0] == "5"
    assert f"The last {MAX_ROWS} of {MAX_ROWS + 5}." in page


def test_a_run_that_logged_nothing_still_has_a_report(tmp_path: Path) -> None:
    page = write_report(tmp_path, [], {"updates": 0}).read_text()
    assert "Nothing was logged." in page and "No evaluation was run." in page


# -- of a whole run ----------------------------------------------------------------------------------------------------

EVIL = "</script><script>alert('x')</script><!--"
ABOUT = {
    "name": f"a run {EVIL}",
    "started": 1000.0,
    "max_steps": 40,
    "model": "Linear",
    "num_parameters": 1200,
    "num_trainable_parameters": 200,
    "device": "a device",
    "num_processes": 2,
    "seed": 7,
    "metric": "f1",
    "greater_is_better": True,
    "versions": {"torch": "9.9"},
    "settings": {"learning_rate": 0.125, "optim": "sgd"},
}


def run_in(folder: Path, *lines: dict[str, Any], about: Any = ABOUT, warnings: tuple[str, ...] = ()) -> Path:
    folder.mkdir(exist_ok=True)
    written: list[dict[str, Any]] = [{"run_id": "a", "time": 1000.0 + line["step"], **line} for line in lines]
    written[0].update({"about_run": about, "run_warnings": list(warnings)})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    return folder


SCORES = [
    {"step": 10, "epoch": 1.0, "loss": 2.0, "eval_loss": 1.0, "eval_f1": 0.25},
    {"step": 20, "epoch": 2.0, "loss": 1.0, "eval_loss": 0.5, "eval_f1": 0.75},
    {"step": 30, "epoch": 3.0, "loss": 0.5, "eval_loss": 0.25, "eval_f1": 0.5},
]


def numbers(page: str) -> dict[str, str]:
    return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))


def data_of(page: str) -> list[dict[str, Any]]:
    """What the script is given."""
    found: list[dict[str, Any]] = json.loads(
        re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)[0]
    )
    return found


def test_the_page_says_what_the_run_is(tmp_path: Path) -> None:
    page = write_run_report(run_in(tmp_path / "out", *SCORES)).read_text()
    shown = numbers(page)
    assert shown["steps"] == "30 of 40" and shown["duration"] == "30 s" and shown["seed"] == "7"
    assert shown["device"] == "2 x a device" and shown["model"] == "Linear"
    assert shown["parameters"] == "1,200, of which 200 are trained"
    assert [row for row in cells(page) if row[0] in ABOUT["settings"]] == [["learning_rate", "0.125"], ["optim", "sgd"]]
    assert ["torch", "9.9"] in cells(page) and "1970-01-01 00:16:40 UTC" in page


def test_the_best_value_is_that_of_the_metric_of_the_run_and_marked_in_number_table_and_curve(tmp_path: Path) -> None:
    page = write_run_report(run_in(tmp_path / "out", *SCORES)).read_text()
    assert numbers(page)["best F1"] == "0.75 at step 20"
    marked = re.findall(r'<tr class="best">(.*?)</tr>', page)
    assert len(marked) == 1 and "<td>20</td>" in marked[0]
    assert re.findall(r"best: [\d.]+ at step \d+", page) == ["best: 0.75 at step 20"]
    best = [panel["best"] for panel in data_of(page) if "best" in panel]
    assert [(one["step"], one["value"]) for one in best] == [(20, 0.75)]


def test_without_a_metric_the_best_is_the_lowest_validation_loss(tmp_path: Path) -> None:
    about = {**ABOUT, "metric": None, "greater_is_better": None}
    page = write_run_report(run_in(tmp_path / "out", *SCORES, about=about)).read_text()
    assert numbers(page)["best validation loss"] == "0.25 at step 30"


def test_texts_of_a_run_are_texts_everywhere(tmp_path: Path) -> None:
    lines = [{**SCORES[0], f"eval_{EVIL}": 0.5, f"eval_{EVIL}_loss": 0.25}, *SCORES[1:]]
    page = write_run_report(run_in(tmp_path / "out", *lines, warnings=(f"careful {EVIL}",))).read_text()
    balance = Balance()
    balance.feed(page)
    assert balance.open == [] and balance.closed.count("script") == 3
    assert "<script>alert" not in page and "<!--" not in page
    names = {curve["name"] for panel in data_of(page) for curve in panel["curves"]}
    assert any(EVIL in name for name in names)


def test_json_in_a_script_element_is_read_back_as_it_was() -> None:
    value = {"a": [EVIL, "\u2028", "\ud800", "&amp;"], "b": 0.5}
    assert json.loads(json_in_html(value)) == value and not set("<>&") & set(json_in_html(value))


def test_warnings_of_the_run_are_on_its_page_each_once(tmp_path: Path) -> None:
    lines = [SCORES[0], {**SCORES[1], "run_warnings": ["second", "first"]}]
    page = write_run_report(run_in(tmp_path / "out", *lines, warnings=("first",))).read_text()
    assert re.findall(r"<li>(.*?)</li>", page) == ["first", "second"] and "2 warnings of this run" in page
    assert "of this run</summary>" not in write_run_report(run_in(tmp_path / "other", *SCORES)).read_text()


def test_the_keys_have_the_colours_of_the_curves_and_do_not_break_from_their_names(tmp_path: Path) -> None:
    page = write_run_report(run_in(tmp_path / "out", *SCORES)).read_text()
    figure = page.partition('<figure data-panel="0">')[2].partition("</figure>")[0]
    keys, curves = re.findall(r'--c: (.*?)"', figure), re.findall(r'<polyline [^>]*stroke="(.*?)"', figure)
    assert keys == curves == [f"var(--c{curve['color']})" for curve in data_of(page)[0]["curves"]]
    assert len(set(keys)) == 2 and re.search(r"\.key \{[^}]*white-space: nowrap", page)


def test_a_run_that_is_under_way_says_so_and_one_that_ended_too(tmp_path: Path) -> None:
    out = run_in(tmp_path / "out", *SCORES)
    assert ", running," in write_run_report(out, is_running=True).read_text()
    assert "has not reached its end" in write_run_report(out).read_text()
    end = {"step": 30, "train_runtime": 12.0, "train_samples_per_second": 8.0}
    page = write_run_report(run_in(out, *SCORES, end)).read_text()
    assert ", finished," in page and numbers(page)["duration"] == "12 s"
    assert numbers(page)["throughput"] == "8 samples/s"


def test_a_long_curve_is_given_to_the_script_with_its_extremes_and_not_all_of_its_points(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 9.0 if step == 4321 else 1.0} for step in range(1, 10_000)]
    curve = data_of(write_run_report(run_in(tmp_path / "out", *lines)).read_text())[0]["curves"][0]
    assert len(curve["steps"]) < 2000 and curve["values"][curve["steps"].index(4321)] == 9.0
