"""Pushing with the real huggingface_hub to a small Hub on this machine, and reading back what was committed."""

import logging
import os
import shutil
from types import SimpleNamespace

import pytest

from local_hub import TOKEN

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")

from trainwright.hub import push  # noqa: E402 - after the skip
from trainwright.hub.session import HubSession  # noqa: E402


@pytest.fixture
def output_dir(tmp_path):
    """What a run has written by its second save."""
    for step in (1, 2):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        for name in ("model.safetensors", "config.json", "vocab.txt", "training_args.bin"):
            (checkpoint / name).write_bytes(f"{name} of step {step}".encode())
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "manifest.json"):
            (checkpoint / name).write_bytes(f"{name} of step {step}".encode())
    (tmp_path / "README.md").write_text("# model\n")
    (tmp_path / "_scratch.txt").write_text("not for the Hub")
    return tmp_path


MODEL = {"model.safetensors", "config.json", "vocab.txt", "training_args.bin"}
RESUME = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "manifest.json"}


def session_of(output_dir, strategy="every_save", **settings):
    given = {"hub_private_repo": None, "hub_always_push": False, "hub_revision": None, **settings}
    args = SimpleNamespace(
        hub_model_id="model", hub_token=TOKEN, hub_strategy=strategy, output_dir=str(output_dir), **given
    )
    return HubSession(args)


def save(session, step):
    """What the Trainer does after a save."""
    session.push_checkpoint(os.path.join(session.args.output_dir, f"checkpoint-{step}"), step, lambda: None)


def start(output_dir, step, strategy, **settings):
    session = session_of(output_dir, strategy, **settings)
    save(session, step)
    return session


def test_a_name_without_owner_lands_in_the_namespace_of_the_token(hub, tmp_path):
    assert push.create_repository("model", TOKEN, None, str(tmp_path)) == "me/model"


def test_an_organisation_is_respected(hub, tmp_path):
    assert push.create_repository("acme/model", TOKEN, None, str(tmp_path)) == "acme/model"


def test_the_name_of_the_output_directory_is_the_default(hub, tmp_path):
    assert push.create_repository(None, TOKEN, None, str(tmp_path / "my-bert") + "/") == "me/my-bert"


def test_private_reaches_the_hub_and_an_existing_repository_is_no_error(hub, tmp_path):
    assert push.create_repository("model", TOKEN, True, str(tmp_path)) == "me/model"
    assert hub.private
    assert push.create_repository("model", TOKEN, True, str(tmp_path)) == "me/model"


def test_a_missing_token_is_an_error_that_names_the_three_ways_to_give_one(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(RuntimeError, match=r"hf auth login.*HF_TOKEN.*hub_token="):
        push.create_repository("model", None, None, str(tmp_path))
    assert hub.requests == []


def test_a_folder_is_committed_without_checkpoints_and_scratch_files(hub, output_dir):
    repository = push.create_repository("model", TOKEN, None, str(output_dir))
    (output_dir / "model.safetensors").write_bytes(b"weights")
    commit = push.push_folder(repository, str(output_dir), message="End of training", token=TOKEN)
    assert hub.files() == {"README.md": b"# model\n", "model.safetensors": b"weights"}
    assert hub.commits == [("me/model", "main", "End of training")]
    assert commit.commit_url.startswith(f"{hub.url}/me/model/commit/")


def test_a_revision_is_a_branch_that_is_created_where_it_is_missing(hub, output_dir):
    repository = push.create_repository("model", TOKEN, None, str(output_dir))
    for _ in range(2):
        push.push_folder(repository, str(output_dir), message="m", token=TOKEN, revision="try-2")
    assert set(hub.files(branch="try-2")) == {"README.md"}
    assert hub.files(branch="main") == {}


def test_a_folder_can_go_to_a_place_inside_the_repository(hub, output_dir):
    repository = push.create_repository("model", TOKEN, None, str(output_dir))
    checkpoint = str(output_dir / "checkpoint-1")
    push.push_folder(repository, checkpoint, message="m", token=TOKEN, path_in_repo="last", ignore_patterns=["opt*"])
    assert set(hub.files()) == {f"last/{name}" for name in (MODEL | RESUME) - {"optimizer.pt"}}


def test_a_push_in_the_background_brings_the_files_as_they_were_when_it_began(hub, output_dir):
    repository = push.create_repository("model", TOKEN, None, str(output_dir))
    weights = output_dir / "model.safetensors"
    weights.write_bytes(b"first")
    hub.gate.clear()
    job = push.push_folder(repository, str(output_dir), message="m", token=TOKEN, blocking=False)
    assert not job.done()
    (output_dir / "new").write_bytes(b"second")
    os.replace(output_dir / "new", weights)
    (output_dir / "README.md").unlink()
    hub.gate.set()
    job.result(60)
    assert hub.files() == {"README.md": b"# model\n", "model.safetensors": b"first"}
    assert not [name for name in os.listdir(output_dir) if name.startswith(".hub-push")]


def prepared(output_dir, private):
    """Links that somebody prepared in a run's folder; those that may be pushed."""
    (private / "key").write_text("private")
    (private / "folder").mkdir()
    (private / "folder" / "key").write_text("private")
    (output_dir / "to [a] file").symlink_to(private / "key")
    (output_dir / "to_a_folder").symlink_to(private / "folder")
    (output_dir / "to_nothing").symlink_to(private / "absent")
    (output_dir / "up").symlink_to("..")
    os.mkfifo(output_dir / "pipe")
    (output_dir / "checkpoint-1" / "vocab.txt").unlink()
    (output_dir / "checkpoint-1" / "vocab.txt").symlink_to(private / "key")
    (output_dir / "checkpoint-9").symlink_to(private / "folder")
    (output_dir / "same").symlink_to("README.md")
    return {"README.md": b"# model\n", "same": b"# model\n"}


@pytest.mark.parametrize("blocking", [True, False])
def test_links_that_leave_the_directory_are_not_pushed_and_named(blocking, hub, output_dir, tmp_path_factory, caplog):
    wanted = prepared(output_dir, tmp_path_factory.mktemp("private"))
    repository = push.create_repository("model", TOKEN, None, str(output_dir))
    result = push.push_folder(repository, str(output_dir), message="m", token=TOKEN, blocking=blocking)
    if not blocking:
        result.result(60)
    assert hub.files() == wanted
    for name in ("to [a] file", "to_a_folder", "to_nothing", "up"):
        assert f"{name!r} (a link that leaves {output_dir})" in caplog.text
    assert "'pipe' (no plain file)" in caplog.text and "'same'" not in caplog.text


@pytest.mark.parametrize("strategy", ["every_save", "all_checkpoints"])
def test_links_that_leave_a_checkpoint_are_not_pushed_after_a_save(strategy, hub, output_dir, tmp_path_factory, caplog):
    prepared(output_dir, tmp_path_factory.mktemp("private"))
    start(output_dir, 1, strategy).finish()
    assert "model.safetensors" in hub.files() and "same" in hub.files()
    assert not [name for name, content in hub.files().items() if content == b"private"]
    assert f"'vocab.txt' (a link that leaves {output_dir})" in caplog.text


def test_every_save_pushes_the_model_of_the_checkpoint_without_what_only_resuming_needs(hub, output_dir):
    start(output_dir, 2, "every_save").finish()
    assert set(hub.files()) == MODEL | {"README.md"}
    assert hub.files()["model.safetensors"] == b"model.safetensors of step 2"
    assert len(hub.commits) == 1


def test_the_last_checkpoint_is_pushed_whole_and_replaces_the_one_before(hub, output_dir):
    (output_dir / "checkpoint-1" / "rng_state_1.pth").write_bytes(b"of a second process")
    session = start(output_dir, 1, "checkpoint")
    session.finish()
    assert "last-checkpoint/rng_state_1.pth" in hub.files()
    save(session, 2)
    session.finish()
    assert set(hub.files()) == MODEL | {"README.md"} | {f"last-checkpoint/{name}" for name in MODEL | RESUME}
    assert hub.files()["last-checkpoint/optimizer.pt"] == b"optimizer.pt of step 2"


def test_all_checkpoints_are_pushed_under_their_own_names_each_once(hub, output_dir):
    session = start(output_dir, 2, "all_checkpoints")
    session.finish()
    both = {f"checkpoint-{step}/{name}" for step in (1, 2) for name in MODEL | RESUME}
    assert set(hub.files()) == MODEL | {"README.md"} | both
    before = len(hub.requests)
    save(session, 2)
    session.finish()
    assert not any(b"checkpoint-" in body for _, _, _, body in hub.requests[before:])


def test_a_save_during_a_push_is_pushed_after_it_and_the_newest_is_enough(hub, output_dir):
    hub.gate.clear()
    session = start(output_dir, 1, "checkpoint")
    for step in (1, 2):
        save(session, step)
    assert len([name for name in os.listdir(output_dir) if name.startswith(".hub-push")]) == 2
    hub.gate.set()
    session.finish()
    assert [summary for _, _, summary in hub.commits] == [f"Training in progress, step {step}" for step in (1, 2)]
    assert hub.files()["last-checkpoint/optimizer.pt"] == b"optimizer.pt of step 2"
    assert not [name for name in os.listdir(output_dir) if name.startswith(".hub-push")]


def test_each_save_is_pushed_where_that_is_asked_for(hub, output_dir):
    hub.gate.clear()
    session = start(output_dir, 1, "every_save", hub_always_push=True)
    for step in (1, 2):
        save(session, step)
    hub.gate.set()
    session.finish()
    assert [summary for _, _, summary in hub.commits] == [f"Training in progress, step {step}" for step in (1, 1, 2)]
    assert hub.files()["model.safetensors"] == b"model.safetensors of step 2"


def test_checkpoints_that_were_pushed_while_others_waited_are_not_uploaded_again(hub, output_dir):
    hub.gate.clear()
    session = start(output_dir, 2, "all_checkpoints")
    shutil.copytree(output_dir / "checkpoint-2", output_dir / "checkpoint-3")
    save(session, 3)
    hub.gate.set()
    session.finish()
    last = hub.requests[-1][3]
    assert b"checkpoint-3/config.json" in last and b"checkpoint-2/" not in last
    assert {f"checkpoint-{step}/optimizer.pt" for step in (1, 2, 3)} <= set(hub.files())


def test_a_checkpoint_that_is_rotated_away_during_its_push_arrives_whole(hub, output_dir):
    hub.gate.clear()
    session = start(output_dir, 1, "checkpoint")
    for path in (output_dir / "checkpoint-1").iterdir():
        path.unlink()
    (output_dir / "checkpoint-1").rmdir()
    hub.gate.set()
    session.finish()
    assert hub.files()["last-checkpoint/model.safetensors"] == b"model.safetensors of step 1"


def test_a_failed_push_is_a_warning_and_its_checkpoints_come_with_the_next(hub, output_dir, caplog):
    hub.fail_commits = True
    session = start(output_dir, 1, "all_checkpoints")
    session._queue.wait_until_done()
    assert caplog.text.count("the disk is full") == 1
    hub.fail_commits = False
    save(session, 2)
    session.finish()
    assert {"checkpoint-1/optimizer.pt", "checkpoint-2/optimizer.pt"} <= set(hub.files())
    assert "trainwright push" not in caplog.text


def test_files_that_are_appended_to_during_a_push_arrive_as_they_were(hub, output_dir):
    (output_dir / "events.log").write_text("first line\n")
    hub.gate.clear()
    session = start(output_dir, 1, "every_save")
    with open(output_dir / "events.log", "a") as file:
        file.write("second line\n")
    hub.gate.set()
    session.finish()
    assert hub.files()["events.log"] == b"first line\n"


def test_the_log_lines_and_the_report_of_the_run_stay_here(hub, output_dir):
    for name in ("metrics.jsonl", "training_report.html"):
        (output_dir / name).write_text("{}\n")
    start(output_dir, 1, "every_save").finish()
    assert not {"metrics.jsonl", "training_report.html"} & set(hub.files())


def test_a_stage_left_by_a_killed_process_is_removed_and_never_pushed(hub, output_dir):
    left = output_dir / ".hub-push-dead"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"old")
    start(output_dir, 1, "every_save").finish()
    assert not left.exists()
    assert set(hub.files()) == MODEL | {"README.md"}


def test_a_checkpoint_that_is_still_written_replaced_or_deleted_is_never_pushed(hub, output_dir):
    for name in (".checkpoint-3.staged-41", ".checkpoint-2.replaced-41", ".checkpoint-1.deleted-41"):
        (output_dir / name / "adapter").mkdir(parents=True)
        (output_dir / name / "model.safetensors").write_bytes(b"half of it")
        (output_dir / name / "adapter" / "adapter_model.safetensors").write_bytes(b"half of it")
    start(output_dir, 2, "all_checkpoints").finish()
    push.push_folder("me/model", str(output_dir), message="End of training", token=TOKEN)
    steps = {f"checkpoint-{step}/{name}" for step in (1, 2) for name in MODEL | RESUME}
    assert set(hub.files()) == MODEL | {"README.md"} | steps


def test_the_token_is_in_the_authorization_header_and_nowhere_else(hub, output_dir, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HOME", str(tmp_path))
    with caplog.at_level(logging.DEBUG, logger="trainwright"):
        start(output_dir, 2, "checkpoint", hub_revision="try-2").finish()
        push.push_folder("me/model", str(output_dir), message="End of training", token=TOKEN)
    secret = TOKEN.encode()
    assert {authorization for _, path, authorization, _ in hub.requests if path.startswith("/api")} == {
        f"Bearer {TOKEN}"
    }
    assert not any(secret in body or TOKEN in path for _, path, _, body in hub.requests)
    written = [path for path in output_dir.rglob("*") if path.is_file()]
    assert written and not any(secret in path.read_bytes() for path in written)
    assert not any(secret in content for content in hub.objects.values())
    assert TOKEN not in caplog.text


def test_the_licence_of_a_model_is_what_its_tags_say(hub, tmp_path):
    push.create_repository("model", TOKEN, None, str(tmp_path))
    assert push.license_on_hub("me/model", TOKEN) == "mit"


def test_the_licence_is_unknown_where_the_hub_cannot_be_asked(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    push._api.cache_clear()
    assert push.license_on_hub("me/model") is None


def test_patterns_are_added_to_gitignore_once_and_what_stands_there_stays(tmp_path):
    (tmp_path / ".gitignore").write_text("*.log")
    for _ in range(2):
        push.add_patterns_to_gitignore(str(tmp_path), ["*.sagemaker-uploading", "*.log"])
    assert (tmp_path / ".gitignore").read_text() == "*.log\n*.sagemaker-uploading\n"
