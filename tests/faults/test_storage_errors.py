"""A storage that fails or changes what it holds, and damaged files of a run: one line, an exit code, and a
checkpoint before leaving."""

import contextlib
import errno
import itertools
import json
import os

import pytest
import torch
from conftest import assert_equal, read_checkpoint
from PIL import Image

from iwin_dit.data.latents import LatentDataset
from iwin_dit.runtime import checkpoint, files, lock
from iwin_dit.runtime.errors import CheckpointError, ConfigError, StorageError, storage_error
from iwin_dit.runtime.run import DAMAGED, RunDirectory, changed_data, read_config

SHORT = {"max_steps": 12, "save_every_steps": 5, "log_every_steps": 4}


def steps_on_disk(run):
    return [checkpoint.step_of(path) for path in checkpoint.step_directories(run / "checkpoints")]


def stale(*arguments, **options):
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "/data/shard")


def error_line(code, output):
    """The one line of an error of the storage."""
    assert code == 6, output
    assert "Traceback" not in output, output
    (line,) = (line for line in output.splitlines() if line.startswith("error: "))
    return line


# --- reading data


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_cannot_be_read_end_the_run_with_a_checkpoint(
    recipe, train_here, tmp_path, monkeypatch, workers
):
    """At the eighth step; the same command goes on, to the bits of a run that was never interrupted."""
    config = recipe(train={**SHORT, "num_workers": workers})
    real, calls = LatentDataset.draw, itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr(LatentDataset, "draw", lambda *a: real(*a) if next(calls) < 8 else stale())
        line = error_line(*train_here("--config", config))
    assert "the data cannot be read: " in line
    assert os.strerror(errno.ESTALE) in line
    assert "run the same command again" in line
    assert steps_on_disk(tmp_path / "run") == [5, 7]
    if workers == 0:
        for name in ("run", "whole"):
            code, output = train_here("--config", config, "--output_dir", tmp_path / name)
            assert code == 0, output
        assert_equal(read_checkpoint(tmp_path / "run", 12), read_checkpoint(tmp_path / "whole", 12))


def test_reads_of_a_checkpoint_are_repeated(tmp_path, monkeypatch):
    """Each kind of file answers with EIO once; a file that always does is an error, not a damaged file."""
    pauses = []
    monkeypatch.setattr(files.time, "sleep", pauses.append)
    saved = {"model": {"a": torch.ones(3)}}
    checkpoint.save_checkpoint(tmp_path, 3, saved, {}, keep=2)
    failing = {"manifest.json": 1, "state.json": 2, "model.safetensors": 1}

    def opened(path, mode="r"):
        if failing.get(path.name, 0) > 0:
            failing[path.name] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return open(path, mode)

    monkeypatch.setattr(files, "open", opened, raising=False)
    newest = checkpoint.newest(tmp_path)
    assert checkpoint.read_state(newest)["step"] == 3
    assert sum(failing.values()) == 0
    assert len(pauses) == 4
    failing["manifest.json"] = 100
    with pytest.raises(OSError, match="Input/output error"):
        checkpoint.newest(tmp_path)
    assert pauses[-3:] == list(files.PAUSES)
    assert list(files.PAUSES) == sorted(files.PAUSES)


# --- writing


@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO, errno.ENOSPC])
def test_an_error_of_the_storage_has_its_own_exit_code(number):
    found = storage_error(OSError(number, os.strerror(number), "x.png"), "run it again", "nothing written")
    assert found.exit_code == (3 if number == errno.ENOSPC else 6)
    assert str(found).startswith(f"nothing written: {os.strerror(number)}: x.png; ")


def test_a_checkpoint_on_a_read_only_disk_is_no_full_disk(tmp_path, monkeypatch):
    def read_only(path, data):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(files, "write", read_only)
    with pytest.raises(StorageError, match=r"Read-only file system.*permissions"):
        checkpoint.save_checkpoint(tmp_path, 3, {"model": {"a": torch.ones(3)}}, {}, keep=2)
    assert not list(tmp_path.iterdir())


def test_samples_that_cannot_be_written_cost_no_step(recipe, train_here, tmp_path, monkeypatch):
    def read_only(*arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "x.png")

    monkeypatch.setattr(Image.Image, "save", read_only)
    line = error_line(*train_here("--config", recipe(train={**SHORT, "sample_every_steps": 7})))
    assert line.startswith("error: the samples cannot be written: Read-only file system: x.png; ")
    assert steps_on_disk(tmp_path / "run") == [5, 7]


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_a_checkpoint_that_reads_back_as_something_else_is_not_kept(tmp_path, monkeypatch, name):
    """One bit, after it was written; the checkpoint before it stays, and is the only one."""
    saved = {"model": {"a": torch.arange(100.0)}}
    checkpoint.save_checkpoint(tmp_path, 3, saved, {}, keep=1)
    real = files.write

    def write(path, data):
        result = real(path, data)
        if path.name == name:
            flipped = bytearray(data)
            flipped[len(data) // 2] ^= 1
            path.write_bytes(flipped)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(files, "write", write)
        with pytest.raises(StorageError, match=r"reads back as something else.*before it is untouched"):
            checkpoint.save_checkpoint(tmp_path, 6, saved, {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]
    checkpoint.verify(tmp_path / "step-00000003")
    checkpoint.save_checkpoint(tmp_path, 6, saved, {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000006"]


def test_the_system_is_asked_to_read_from_the_disk(tmp_path, monkeypatch):
    """What it keeps in memory would only be compared with itself. Each file, and before it is read."""
    events = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *a: events.append(a[1:]), raising=False)
    real = files.fingerprint
    monkeypatch.setattr(files, "fingerprint", lambda path: events.append(path.name) or real(path))
    checkpoint.save_checkpoint(tmp_path, 3, {"model": {"a": torch.ones(3)}}, {}, keep=1)
    assert events[:3] == [(0, 0, os.POSIX_FADV_DONTNEED)] * 3
    assert sorted(events[3:]) == ["model.safetensors", "state.json"]


# --- damaged files of a run

CONFIG = {"output_dir": "x", "seed": 0, "train": {"max_steps": 4}}
LINES = [b'{"step": 2, "loss": 1.0}', b'{"step": 4, "loss": 0.5}']


def open_run(folder, config=CONFIG):
    run = RunDirectory(folder, config, frozenset(), {"vae": "v"})
    run._lock.close()
    return run


@pytest.fixture
def begun(tmp_path):
    """A run directory of four steps."""
    open_run(tmp_path / "run").begin(0)
    (tmp_path / "run" / "log.jsonl").write_bytes(b"".join(line + b"\n" for line in LINES))
    return tmp_path / "run"


@pytest.mark.parametrize(
    "damage",
    [
        b"\xff\xfe",
        bytes(4096),
        b'{"loss": 1}',
        b'{"step": null}',
        b'{"step": "a", "loss": 1}',
        b'{"step": true}',
        b'{"step": 3, "loss": "a"}',
        b'{"step": 3, "loss": [1]}',
        b'{"step": 3, "evaluated": "a"}',
        b"[" * 100_000,
        b"[1]",
        b'{"step": 1' + b"0" * 5000 + b"}",
        "é".encode("utf-16"),
    ],
    ids=lambda damage: repr(damage[:24]),
)
def test_damaged_lines_of_the_log_are_kept_aside(begun, capfd, damage):
    log = begun / "log.jsonl"
    log.write_bytes(LINES[0] + b"\n" + damage + b"\n" + LINES[1] + b"\n" + b'{"step": 6, "lo')
    run = open_run(begun)
    assert [record["step"] for record in run.read_log()] == [2, 4], "before anything is written"
    for _ in range(2):
        run.begin(4)
        assert [json.loads(line)["loss"] for line in log.read_text().splitlines()] == [1.0, 0.5]
        assert (begun / DAMAGED).read_bytes() == damage + b"\n"
    assert capfd.readouterr().out.count(f"kept in {DAMAGED}: 1") == 1, "it is said once"


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"vae": "v"', b"\xff{}", b"[" * 100_000, b"null"])
def test_data_json_that_is_damaged_is_one_line(begun, content):
    (begun / "data.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"data.json does not say what the run was trained on.*restore"):
        open_run(begun)
    (begun / "data.json").unlink()
    assert changed_data(begun, {"images": 1}) == {}
    open_run(begun)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"- 1",
        b"\xff",
        b"a: [",
        b"? [1]\n: 2",
        b"a: !!int abc",
        b"a: !!bool x",
        b"a: !!timestamp x",
        b"a: &x {b: *x}",
        b"[" * 1_000,
        b"a: &a [1,1]\nb: &b [*a,*a]\n" * 3,
    ],
)
def test_config_yaml_that_is_damaged_is_one_line(begun, content):
    (begun / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config.yaml.*restore the file"):
        open_run(begun)
    with pytest.raises(ConfigError):
        read_config(begun)


def test_any_byte_of_a_run_may_be_another(begun):
    """Each byte of each file in turn: the run goes on, or is refused in one line."""
    for name in ("config.yaml", "data.json", "log.jsonl"):
        whole = (begun / name).read_bytes()
        for i, new in itertools.product(range(len(whole)), (0xFF, ord("["))):
            (begun / name).write_bytes(whole[:i] + bytes([new]) + whole[i + 1 :])
            with contextlib.suppress(ConfigError):
                open_run(begun).read_log()
        (begun / name).write_bytes(whole)
    open_run(begun)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"step": 4}, "its step is 4, expected 3"),
        ({"step": "3"}, "its step is '3', expected 3"),
        ({"step": True}, "its step is True"),
        ({}, "KeyError"),
        ([3], "TypeError"),
    ],
)
def test_a_state_of_another_step_is_refused(tmp_path, state, words):
    """Though its hash is that of the manifest."""
    folder = checkpoint.save_checkpoint(tmp_path, 3, {"model": {"a": torch.ones(3)}}, {}, keep=1)
    (folder / "state.json").write_text(json.dumps(state))
    _seal(folder)
    checkpoint.verify(folder)
    with pytest.raises(CheckpointError, match=words):
        checkpoint.read_state(folder)


def test_weights_that_the_manifest_does_not_list_are_refused(tmp_path):
    folder = checkpoint.save_checkpoint(tmp_path, 3, {"model": {"a": torch.ones(3)}}, {}, keep=1)
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("model.safetensors", "state.json"):
        fewer = {key: value for key, value in manifest["files"].items() if key != name}
        (folder / "manifest.json").write_text(json.dumps(manifest | {"files": fewer}))
        with pytest.raises(CheckpointError, match=f"does not list {name}"):
            checkpoint.verify(folder)


def test_a_data_offset_that_is_no_number_is_refused(recipe, train_here, refused_here, tmp_path):
    config = recipe(train={"max_steps": 1})
    assert train_here("--config", config)[0] == 0
    folder = tmp_path / "run" / "checkpoints" / "step-00000001"
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"data_offset": "x"}))
    _seal(folder)
    assert "data_offset 'x', expected a number of steps" in refused_here("train_dit.py", "--config", config)


def _seal(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: files.fingerprint(folder / name) for name in manifest["files"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_file_system_without_locks_says_so(tmp_path, monkeypatch):
    def no_locks(*arguments):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(lock.fcntl, "lockf", no_locks)
    with pytest.raises(ConfigError, match=r"cannot be locked.*Lustre: the option flock"):
        open_run(tmp_path / "run")
