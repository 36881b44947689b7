"""The self-contained report page."""

import re
from html.parser import HTMLParser
from pathlib import Path

from trainwright.report.html import MAX_ROWS, write_report

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
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.closed.append(tag)


def cells(page: str) -> list[list[str]]:
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]


def test_the_page_is_well_formed_and_needs_nothing_from_outside(tmp_path: Path) -> None:
    path = write_report(tmp_path / "out", HISTORY, {"title": "a & b", "updates": 1000})
    assert path == tmp_path / "out" / "training_report.html"
    page = path.read_text(encoding="utf-8")
    balance = Balance()
    balance.feed(page)
    assert balance.open == [] and balance.closed.count("svg") == 2
    assert not re.search(r"https?:|<script|<link|<img|@import|url\(", page)


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
