"""A run while it lasts, in a browser and in the terminal."""

import http.client
import io
import json
import threading

import pytest

from trainwright.cli import main
from trainwright.report.history import Curve
from trainwright.report.terminal import BLANK, plot
from trainwright.report.watch import WatchServer, watch_in_terminal


def log(folder, *lines):
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps({"run_id": "a", **line}) + "\n" for line in lines)


@pytest.fixture
def out(tmp_path):
    log(tmp_path, {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "eval_loss": 0.5})
    return tmp_path


@pytest.fixture
def server(out):
    with WatchServer(str(out)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server, path, host=None, method="GET"):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request(method, path, headers={"Host": host or f"127.0.0.1:{server.server_port}"})
    answer = connection.getresponse()
    found = answer.status, answer.read().decode(), dict(answer.getheaders())
    connection.close()
    return found


def test_the_page_is_served_on_the_loopback_address_only(server):
    assert server.server_address[0] == "127.0.0.1"
    status, text, headers = get(server, "/")
    assert status == 200 and "Training loss" in text and 'data-watch="yes"' in text
    assert headers["Cache-Control"] == "no-store" and "connect-src 'self'" in text


def test_a_new_line_changes_the_state_and_the_page(server, out):
    before = get(server, "/state")[1]
    assert get(server, "/state")[1] == before
    log(out, {"step": 3, "loss": 0.123})
    assert get(server, "/state")[1] != before and "0.123 at step 3" in get(server, "/")[1]


@pytest.mark.parametrize("path", ["/metrics.jsonl", "/../metrics.jsonl", "/checkpoint-1/", "/state/", "/?a", "/%2e"])
def test_nothing_else_is_served(server, path):
    status, text, _ = get(server, path)
    assert status == 404 and "loss" not in text


def test_another_name_of_this_machine_gets_nothing_and_neither_does_a_write(server):
    assert get(server, "/", host="evil.example")[0] == 404
    assert get(server, "/", host=f"localhost:{server.server_port}")[0] == 200
    assert get(server, "/", method="POST")[0] == 501


def test_a_run_that_has_not_logged_yet_has_a_page(tmp_path):
    with WatchServer(str(tmp_path)) as server:
        assert "Nothing was logged." in server.answer("/")[1] and server.answer("/state")[1].startswith("0")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_terminal_is_drawn_again_until_the_run_ends(out, monkeypatch):
    def sleep(seconds):
        log(out, {"step": 3, "loss": 0.25} if not naps else {"step": 3, "train_runtime": 1.0})
        naps.append(seconds)

    naps, stream = [], Terminal()
    monkeypatch.setattr("trainwright.report.watch.time.sleep", sleep)
    watch_in_terminal(str(out), stream)
    screens = stream.getvalue().split("\x1b[H\x1b[2J")[1:]
    assert len(naps) == 2 and len(screens) == 3
    assert "Training loss: 1\n" in screens[0] and "Training loss: 0.25\n" in screens[1] and "step 3" in screens[1]


def test_without_a_terminal_it_is_drawn_once_without_control_characters(out, capsys):
    assert main(["watch", str(out), "--terminal"]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "Validation loss: 0.5 (best 0.5 at step 2)" in printed
    assert all(len(line) <= 80 for line in printed.splitlines())


def num_dots(lines):
    return [sum(bin(ord(cell) - BLANK).count("1") for cell in line if ord(cell) >= BLANK) for line in lines]


def test_a_curve_that_falls_goes_from_the_upper_left_to_the_lower_right():
    *rows, steps = plot(Curve("loss", [0, 10], [8.0, 2.0]), 0, 10, 40, 5)
    assert rows[0].split("|")[0].strip() == "8" and rows[-1].split("|")[0].strip() == "2"
    assert steps.split() == ["0", "step", "10"] and max(map(len, [*rows, steps])) <= 40
    places = [[i for i, cell in enumerate(row) if ord(cell) > BLANK] for row in rows]
    assert all(places) and [min(row) for row in places] == sorted(min(row) for row in places)
    assert min(num_dots(rows)) > 0


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0], [0.0, 1e300], [-1e-9, 1e-9]])
def test_any_values_can_be_drawn(values):
    rows = plot(Curve("loss", list(range(1, len(values) + 1)), values), 1, len(values), 30, 4)
    assert len(rows) == 5 and sum(num_dots(rows)) > 0
