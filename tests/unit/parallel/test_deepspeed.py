"""What is found out before DeepSpeed is imported: whether it is there, and whether a build would wait without end."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from trainwright.interop.optional import MissingExtra
from trainwright.parallel import deepspeed as engine


def test_a_missing_package_is_one_error_with_the_command(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "is_installed", lambda name: False)
    with pytest.raises(MissingExtra, match=r"pip install 'trainwright\[deepspeed\]'"):
        make_trainer(deepspeed={"zero_optimization": {"stage": 2}})


def test_the_launchers_variable_alone_asks_for_the_engine(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "is_installed", lambda name: False)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(MissingExtra):
        make_trainer()


@pytest.fixture
def build(tmp_path: Path) -> Path:
    folder = tmp_path / "deepspeed_shm_comm"
    folder.mkdir()
    (folder / "lock").touch()
    return folder


def made(lock: Path) -> float:
    return os.stat(lock).st_mtime


@pytest.mark.parametrize("age_s", [engine.YOUNG_LOCK_S + 1, engine.OLD_LOCK_S + 1])
def test_a_lock_that_nobody_holds_is_an_error_that_names_it(build: Path, age_s: float) -> None:
    with pytest.raises(RuntimeError, match=r"deepspeed_shm_comm/lock.*Delete that file"):
        engine.check_build_locks(str(build.parent), made(build / "lock") + age_s)


def test_a_young_lock_is_that_of_a_build_under_way(build: Path) -> None:
    engine.check_build_locks(str(build.parent), made(build / "lock") + engine.YOUNG_LOCK_S - 1)


def test_a_lock_is_held_while_a_process_works_in_its_folder(build: Path) -> None:
    compiler = subprocess.Popen([sys.executable, "-c", "input()"], cwd=build, stdin=subprocess.PIPE)
    try:
        now = made(build / "lock") + engine.YOUNG_LOCK_S + 1
        engine.check_build_locks(str(build.parent), now)
        with pytest.raises(RuntimeError):  # but not for ever
            engine.check_build_locks(str(build.parent), now + engine.OLD_LOCK_S)
    finally:
        compiler.communicate(b"\n")
    with pytest.raises(RuntimeError):
        engine.check_build_locks(str(build.parent), now)


def test_another_machine_may_be_building(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    engine.check_build_locks(str(build.parent), made(build / "lock") + engine.YOUNG_LOCK_S + 1)


def test_a_folder_without_locks_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "done.so").touch()
    engine.check_build_locks(str(tmp_path))
    engine.check_build_locks(str(tmp_path / "nowhere"))


def test_operators_are_looked_for_where_torch_builds_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch.utils import cpp_extension

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert engine.build_root() == str(tmp_path)
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setattr(cpp_extension, "get_default_build_root", lambda: str(tmp_path))
    monkeypatch.setattr(os, "makedirs", lambda *given, **options: None)
    wanted = cpp_extension._get_build_directory("x", verbose=False)
    assert os.path.dirname(wanted) == engine.build_root()


# -- releases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("release", "is_refused"), [("0.18.9", True), ("0.19.0", False), ("0.20", False), ("1.0", False)]
)
def test_a_release_that_is_too_old_is_named_with_the_command(release: str, is_refused: bool) -> None:
    with pytest.raises(RuntimeError, match=f"{release} is installed.*pip install") if is_refused else nullcontext():
        engine.check_age(release)


class Engine:
    """With every name that is used."""

    _config = basic_optimizer = None

    def _scheduler_from_config(self, optimizer: Any) -> None: ...

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None: ...


class Part:
    """An optimizer of DeepSpeed's, likewise."""

    averaged_gradients, clip_grad, loss_scale, micro_step_id = None, 0.0, 1.0, 0

    def refresh_fp32_params(self) -> None: ...

    def scaled_global_norm(self) -> None: ...


def test_a_release_with_every_name_is_used() -> None:
    engine.check_release(Engine(), Part(), "scaled_global_norm", "0.21.0")


def test_a_release_that_renamed_what_is_used_is_one_error_that_names_it_and_the_supported_ones() -> None:
    says = r"0.21.0 has no Part._get_norm_groups, which .*0.19.\* have it"
    with pytest.raises(RuntimeError, match=says):
        engine.check_release(Engine(), Part(), "_get_norm_groups", "0.21.0")
