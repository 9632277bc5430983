"""Folders of latents: the index, headers of shards and their bytes, then all that a run does with them."""

import json
import os

import pytest
import torch
from mutate import fuzz, mutate_bytes, mutate_json, mutate_json_text, mutate_safetensors

from iwin_dit.data import inspection
from iwin_dit.data.examples import TrainingExamples
from iwin_dit.data.latents import LatentDataset, Shard, write_latents
from iwin_dit.runtime import files
from iwin_dit.runtime.errors import DataError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Eleven images of three classes in two shards, with the posterior's std."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(inspection, "progress", lambda items, **_: items)
    draw = torch.Generator().manual_seed(0)
    sizes = [(count, *[torch.randn(count, 4, 2, 2, generator=draw) for _ in range(2)]) for count in (6, 5)]
    shards = [Shard(x, y, torch.arange(count) % 3, x.abs(), y.abs()) for count, x, y in sizes]
    write_latents(
        tmp_path / "latents", shards, {"vae": "vae", "image_size": [4, 4], "class_names": ["a", "b", "c"]}
    )
    return tmp_path / "latents"


def test_latents(folder):
    good = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    shards = sorted(name for name in good if name.endswith(".safetensors"))

    def read(rng):
        bad, index, what = dict(good), json.loads(good["index.json"]), rng.randrange(10)
        name = rng.choice(shards)
        if what < 7 and what != 3:  # 3, 4: the index and a shard
            bad[name] = mutate_safetensors(rng, good[name]) if what > 2 else bad[name]
        if what < 5:
            bad["index.json"] = mutate_json_text(rng, good["index.json"])
        elif what == 7:
            bad[shards[0]] = good[shards[1]]
        elif what == 8:
            bad[name] = mutate_bytes(rng, good[name])
        else:
            bad["index.json"] = json.dumps(mutate_json(rng, index)).encode()
        if rng.random() < 0.7:
            bad["index.json"] = vouch(bad["index.json"], bad)
        for name, data in bad.items():
            (folder / name).write_bytes(data)
        data = LatentDataset(folder)
        json.dumps(data.identity)
        assert len(data) > 0
        inspection.describe(folder)
        examples = TrainingExamples(data, 0, True, 0.1, len(data.class_names))
        drawn = examples.__getitems__(list(range(len(data))))
        is_finite = bool(torch.isfinite(drawn.x0).all())
        try:
            inspection.verify(folder)
        except DataError:
            return "found by its hash"
        assert is_finite, "latents that are not finite pass verify"
        return "accepted"

    ends = fuzz("latents", read, full=12_000, short=300)
    assert ends["refused"] > 0.5 * ends.total()
    assert ends["accepted"]


def vouch(index, contents):
    """The index with sizes and hashes of its shards as they are, as a stranger would write it."""
    try:
        value = json.loads(index)
        for entry in value["shards"]:
            entry.update(files.digest(contents[entry["file"]]))
        return json.dumps(value).encode()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return index
