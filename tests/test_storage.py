"""Locks, folders for intermediate files, and reading from storage that answers with errors."""

import errno
import os
import subprocess
import sys

import pytest
from PIL import Image

from iwin_dit.data.folders import read_file
from iwin_dit.runtime import files, scratch
from iwin_dit.runtime.errors import ConfigError, DataError, StorageError, run_script
from iwin_dit.runtime.lock import hold

HOLD = (
    "import sys; from pathlib import Path; from iwin_dit.runtime.lock import hold\n"
    "lock = hold(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()\n"
)


def test_a_folder_in_use_is_refused_or_waited_for(tmp_path, capsys, monkeypatch):
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], **pipes)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=rf"{tmp_path} is in use, held by pid {other.pid} on host"):
        hold(tmp_path)
    monkeypatch.setattr("iwin_dit.runtime.lock.time.sleep", lambda seconds: other.communicate())
    lock = hold(tmp_path, wait=True)
    assert other.returncode == 0
    assert f"waiting for {tmp_path}, held by pid {other.pid}" in capsys.readouterr().out
    assert (tmp_path / "lock").read_text().startswith(f"pid {os.getpid()} ")
    lock.close()


def test_only_folders_that_were_made_here_are_removed(tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years")
    with pytest.raises(ConfigError, match="was not made for them"):
        scratch.make(foreign)
    scratch.remove(foreign)
    assert (foreign / "thesis.txt").read_text() == "years"
    (tmp_path / "link").symlink_to(scratch.make(tmp_path / "own"))
    with pytest.raises(ConfigError, match="was not made for them"):
        scratch.make(tmp_path / "link")
    assert scratch.make(tmp_path / "own") == scratch.make(tmp_path / "own")
    (tmp_path / "own" / "part").write_text("half")
    scratch.remove(tmp_path / "own")
    scratch.remove(tmp_path / "own")  # which is gone
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign", "link"]


def test_a_folder_is_replaced_as_a_whole_and_foreign_files_survive(tmp_path, capsys):
    """What was there before is removed only if the new folder has all of its files."""
    folder = tmp_path / "pipeline"

    def write(*names):
        with scratch.replacement(folder) as new:
            for name in names:
                (new / name).parent.mkdir(exist_ok=True)
                (new / name).write_text("new")

    write("a", "b/c")
    write("a", "b/c", "d")
    assert sorted(os.listdir(tmp_path)) == ["pipeline"]
    for kept in ("pipeline.before", "pipeline.before1"):
        (folder / "b" / "thesis.txt").write_text("years")
        write("a", "b/c")
        assert (tmp_path / kept / "b" / "thesis.txt").read_text() == "years"
        assert f"is kept as {tmp_path / kept}" in capsys.readouterr().out
        assert sorted(p.name for p in folder.rglob("*")) == ["a", "b", "c"]

    with pytest.raises(FileNotFoundError):
        write("half", "too/deep/for/one/mkdir")
    assert (folder / "a").read_text() == "new"
    assert not scratch.beside(folder).exists()
    scratch.beside(folder).mkdir()
    (scratch.beside(folder) / "mine").touch()
    with pytest.raises(ConfigError, match=r"\.pipeline\.work is needed for intermediate files, but"):
        write("a")
    assert (scratch.beside(folder) / "mine").exists()


def test_what_a_killed_removal_left_does_not_stop_the_next(tmp_path, monkeypatch):
    for _ in range(2):
        scratch.make(tmp_path / "own")
        with monkeypatch.context() as patch:
            patch.setattr(files, "remove_tree", lambda path: None)  # killed after the rename
            scratch.remove(tmp_path / "own")
    assert not (tmp_path / "own").exists()


def test_errors_that_may_pass_are_tried_again(tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(files.time, "sleep", pauses.append)
    answers = [OSError(errno.EIO, "I/O error"), OSError(errno.ESTALE, "stale"), b"data"]

    def read():
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    assert files.retry(read) == b"data"
    assert pauses == [0.5, 2.0]
    answers[:] = [OSError(errno.EIO, "I/O error")] * 4
    with pytest.raises(OSError, match="I/O error"):
        files.retry(read)
    assert answers == []
    answers[:] = [PermissionError(errno.EACCES, "denied"), b"not asked for"]
    with pytest.raises(PermissionError):
        files.retry(read)
    assert answers == [b"not asked for"]


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(errno.EIO, "Input/output error", "x.bin"), 6, "Input/output error: x.bin; look at its"),
        (PermissionError(errno.EACCES, "Permission denied", "y"), 6, "Permission denied: y"),
        (OSError(errno.ENOSPC, "No space left on device", "z"), 3, "No space left on device: z; make room"),
    ],
)
def test_errors_of_the_storage_are_one_line(error, code, words, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert ended.value.code == code
    printed = capsys.readouterr().err
    assert words in printed
    assert printed.count("\n") == 1


def test_storage_that_fails_is_told_from_data_that_are_missing(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    with pytest.raises(DataError, match=r"b\.png cannot be read: No such file"):
        read_file(str(tmp_path / "b.png"))

    def fails(*arguments, **options):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("builtins.open", fails)
    with pytest.raises(StorageError, match=r"a\.png cannot be read: Input/output error"):
        read_file(str(tmp_path / "a.png"))
