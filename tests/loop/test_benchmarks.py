"""The benchmarks run: with toy sizes on this machine, so that a script is no dead code when a GPU is there."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark():
    """Import a script of benchmarks/ by its name."""
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module
    sys.path.remove(str(BENCHMARKS))


def test_the_gpu_rows_run_with_toy_sizes(benchmark, tmp_path, capsys):
    path = tmp_path / "rows.json"
    benchmark("gpu").main(["--tiny", "--rounds", "1", "--rows", "124m", "mfu", "sync", "stall", "--json", str(path)])
    found = {row["what"]: row["value"] for row in json.loads(path.read_text())["rows"]}
    assert float(found["trainwright / bare loop"]) > 0
    assert float(found["trainwright, mfu"]) > 0
    assert found["stall per checkpoint, sync"].endswith(" ms")
    assert "TOY SIZES" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would be measured here")
def test_without_a_gpu_every_row_is_not_measured(benchmark, tmp_path, capsys):
    gpu = benchmark("gpu")
    path = tmp_path / "rows.json"
    gpu.main(["--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == len(gpu.ROWS) and {row["value"] for row in rows} == {gpu.NOT_MEASURED}


def test_the_model_of_the_gpu_rows_has_the_size_it_is_named_after(benchmark):
    gpu = benchmark("gpu")
    with torch.device("meta"):
        sizes = {
            name: sum(parameter.numel() for parameter in gpu.Decoder(size).parameters())
            for name, size in {"124M": gpu.GPT_124M, "10M": gpu.GPT_10M, "1.2B": gpu.GPT_1B}.items()
        }
    assert {name: round(count / 1e6) for name, count in sizes.items()} == {"124M": 124, "10M": 11, "1.2B": 1320}


def test_what_log_lines_cost_a_save_is_measured(benchmark, capsys):
    benchmark("log_lines").main(["--lines", "5000", "--saves", "2"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| 1,000 |", "| 5,000 |"))]
    assert len(rows) == 2 and all(float(cell) > 0 for row in rows for cell in row.split("|")[2:5])


def test_memory_is_measured(benchmark, capsys):
    benchmark("memory").main(["--steps", "100", "--width", "64", "--only", "bare", "trainwright"])
    assert "| trainwright" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["bare loop", "bare loop, packed", "trainwright", "trainwright, packed"])
def test_the_contenders_of_fine_tuning_train_on_the_same_labels_to_the_same_loss(benchmark, name, tmp_path):
    fine_tuning = benchmark("fine_tuning")
    sizes = {"vocabulary": 64, "width": 32, "layers": 1, "num_train": 24, "num_eval": 8, "longest": 128, "mean": 40.0}
    work = dataclasses.replace(fine_tuning.PATH, **sizes)
    train, valid = (fine_tuning.samples(work, number, seed) for number, seed in ((24, 0), (8, 1)))
    untrained = fine_tuning.evaluated_by_hand(fine_tuning.model_of(work), fine_tuning.pad, valid, 8)
    contender = next(one for one in fine_tuning.CONTENDERS if one.name == name)
    found = contender.run(work, train, valid, str(tmp_path), fine_tuning.Meter())
    assert found["cpu_s"] > 0 and found["num_steps"] >= 1
    assert found["eval_loss"] == pytest.approx(untrained, rel=0.02)  # random tokens: there is little to learn
    assert list(tmp_path.iterdir())  # saved


def test_a_table_of_fine_tuning_compares_with_its_first_row(benchmark, monkeypatch, capsys):
    fine_tuning = benchmark("fine_tuning")
    costs = {"bare loop": 8.0, "bare loop, packed": 2.0}
    monkeypatch.setattr(
        fine_tuning,
        "measure",
        lambda work, name, package, *settings: {"cpu_s": costs[name], "peak_mib": 10 * costs[name], "labels": 160},
    )
    fine_tuning.main(["--work", "path", "--only", "bare"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| bare")]
    assert [row.split("|")[3:8] for row in rows] == [
        [" 8.00 ", " 20 ", " 1.00 ", " 80 ", " 1.00 "],
        [" 2.00 ", " 80 ", " 4.00 ", " 20 ", " 0.25 "],
    ]


def test_every_benchmark_is_found_and_says_what_it_measures(benchmark):
    found = benchmark("bench").benchmarks()
    assert {"step_overhead", "start", "memory", "gpu"} <= found.keys()
    assert not {"toy", "probes", "contenders", "bench", "compare_commits", "compared_runs"} & found.keys()
    assert all(len(text) > 20 for text in found.values())


def test_a_chosen_benchmark_is_run_with_its_own_arguments(benchmark, monkeypatch):
    bench, calls = benchmark("bench"), []
    monkeypatch.setattr(bench, "run", lambda name, arguments: calls.append((name, arguments)) or 0)
    assert bench.main(["gpu", "--rows", "124m"]) == 0
    assert bench.main(["start", "memory", "--quick"]) == 0
    assert calls == [("gpu", ["--rows", "124m"]), ("start", bench.QUICK["start"]), ("memory", bench.QUICK["memory"])]


def test_a_benchmark_that_fails_makes_the_whole_fail_after_the_others_have_run(benchmark, monkeypatch, capsys):
    bench, calls = benchmark("bench"), []
    monkeypatch.setattr(bench, "run", lambda name, arguments: calls.append(name) or int(name == "gpu"))
    assert bench.main([]) == 1
    assert calls == list(bench.benchmarks())
    assert "FAILED: gpu" in capsys.readouterr().err


def test_an_unknown_benchmark_is_an_error_that_lists_those_there_are(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark("bench").main(["steps"])
    assert "step_overhead" in capsys.readouterr().err


def test_what_a_save_and_a_resume_go_through_is_counted(benchmark, capsys):
    benchmark("structure").main(["--paths", "save"])
    output = capsys.readouterr().out
    assert " checkpoint/" in output and "_maybe_log_save_evaluate 1" in output
    rows = [line.strip("| ").split(" | ") for line in output.splitlines() if line.startswith("| this tree")]
    calls = {what: int(number) for _, what, number, *_ in rows}
    assert calls["a resume"] > calls["only a resume"] > 0 and calls["a save"] > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="shared memory is counted as Linux does")
def test_copies_of_the_state_are_measured_beside_those_of_torch(benchmark, capsys):
    sizes = ["--layers", "1", "--width", "64", "--vocabulary", "64", "--length", "8"]
    benchmark("checkpoint_stall").main(["--stagers", "--rounds", "1", *sizes])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if " DefaultStager" in line]
    num_tensors = int(rows[0][-2])  # torch's needs a descriptor for each
    assert len(rows) == 2 and num_tensors > 30
