"""A directory is the key to where the files of its checkpoint go."""

import threading

import pytest
import torch

from trainwright.checkpoint import sink


class Noting:
    """A snapshot that copies nothing and remembers what was added."""

    def __init__(self):
        self.paths = []

    def add(self, kind, path, content, metadata=None):
        self.paths.append(str(path))
        return True


def test_files_of_two_checkpoints_that_are_saved_at_once_go_each_into_its_snapshot(tmp_path):
    names, snapshots = ("a", "b"), {name: Noting() for name in "ab"}
    both_are_open = threading.Barrier(2)

    def save(name):
        with sink.opened(str(tmp_path / name), sink.Sink(snapshots[name])):
            both_are_open.wait()
            sink.write("json", tmp_path / name / "state.json", {})
            sink.write("json", tmp_path / name / "inner" / "state.json", {})
            both_are_open.wait()

    threads = [threading.Thread(target=save, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in names:
        folder = tmp_path / name
        assert snapshots[name].paths == [str(folder / "state.json"), str(folder / "inner" / "state.json")]


def test_a_file_of_another_directory_is_written_now(tmp_path):
    staging, others = tmp_path / "staging", [tmp_path / "staging-2", tmp_path / "elsewhere"]
    snapshot = Noting()
    with sink.opened(str(staging), sink.Sink(snapshot)):
        for folder in others:
            folder.mkdir()
            assert sink.write("json", folder / "state.json", {})
    assert snapshot.paths == [] and all((folder / "state.json").exists() for folder in others)


def test_when_the_save_is_over_the_directory_is_like_every_other(tmp_path):
    with pytest.raises(ZeroDivisionError), sink.opened(str(tmp_path), sink.Sink(Noting())):
        raise ZeroDivisionError
    assert sink.write("json", tmp_path / "state.json", {"a": 1})
    assert (tmp_path / "state.json").read_text() == '{\n  "a": 1\n}\n'


def test_within_an_override_files_are_whole_when_the_call_returns(tmp_path):
    snapshot = Noting()
    with sink.opened(str(tmp_path), sink.Sink(snapshot)):
        with sink.of(tmp_path).immediate():
            sink.write("torch", tmp_path / "now.pt", {"a": torch.ones(2)})
            assert torch.load(tmp_path / "now.pt")["a"].tolist() == [1.0, 1.0]
        sink.write("torch", tmp_path / "later.pt", {})
    assert snapshot.paths == [str(tmp_path / "later.pt")] and not (tmp_path / "later.pt").exists()
