"""Checkpoints: their manifest, state and tensors, with a manifest that vouches for what is in them."""

import json
import os
import shutil

import torch
from mutate import again, fuzz, mutate_json, mutate_json_text, mutate_safetensors

from iwin_dit.runtime import checkpoint, files


def test_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)
    draw = again("tensors", 0)
    like = {"a": torch.tensor([[draw.random(), 1.0]] * 3), "b": torch.arange(4.0)}
    made = checkpoint.save_checkpoint(tmp_path / "good", 8, {"model": like, "ema": like}, {"offset": 0}, 2)
    good = {path.name: path.read_bytes() for path in made.iterdir()}
    root = tmp_path / "checkpoints"

    def read(rng):
        shutil.rmtree(root, ignore_errors=True)
        directory = root / made.name
        directory.mkdir(parents=True)
        bad, name = (
            dict(good),
            rng.choice(("manifest.json", "state.json", "model.safetensors", "ema.safetensors")),
        )
        change = mutate_safetensors if name.endswith("safetensors") else mutate_json_text
        bad[name] = change(rng, good[name])
        if name != "manifest.json" and rng.random() < 0.9:
            manifest = json.loads(good["manifest.json"])
            manifest["files"] = {file: files.digest(bad[file]) for file in manifest["files"]}
            manifest = mutate_json(rng, manifest) if rng.random() < 0.1 else manifest
            bad["manifest.json"] = json.dumps(manifest).encode()
        for file, content in bad.items():
            (directory / file).write_bytes(content)
        newest = checkpoint.newest(root)
        if newest is None:
            return "none"
        state = checkpoint.read_state(newest)
        assert state["step"] >= 0
        for group in ("model", "ema"):
            tensors = checkpoint.read_tensors(newest, group, like=like)
            assert {key: t.shape for key, t in tensors.items()} == {key: t.shape for key, t in like.items()}
            assert all(torch.isfinite(t).all() for t in tensors.values())
        return "accepted"

    ends = fuzz("checkpoints", read, full=6_000, short=200)
    assert ends["refused"] > 0.5 * ends.total()
