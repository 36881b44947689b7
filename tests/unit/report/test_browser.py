"""The report in a real browser: that its script draws, shows values, and follows colour scheme and width.

Needs Chromium, and is skipped without it; what a page holds is tested without one (`test_html.py`).
"""

import html
import json
import re
import shutil
import subprocess

import pytest

from trainwright.report.html import write_run_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

LINES = [
    {"step": step, "time": 1000.0 + step, "run_id": "a", "loss": 100.0 / step, "eval_loss": 3.0 + abs(step - 30) / 10}
    for step in range(10, 60, 10)
]

# What a reader would see, found by a script that is added to the page: pointer events are those that a mouse sends.
LOOK = """
const said = [];
addEventListener("error", event => said.push(event.message));
addEventListener("load", () => setTimeout(() => {
  const over = document.querySelector(".u-over"), place = over.getBoundingClientRect();
  const legend = () => Array.from(document.querySelector(".u-legend").rows)
    .map(row => Array.from(row.cells).map(cell => cell.innerText.trim()).join(" ")).join("; ");
  const point = share => {
    const at = { bubbles: true, clientX: place.left + share * place.width, clientY: place.top + place.height / 2 };
    over.dispatchEvent(new MouseEvent("mouseenter", at));
    over.dispatchEvent(new MouseEvent("mousemove", at));
  };
  const colors = () => Array.from(document.querySelectorAll(".u-legend .u-marker"))
    .slice(0, 3).map(one => getComputedStyle(one).backgroundColor);
  const found = { idle: legend(), width: document.documentElement.scrollWidth, of: innerWidth,
    paper: getComputedStyle(document.body).backgroundColor, colors: colors(),
    stills: Array.from(document.querySelectorAll(".still")).filter(one => one.offsetHeight).length };
  point(0.5);
  setTimeout(() => {
    found.hovered = legend();
    const slider = document.getElementById("smoothing");
    slider.value = "0.5";
    slider.dispatchEvent(new Event("input"));
    document.getElementById("log").click();
    setTimeout(() => {
      found.smoothed = legend();
      found.said = said;
      const text = document.createElement("pre");
      text.id = "found";
      text.textContent = JSON.stringify(found);
      document.body.append(text);
    }, 100);
  }, 100);
}, 100));
"""


def look(folder, *flags, width=None):
    """What LOOK found on the page of a run, whose window is `width` pixels wide."""
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    page = write_run_report(folder).read_text()
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)  # which lets no other script run
    page = page.replace("</head>", f"<script>{LOOK}</script></head>")
    if width is not None:  # a window has a least width, a frame has none
        page = (
            f'<body style="margin: 0"><iframe width="{width}" height="800" style="border: 0" '
            f'srcdoc="{html.escape(page)}"></iframe><script>setInterval(() => {{ '
            'const text = document.querySelector("iframe").contentDocument.getElementById("found"); '
            "if (text && !document.getElementById('found')) document.body.append(text.cloneNode(true)); }, 50)"
            "</script></body>"
        )
    (folder / "page.html").write_text(page)
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom")
    place = (f"--user-data-dir={folder / 'profile'}", (folder / "page.html").as_uri())
    done = subprocess.run([CHROMIUM, *options, *flags, *place], capture_output=True, text=True, timeout=120)
    found = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[0]))


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return look(tmp_path_factory.mktemp("light"))


def test_the_charts_replace_the_drawings_and_no_script_fails(seen):
    assert seen["said"] == [] and seen["stills"] == 0


def test_the_legend_shows_the_last_values_and_under_the_pointer_those_of_the_step(seen):
    assert "step 50" in seen["idle"] and "Training loss 2" in seen["idle"] and "Validation loss 5" in seen["idle"]
    assert "step 30" in seen["hovered"] and "Training loss 3.3333" in seen["hovered"]
    assert "Validation loss 3" in seen["hovered"]


def test_smoothing_shows_the_measured_value_and_the_mean(seen):
    mean = share = 0.0
    for line in LINES:
        mean, share = 0.5 * mean + 0.5 * line["loss"], 0.5 * share + 0.5
    assert f"Training loss 2 (smoothed {mean / share:.5g})" in seen["smoothed"]


def test_the_page_is_dark_where_that_is_asked_for(seen, tmp_path):
    dark = look(tmp_path / "dark", "--blink-settings=preferredColorScheme=0")
    assert dark["said"] == []

    def light_of(color):
        return sum(map(int, re.findall(r"\d+", color)[:3]))

    assert light_of(dark["paper"]) < 150 < 600 < light_of(seen["paper"])
    assert all(one != other for one, other in zip(dark["colors"][1:], seen["colors"][1:]))


def test_on_a_phone_nothing_is_wider_than_the_screen(tmp_path):
    phone = look(tmp_path / "phone", width=390)
    assert phone["said"] == [] and phone["of"] == 390 and phone["width"] <= 390
