"""What cannot be written is told before there is anything to write."""

import os
from pathlib import Path

import pytest
from recorded_run import record_run

from diffusion_grpo.cli import main
from diffusion_grpo.commands import sample
from diffusion_grpo.errors import UsageError
from diffusion_grpo.output_files import check_output, whole_folder


def test_a_file_that_can_be_written_is_returned(tmp_path):
    assert check_output(tmp_path / "x.JSON", (".json",)) == tmp_path / "x.JSON"
    (tmp_path / "there.csv").touch()
    assert check_output(tmp_path / "there.csv", (".json", ".csv")) == tmp_path / "there.csv"


def test_what_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "folder.json").mkdir()
    for name, message in (
        ("x.txt", "does not end in .json or .csv"),
        ("no/x.json", "the folder .* does not exist"),
        ("folder.json", "is a folder; expected the name of a file"),
    ):
        with pytest.raises(UsageError, match=message):
            check_output(tmp_path / name, (".json", ".csv"))

    # Root may write anywhere: say what the system says to others.
    asked = []

    def refuse(path, mode):
        asked.append(Path(path))
        return False

    monkeypatch.setattr(os, "access", refuse)
    (tmp_path / "there.json").touch()
    for name, place in (("there.json", "there.json"), ("new.json", ".")):
        with pytest.raises(UsageError, match="cannot be written; choose another folder or name"):
            check_output(tmp_path / name, (".json",))
        assert asked[-1] == tmp_path / place
    words = ["--model", "shapes-diffusion", "--prompt", "a star", "--output", "None", "--singles"]
    with pytest.raises(UsageError, match=f"{tmp_path} cannot be written"):
        sample.run([*words, str(tmp_path / "deep" / "er")])
    with pytest.raises(UsageError, match=r"there.json is no folder"):
        sample.run([*words, str(tmp_path / "there.json" / "x")])


def test_a_full_disk_is_told_in_one_line(tmp_path, capsys):
    run = record_run(tmp_path / "run", iterations=2, heldout=4, evaluate_every=1)
    (tmp_path / "strip.png").symlink_to("/dev/full")
    assert main(["compare", str(run), "--strip", str(tmp_path / "strip.png")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device; make room on the disk, or write elsewhere" in line


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.*")}


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    with whole_folder(tmp_path / "runs" / "best") as folder:
        (folder / "a.txt").write_text("1")
        (folder / "b.txt").write_text("1")
    first = {"best/a.txt": "1", "best/b.txt": "1"}
    assert files(tmp_path / "runs") == first
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "runs" / "best") as folder:
        (folder / "a.txt").write_text("2")
        assert (tmp_path / "runs" / "best" / "a.txt").read_text() == "1"
        raise KeyboardInterrupt
    assert files(tmp_path / "runs") == first
    for end in ("tmp", "old"):  # left by a kill
        (tmp_path / "runs" / f"best.{end}").mkdir()
        (tmp_path / "runs" / f"best.{end}" / "c.txt").write_text("0")
    with whole_folder(tmp_path / "runs" / "best") as folder:
        (folder / "a.txt").write_text("3")
    assert files(tmp_path / "runs") == {"best/a.txt": "3"}
