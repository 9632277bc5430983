"""Rows 1, 3 to 7, 34, 35 and 37 of README.md: whatever happens to a checkpoint, there is a good one."""

import errno
import itertools
import json
import os
import resource
import shutil
import signal
import sys
import traceback
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from iwin_dit.runtime import checkpoint, files
from iwin_dit.runtime.errors import CheckpointError, DiskError, StorageError, run_script

FILES = ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]


def tensors(step):
    return {
        "model": {"a": torch.full((2, 3), float(step)), "b": torch.ones(4)},
        "optimizer": {"a/step": torch.tensor(3.0)},
    }


def save(root, step, keep=2, groups=None):
    return checkpoint.save_checkpoint(root, step, groups or tensors(step), {"note": "hello"}, keep)


def content(root):
    """Every path below, with its bytes."""
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in root.rglob("*")}


def assert_consistent(root, steps):
    """All that is visible is whole, and the newest is one of ``steps`` and holds what was saved then."""
    for visible in root.glob("step-*"):
        checkpoint.verify(visible)
    newest = checkpoint.newest(root)
    step = checkpoint.read_state(newest)["step"]
    assert step in steps
    expected = tensors(step)
    for name, group in expected.items():
        read = checkpoint.read_tensors(newest, name, like=group)
        assert all(torch.equal(read[key], group[key]) for key in group)


@contextmanager
def watched(after):
    """Calls ``after(operation, path)`` after every operation on files; a write is two, of a half each."""
    real_open, patch = open, pytest.MonkeyPatch()

    class File:
        def __init__(self, path, mode):
            self.file, self.path = real_open(path, mode), path
            self.flush, self.fileno = self.file.flush, self.file.fileno
            after("open", path)

        def write(self, data):
            for part in (data[: len(data) // 2], data[len(data) // 2 :]):
                self.file.write(part)
                self.file.flush()
                after("write", self.path)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

    def watch(name):
        real = getattr(os, name)

        def call(first, *arguments, **options):
            is_descriptor = isinstance(first, int)
            path = os.readlink(f"/proc/self/fd/{first}") if is_descriptor else str(first)
            result = real(first, *arguments, **options)
            after(name, path)
            return result

        patch.setattr(os, name, call)

    patch.setattr(files, "open", lambda p, m: File(p, m) if m == "wb" else real_open(p, m), raising=False)
    for name in ("mkdir", "fsync", "rename", "unlink", "rmdir"):
        watch(name)
    try:
        yield
    finally:
        patch.undo()


def in_child(action):
    """Runs ``action`` in a copy of this process; its exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            action()
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_01_kill_9_after_any_operation(tmp_path):
    """Open, half a write, a write, fsync, rename, and every file that pruning removes."""
    seen = []
    for k in itertools.count(1):
        root, log = tmp_path / str(k), tmp_path / f"{k}.log"
        save(root, 1, keep=1)
        count = itertools.count(1)

        def after(operation, path, k=k, log=log, count=count):
            if next(count) == k:
                descriptor = os.open(log, os.O_CREAT | os.O_WRONLY)
                os.write(descriptor, operation.encode())
                os.kill(os.getpid(), signal.SIGKILL)

        def action(root=root, after=after):
            with watched(after):
                save(root, 2, keep=1)

        code = in_child(action)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        seen.append(log.read_text())
        assert_consistent(root, {1, 2} if "rename" in seen else {1})
        save(root, 3, keep=1)
        assert_consistent(root, {3})
        assert [p.name for p in root.iterdir()] == ["step-00000003"], "nothing to clean by hand"
    assert {*seen} == {"mkdir", "open", "write", "fsync", "rename", "unlink", "rmdir"}
    assert len(seen) == 1 + 4 * 4 + 1 + 2 + 2 + 4 + 1  # mkdir, files, directories, renames, pruning


def test_01_an_exception_passes_and_the_next_save_works(tmp_path):
    """Ctrl-C, for one: it is not taken for a full disk."""
    for k in range(1, 25):
        save(tmp_path / str(k), 1, keep=1)
        count = itertools.count(1)

        def after(operation, path, k=k, count=count):
            if next(count) == k:
                raise KeyboardInterrupt

        with watched(after), pytest.raises(KeyboardInterrupt):
            save(tmp_path / str(k), 2, keep=1)
        assert_consistent(tmp_path / str(k), {1, 2})
        save(tmp_path / str(k), 3, keep=1)
        assert [p.name for p in (tmp_path / str(k)).iterdir()] == ["step-00000003"]


def test_01_leftovers_of_another_step_are_removed(tmp_path):
    """A run that was killed while it saved step 7 goes on from step 5, and may never save step 7 again."""
    for name in (".tmp-step-00000007", ".old-step-00000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    (tmp_path / "mine").mkdir()
    save(tmp_path, 10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "step-00000010"]


def test_03_files_reach_the_disk_before_their_name_does(tmp_path):
    save(tmp_path, 1, keep=1)
    calls = []
    with watched(lambda operation, path: calls.append((operation, os.path.basename(path)))):
        save(tmp_path, 2, keep=1)
    for name in FILES:
        operations = [operation for operation, path in calls if path == name]
        assert operations[:4] == ["open", "write", "write", "fsync"]
    first = {call: i for i, call in reversed(list(enumerate(calls)))}
    in_order = [
        max(first["fsync", name] for name in FILES),
        first["fsync", ".tmp-step-00000002"],
        first["rename", ".tmp-step-00000002"],
        first["fsync", tmp_path.name],
        first["rename", "step-00000001"],  # pruning begins
    ]
    assert in_order == sorted(in_order)
    assert first["fsync", "manifest.json"] == in_order[0], "the manifest comes last"


@pytest.mark.parametrize("name", FILES)
def test_03_files_of_no_length_are_refused(tmp_path, name):
    """What a power loss leaves where nothing was fsynced."""
    save(tmp_path, 1)
    (save(tmp_path, 2) / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"has 0 bytes|not the manifest") as error:
        checkpoint.newest(tmp_path)
    assert f"step-00000002/{name}" in str(error.value)
    assert "to go on from step-00000001" in str(error.value)


@pytest.mark.parametrize("name", FILES[1:])
def test_04_truncated_files_are_refused(tmp_path, name, capsys):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    whole = path.read_bytes()
    for length in (len(whole) - 1, len(whole) - 8, len(whole) // 2):
        path.write_bytes(whole[:length])
        before = content(tmp_path)
        with pytest.raises(SystemExit) as end:
            run_script(lambda: checkpoint.newest(tmp_path))
        assert end.value.code == 2
        assert capsys.readouterr().err == (
            f"error: {path} has {length} bytes, the manifest says {len(whole)}; "
            f"to go on from step-00000001, remove or rename {path.parent}\n"
        )
        assert content(tmp_path) == before, "nothing is written"


def test_04_a_file_that_is_gone(tmp_path):
    save(tmp_path, 1)
    (save(tmp_path, 2) / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"does not exist; to go on from step-00000001"):
        checkpoint.newest(tmp_path)
    shutil.rmtree(tmp_path / "step-00000001")
    with pytest.raises(CheckpointError, match="no older one is intact"):
        checkpoint.newest(tmp_path)


@pytest.mark.parametrize("name", FILES[1:])
def test_05_a_flipped_bit_is_found(tmp_path, name):
    """safetensors itself takes most of them for weights."""
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=r"SHA-256 of the manifest.*go on from step-00000001"):
            checkpoint.newest(tmp_path)
    path.write_bytes(whole)
    assert_consistent(tmp_path, {2})


def test_05_a_flipped_bit_in_the_manifest_changes_nothing_unseen(tmp_path):
    path = save(tmp_path, 2) / "manifest.json"
    whole, refused = path.read_bytes(), 0
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            assert_consistent(tmp_path, {2})
        except CheckpointError:
            refused += 1
    assert refused > 0.8 * len(whole)  # what is left: white space and the version of torch


def test_06_without_a_manifest_there_is_no_checkpoint(tmp_path):
    save(tmp_path, 1, keep=None)
    rubble = save(tmp_path, 2, keep=None)
    (rubble / "manifest.json").unlink()
    assert checkpoint.newest(tmp_path).name == "step-00000001"
    save(tmp_path, 2, keep=None)  # the step that lies there in ruins can be saved
    assert_consistent(tmp_path, {2})
    save(tmp_path, 3, keep=None)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-0000000{step}" for step in (1, 2, 3)]


def test_06_manifests_that_are_not_ours(tmp_path):
    save(tmp_path, 1)
    manifest = save(tmp_path, 2) / "manifest.json"
    good = json.loads(manifest.read_text())
    for text, message in (
        ("not json", "not the manifest"),
        ("[]", "not the manifest"),
        ("{}", "not the manifest"),
        ("\ud800".encode("utf-8", "surrogatepass"), "not the manifest"),
        (json.dumps(good | {"files": ["model.safetensors"]}), "not the manifest"),
        (json.dumps(good | {"files": {"state.json": {"bytes": 1}}}), "not the manifest"),
        (json.dumps(good | {"schema": 99}), "has schema 99, this version reads 1"),
        (json.dumps({"schema": 2, "parts": []}), "has schema 2, this version reads 1"),
    ):
        manifest.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(CheckpointError, match=f"{message}.*go on from step-00000001"):
            checkpoint.newest(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_07_the_disk_fills_up_at_any_operation(tmp_path, number):
    operations = []
    for k in range(1, 1 + 1 + 4 * 4 + 3):  # mkdir, files, publishing; pruning is row 37
        root = tmp_path / str(k)
        save(root, 1, keep=1)
        count = itertools.count(1)

        def after(operation, path, k=k, count=count):
            if next(count) == k:
                operations.append(operation)
                raise OSError(number, os.strerror(number))

        full = number != errno.EIO  # which is no lack of room
        advice = "make room on this disk" if full else "look at its storage and permissions,"
        message = (
            rf"step-00000002 cannot be saved \({os.strerror(number)}\): it needs 1\.0 MiB, "
            rf"[\d.,]+ .iB were free; {advice} and run the same command again"
        )
        with watched(after), pytest.raises(DiskError if full else StorageError, match=message) as error:
            save(root, 2, keep=1)
        assert error.value.exit_code == (3 if full else 6)
        assert isinstance(error.value.__cause__, OSError)
        assert not list(root.glob(".tmp-*"))
        assert_consistent(root, {1, 2})
        assert (root / "step-00000001").exists(), "the previous one stays"
        save(root, 3, keep=1)
        assert [p.name for p in root.iterdir()] == ["step-00000003"]
    assert operations[-3:] == ["fsync", "rename", "fsync"]


def test_07_a_limit_on_file_sizes_in_a_process(tmp_path):
    """The kernel's own error, through to the exit code of a script."""
    groups = {"model": {"a": torch.zeros(50_000)}}
    save(tmp_path, 1, groups=groups)
    before = content(tmp_path)

    def action():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        sys.stderr = open(tmp_path / "stderr", "w")  # noqa: SIM115  flushed by in_child
        run_script(lambda: save(tmp_path, 2, groups=groups))

    assert in_child(action) == 3
    stderr = (tmp_path / "stderr").read_text()
    (tmp_path / "stderr").unlink()
    assert stderr.startswith(
        f"error: {tmp_path / 'step-00000002'} cannot be saved (File too large): it needs"
    )
    assert stderr.count("\n") == 1
    assert content(tmp_path) == before


def test_07_too_little_room_is_found_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, 1)
    before = content(tmp_path)
    monkeypatch.setattr(files, "free_bytes", lambda path: 3_000_000)
    groups = {"model": {"a": torch.zeros(500_000)}, "ema": {"a": torch.zeros(250_000)}}
    with pytest.raises(
        DiskError, match=r"step-00000002 cannot be saved: it needs 3\.9 MiB, 2\.9 MiB were free;"
    ):
        save(tmp_path, 2, groups=groups)
    assert content(tmp_path) == before
    with pytest.raises(DiskError, match="cannot be saved"):
        save(tmp_path / "new", 2, groups=groups)
    assert content(tmp_path) == before


def test_07_what_a_killed_run_left_is_removed_before_room_is_looked_for(tmp_path, monkeypatch):
    (tmp_path / ".tmp-step-00000002").mkdir()
    monkeypatch.setattr(files, "free_bytes", lambda p: 0 if list(tmp_path.glob(".tmp-*")) else 1 << 40)
    assert save(tmp_path, 2).exists()


def test_07_free_bytes_are_those_of_the_file_system(tmp_path, monkeypatch):
    missing = tmp_path / "a" / "b"
    assert files.free_bytes(missing) == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=0, used=0, free=0))
    assert files.free_bytes(missing) > 1 << 60  # a mount that does not say


def test_34_tensors_that_do_not_fit_the_model(tmp_path):
    groups = {"model": {"a": torch.zeros(2, 3), "b": torch.ones(4)}}
    directory = save(tmp_path, 1, groups=groups)
    for like, name in (
        ({"a": torch.zeros(2, 3)}, "b"),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(4), "c": torch.zeros(1)}, "c"),
        ({"a": torch.zeros(3, 2), "b": torch.zeros(4)}, "a"),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(1, 4)}, "b"),
    ):
        with pytest.raises(CheckpointError, match=f"does not fit the model at {name};"):
            checkpoint.read_tensors(directory, "model", like=like)
    with pytest.raises(CheckpointError, match=r"at a, b, x00, .*, x07 and 12 more; was it made by another"):
        checkpoint.read_tensors(directory, "model", like={f"x{i:02d}": torch.zeros(1) for i in range(20)})
    with pytest.raises(CheckpointError, match=r"ema\.safetensors cannot be read"):
        checkpoint.read_tensors(directory, "ema")


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_34_values_that_are_not_finite(tmp_path, value):
    directory = save(tmp_path, 1, groups={"model": {"a": torch.tensor([1.0, value]), "b": torch.ones(1)}})
    with pytest.raises(CheckpointError, match=r"values that are not finite at a$"):
        checkpoint.read_tensors(directory, "model")


def test_34_tensors_without_values_are_not_saved(tmp_path):
    with pytest.raises(CheckpointError, match=r"only the meta device, at model/a; load the weights first"):
        save(tmp_path / "run", 1, groups={"model": {"a": torch.zeros(2, device="meta"), "b": torch.ones(1)}})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_35_half_precision_is_refused_for_training(tmp_path, dtype):
    like = {"a": torch.zeros(2), "b": torch.zeros(3)}
    directory = save(tmp_path, 1, groups={"model": {"a": torch.ones(2), "b": torch.ones(3, dtype=dtype)}})
    message = rf"is {str(dtype)[6:]} at b, training needs float32; a half-precision export can be sampled"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read_tensors(directory, "model", like=like)
    read = checkpoint.read_tensors(directory, "model", like=like, any_precision=True)
    assert read["b"].dtype == dtype
    with pytest.raises(CheckpointError, match="is float32 at a, training needs int64"):
        checkpoint.read_tensors(directory, "model", {"a": torch.zeros(2).long(), "b": like["b"]}, True)


def test_37_a_failure_to_prune_is_a_warning(tmp_path, monkeypatch):
    save(tmp_path, 1, keep=1)
    real, failures = shutil.rmtree, iter([PermissionError("no")])

    def fails_once(*arguments, **options):
        if (error := next(failures, None)) is not None:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", fails_once)
    with pytest.warns(UserWarning, match="could not remove the old checkpoint .*step-00000001: no"):
        save(tmp_path, 2, keep=1)
    assert_consistent(tmp_path, {2})
    save(tmp_path, 3, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


def test_37_what_cannot_be_removed_at_all_stops_no_run(tmp_path, monkeypatch):
    save(tmp_path, 1, keep=1)

    def fails(path):
        raise PermissionError("no")

    monkeypatch.setattr(files, "remove_tree", fails)
    for step in (2, 3):
        with pytest.warns(UserWarning, match="could not remove"):
            save(tmp_path, step, keep=1)
    assert_consistent(tmp_path, {3})
