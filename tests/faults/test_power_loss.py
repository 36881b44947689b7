"""After a power cut only what the disk has confirmed is certain. What is not may be there, in part, or not at all.

One run is watched at each of its file-system calls. The model of the disk: the bytes of a file are those of its last
fsync; the names in a directory are those of its last fsync. Three kinds of cut are rebuilt for each call: everything
unconfirmed is lost; all names are there but unconfirmed bytes are not (files of zero bytes, as journals leave them);
and for each directory at random the one or the other.
"""

import os
import random
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

sys.path.insert(0, os.path.dirname(__file__))

from runs import FrozenLine, complete_steps, difference, end_of, make_run, resume_or_start, watch_files

from trainwright.checkpoint import frozen
from trainwright.checkpoint.load import find_resumable
from trainwright.checkpoint.manifest import problems


@dataclass
class Node:
    """A file or a directory, whatever it is called now, and what the disk has confirmed of it."""

    is_directory: bool
    content: bytes = b""
    names: dict = field(default_factory=dict)  # name -> Node


class Disk:
    """Follows the calls of one process under `root`, whose own name is durable from the start."""

    def __init__(self, root):
        self.root, self.nodes = os.path.realpath(root), {}
        self.cuts = []  # after each call, the trees that a power cut may leave
        self.top = self.node(self.root)
        self.random = random.Random(0)

    def node(self, path):
        status = os.lstat(path)
        return self.nodes.setdefault(status.st_ino, Node(os.path.isdir(path)))

    def on_call(self, kind, path, tear):
        """Called before a call is made: first the trees of a cut at this moment, then what the call will confirm."""
        path = os.path.realpath(path)
        if not path.startswith(self.root) or tear is not None:
            return
        live = self.live(self.root)
        self.cuts.append((f"before {kind} of {os.path.basename(path)}", *self.trees(live)))
        if kind == "fsync":
            node = self.node(path)
            if node.is_directory:
                node.names = {entry.name: self.node(entry.path) for entry in os.scandir(path)}
            else:
                node.content = Path(path).read_bytes()
        elif kind in ("unlink", "remove", "rmdir", "rename", "replace") and os.path.lexists(path):
            status = os.lstat(path)
            if os.path.isdir(path) or status.st_nlink == 1:
                self.nodes.pop(status.st_ino, None)  # what had this name goes; its number is given to another file

    def live(self, path):
        """The names as they are now: `(node, {name: live(...)})`, and None for a file."""
        if not os.path.isdir(path):
            return self.node(path), None
        return self.node(path), {entry.name: self.live(entry.path) for entry in os.scandir(path)}

    def trees(self, live):
        return (
            self.durable(self.top),
            self.mixed(live, lambda: True),
            self.mixed(live, lambda: self.random.random() < 0.5),
        )

    def durable(self, node):
        if not node.is_directory:
            return node.content
        return {name: self.durable(child) for name, child in node.names.items()}

    def mixed(self, live, is_live):
        node, entries = live
        if entries is None:
            return node.content
        if is_live():
            return {name: self.mixed(child, is_live) for name, child in entries.items()}
        return {name: self.durable(child) for name, child in node.names.items()}


def rebuild(tree, path):
    if isinstance(tree, bytes):
        Path(path).write_bytes(tree)
        return
    os.mkdir(path)
    for name, child in tree.items():
        rebuild(child, os.path.join(path, name))


def key_of(tree):
    return tree if isinstance(tree, bytes) else tuple(sorted((name, key_of(child)) for name, child in tree.items()))


OPTIONS = {
    "a fresh run": {"max_steps": 4, "save_steps": 2},
    "rotation": {"max_steps": 4, "save_steps": 1, "save_total_limit": 1},
    "frozen weights": {"max_steps": 4, "save_steps": 1, "save_total_limit": 2, "model": FrozenLine},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_after_a_power_cut_at_any_moment_a_complete_checkpoint_is_found(tmp_path, monkeypatch, case):
    options = OPTIONS[case]
    monkeypatch.setattr(frozen, "LEAST_BYTES", 1)
    root = tmp_path / "disk"
    root.mkdir()
    out = root / "project" / "out"  # the run makes both
    disk = Disk(root)
    finished = []  # (number of cuts before, step) for each save that has returned

    def note(trainer):
        save = trainer._save_checkpoint

        def saved(*args):
            save(*args)
            finished.append((len(disk.cuts), trainer.state.global_step))

        trainer._save_checkpoint = saved

    with monkeypatch.context() as patch:
        watch_files(disk.on_call, patch.setattr)
        whole = make_run(out, **options)
        note(whole)
        whole.train()
        whole.save_model()
    expected = end_of(whole)
    assert len(finished) == options["max_steps"] // options["save_steps"] and len(disk.cuts) > 50

    seen, resumed_from = set(), set()
    for number, (where, *trees) in enumerate(disk.cuts):
        promised = max((step for before, step in finished if before <= number), default=0)
        for tree in trees:
            key = promised, key_of(tree)
            if key in seen:
                continue
            seen.add(key)
            shutil.rmtree(tmp_path / "after", ignore_errors=True)
            rebuild(tree, tmp_path / "after")
            after = tmp_path / "after" / "project" / "out"
            assert max(complete_steps(after) if after.exists() else [], default=0) >= promised, where
            if promised:
                found = find_resumable(after, is_explicit=False)
                assert problems(found) == [], where
            resumed_from.add(promised)
            if len(seen) % 5 == 0:  # the rest of the run, now and then: that resumes are exact has its own tests
                again = make_run(after, **options)
                assert resume_or_start(again) or not promised, where
                but = ("random",) if again._run.first_step == options["max_steps"] else ()
                assert difference(expected, end_of(again), but) == "", where
    assert len(seen) > 40 and resumed_from == {0, *(step for _, step in finished)}


def test_the_model_of_the_disk_loses_what_was_not_confirmed(tmp_path):
    disk = Disk(tmp_path)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_bytes(b"content")
    disk.on_call("fsync", str(folder / "file"), None)
    disk.on_call("fsync", str(tmp_path), None)
    assert disk.durable(disk.top) == {"folder": {}}  # the name of the file is not confirmed, its bytes are
    disk.on_call("fsync", str(folder), None)
    assert disk.durable(disk.top) == {"folder": {"file": b"content"}}
    (folder / "file").write_bytes(b"longer content")
    os.rename(folder, tmp_path / "renamed")
    assert disk.durable(disk.top) == {"folder": {"file": b"content"}}
    assert disk.mixed(disk.live(str(tmp_path)), lambda: True) == {"renamed": {"file": b"content"}}
