"""Checkpoints and run directories; what damages them is in tests/faults."""

import json
import time

import pytest
import torch

from iwin_dit.runtime import checkpoint
from iwin_dit.runtime.errors import ConfigError
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


def test_all_are_kept_where_no_number_is_given(tmp_path):
    for step in (1, 2, 123_456_789):
        write(tmp_path, step, keep=None)
    assert [checkpoint.step_of(d) for d in checkpoint.step_directories(tmp_path)] == [1, 2, 123_456_789]


def test_a_step_that_is_there_is_not_written_again(tmp_path):
    manifest = write(tmp_path, 1) / "manifest.json"
    before = manifest.stat().st_mtime_ns
    assert write(tmp_path, 1) == manifest.parent
    assert manifest.stat().st_mtime_ns == before


def test_a_run_keeps_its_config(tmp_path):
    config = {"model": {"depth": 2}, "train": {"max_steps": 10}}
    allowed = frozenset(["train.max_steps"])
    run = RunDirectory(tmp_path / "run", config, allowed, {"vae": "a"})
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
