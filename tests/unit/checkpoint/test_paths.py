"""Names from a file stay inside its directory."""

import os

import pytest

from trainwright.checkpoint.paths import inside, is_state_file, relative_files, rng_name


@pytest.mark.parametrize(
    "name", ["", "../a", "/etc/passwd", "a/../../b", "a//b", "./a", "a\\b", "C:a", "a\0b", "a\nb", "sub/", 3, None]
)
def test_a_name_that_leads_elsewhere_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="not a plain name"):
        inside(tmp_path, name)


def test_a_link_a_directory_and_a_pipe_are_refused(tmp_path):
    (tmp_path / "outside").write_text("secret")
    folder = tmp_path / "checkpoint"
    (folder / "sub").mkdir(parents=True)
    os.symlink(tmp_path / "outside", folder / "link")
    os.symlink(tmp_path, folder / "up")
    os.mkfifo(folder / "pipe")
    for name in ("link", "up/outside"):
        with pytest.raises(ValueError, match="is a link"):
            inside(folder, name)
    for name in ("sub", "pipe"):
        with pytest.raises(ValueError, match="not a plain file"):
            inside(folder, name)


def test_plain_names_lead_to_their_file(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.bin").write_text("a")
    assert inside(tmp_path, "sub/a.bin") == str(tmp_path / "sub" / "a.bin")
    assert inside(tmp_path, "absent") == str(tmp_path / "absent")
    assert relative_files(tmp_path) == ["sub/a.bin"]


def test_each_process_has_its_own_random_state_file():
    assert rng_name(0, 1) == "rng_state.pth" and rng_name(1, 2) == "rng_state_1.pth"
    assert is_state_file("rng_state_12.pth") and not is_state_file("rng_state_x.pth") and not is_state_file("notes.md")
