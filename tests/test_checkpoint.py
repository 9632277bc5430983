"""Checkpoints are complete or invisible; damage is found."""

import contextlib
import json
import shutil
import time

import pytest
import torch

from iwin_dit.runtime import checkpoint, files
from iwin_dit.runtime.errors import CheckpointError, ConfigError
from iwin_dit.runtime.run import RunDirectory

TENSORS = {
    "model": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)},
    "optimizer": {"a/step": torch.tensor(3.0)},
}
STATE = {"note": "hello"}


def write(root, step, keep=2):
    return checkpoint.save_checkpoint(root, step, TENSORS, STATE, keep)


def test_round_trip(tmp_path):
    directory = write(tmp_path, 10)
    assert checkpoint.newest(tmp_path) == directory
    assert checkpoint.read_state(directory) == {"step": 10, "note": "hello"}
    for name, tensors in TENSORS.items():
        read = checkpoint.read_tensors(directory, name, like=tensors)
        assert all(torch.equal(read[key], tensors[key]) for key in tensors)
    assert sorted(p.name for p in directory.iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]


def test_the_newest_few_are_kept(tmp_path):
    for step in (5, 10, 100, 20):
        write(tmp_path, step)
    assert [d.name for d in checkpoint.step_directories(tmp_path)] == ["step-00000020", "step-00000100"]
    assert checkpoint.step_of(checkpoint.newest(tmp_path)) == 100


@pytest.mark.parametrize("operation", ["write", "publish", "fsync_directory", "remove_tree"])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_write_that_breaks_off_leaves_the_previous_checkpoint(tmp_path, monkeypatch, operation, after):
    """Whatever operation is the last one, there is a good checkpoint, and the next save works."""
    write(tmp_path, 1, keep=1)
    real, calls = getattr(files, operation), []

    def breaks(*arguments):
        calls.append(arguments)
        if len(calls) == after:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(files, operation, breaks)
    with contextlib.suppress(KeyboardInterrupt):
        write(tmp_path, 2, keep=1)
    monkeypatch.undo()
    found = checkpoint.newest(tmp_path)
    assert checkpoint.read_state(found)["step"] in (1, 2)
    write(tmp_path, 3, keep=1)
    assert checkpoint.step_of(checkpoint.newest(tmp_path)) == 3


def test_files_reach_the_disk_before_their_name_does(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "rename"):
        real = getattr(files.os, name)
        monkeypatch.setattr(files.os, name, lambda *a, n=name, r=real: (order.append(n), r(*a))[1])
    write(tmp_path, 1)
    assert order == ["fsync"] * 5 + [
        "rename",
        "fsync",
    ]  # four files and their directory, the rename, the parent


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_damage_is_found_and_the_next_good_one_named(tmp_path, name):
    write(tmp_path, 1)
    path = write(tmp_path, 2) / name
    content = path.read_bytes()
    for damaged, message in (
        (content[:-1], f"has {len(content) - 1} bytes, the manifest says {len(content)}"),
        (bytes([content[0] ^ 1]) + content[1:], "SHA-256"),
        (content[:-1] + bytes([content[-1] ^ 128]), "SHA-256"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{message}.*go on from step-00000001"):
            checkpoint.newest(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.newest(tmp_path)
    shutil.rmtree(tmp_path / "step-00000001")
    with pytest.raises(CheckpointError, match="no older one is intact"):
        checkpoint.newest(tmp_path)


def test_manifests_that_are_not_ours(tmp_path):
    manifest = write(tmp_path, 1) / "manifest.json"
    good = json.loads(manifest.read_text())
    for content, message in (
        ("not json", "not the manifest"),
        ("[]", "not the manifest"),
        (json.dumps(good | {"schema": 99}), "has schema 99, this version reads 1"),
        (json.dumps(good | {"files": {"../x": {"bytes": 1, "sha256": ""}}}), "does not exist"),
    ):
        manifest.write_text(content)
        with pytest.raises(CheckpointError, match=message):
            checkpoint.newest(tmp_path)


def test_tensors_that_do_not_fit_the_model(tmp_path):
    directory = write(tmp_path, 1)
    for like, name in (
        ({"a": torch.zeros(2, 3)}, "b"),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(4), "c": torch.zeros(1)}, "c"),
        ({"a": torch.zeros(3, 2), "b": torch.zeros(4)}, "a"),
    ):
        with pytest.raises(CheckpointError, match=f"does not fit the model at {name};"):
            checkpoint.read_tensors(directory, "model", like=like)
    bad = {"model": {"a": torch.tensor([1.0, torch.inf])}}
    directory = checkpoint.save_checkpoint(tmp_path, 2, bad, {}, keep=2)
    with pytest.raises(CheckpointError, match="not finite at a"):
        checkpoint.read_tensors(directory, "model")


def test_a_failure_to_prune_is_a_warning(tmp_path, monkeypatch):
    write(tmp_path, 1, keep=1)

    def fails(path):
        raise PermissionError("no")

    monkeypatch.setattr(files, "remove_tree", fails)
    with pytest.warns(UserWarning, match="could not remove the old checkpoint"):
        write(tmp_path, 2, keep=1)
    monkeypatch.undo()
    write(tmp_path, 3, keep=1)
    assert len(checkpoint.step_directories(tmp_path)) == 1


def test_a_run_keeps_its_config(tmp_path):
    config = {"model": {"depth": 2}, "train": {"max_steps": 10}}
    allowed = frozenset(["train.max_steps"])
    run = RunDirectory(tmp_path / "run", config, allowed, {"vae": "a"})
    with pytest.raises(ConfigError, match=r"in use, held by pid \d+ on host"):
        RunDirectory(tmp_path / "run", config, allowed, {"vae": "a"})
    run.begin(0)
    run._lock.close()
    RunDirectory(tmp_path / "run", config | {"train": {"max_steps": 20}}, allowed, {"vae": "a"})._lock.close()
    with pytest.raises(ConfigError, match=r"model.depth: 2 -> 3"):
        RunDirectory(tmp_path / "run", config | {"model": {"depth": 3}}, allowed, {})


def test_a_run_keeps_its_data(tmp_path):
    run = RunDirectory(tmp_path, {}, frozenset(), {"vae": "a", "images": 10})
    run.begin(0)
    run._lock.close()
    with pytest.raises(ConfigError, match=r"begun on other data \(vae: 'a' -> 'b'\)"):
        RunDirectory(tmp_path, {}, frozenset(), {"vae": "b", "images": 10})


def test_the_log_is_rewound_and_a_torn_line_is_dropped(tmp_path):
    run = RunDirectory(tmp_path, {}, frozenset(), {})
    for step in (1, 2, 3):
        run.log({"step": step, "time": time.time()})
    with open(run.log_path, "a") as file:
        file.write('{"step": 4, "lo')
    assert [record["step"] for record in run.read_log()] == [1, 2, 3]
    run.begin(2)
    assert [json.loads(line)["step"] for line in run.log_path.read_text().splitlines()] == [1, 2]


def test_a_path_that_cannot_be_a_run(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        RunDirectory(tmp_path / "file" / "run", {}, frozenset(), {})
