"""What a run that goes on may have changed, and labels that do not exist (rows 23 and 26)."""

from dataclasses import fields

import pytest
import torch
from conftest import NUM_CLASSES, make_pipeline
from safetensors.torch import load_file

from iwin_dit.config_schema import MAY_CHANGE, Config
from iwin_dit.data.latents import LatentDataset, Shard, write_latents
from iwin_dit.runtime.errors import ConfigError, DataError
from iwin_dit.runtime.run import RunDirectory, flatten

# What decides what is computed, key by key: all of these are refused. The rest may change.
FIXED = {
    *("seed", "data.kind", "data.vae", "data.labels", "data.crop", "data.prepare", "data.random_flip"),
    *("data.normalization", "data.frame_stride", "data.image_share"),
    *(f"model.{f.name}" for f in fields(Config().model) if f.name not in ("mixer", "init_from")),
    *(f"model.mixer.{f.name}" for f in fields(Config().model.mixer)),
    *(f"objective.{f.name}" for f in fields(Config().objective)),
    *(f"optimizer.{f.name}" for f in fields(Config().optimizer)),
    *("ema.decays", "ema.power_stds", "train.batch_images", "train.precision"),
}


def test_23_every_key_is_either_fixed_or_free():
    assert set(flatten(Config().to_dict())) == FIXED | MAY_CHANGE
    assert not FIXED & MAY_CHANGE


@pytest.mark.parametrize("key", sorted(FIXED | MAY_CHANGE))
def test_23_what_a_resumed_run_may_change(key, tmp_path):
    """Each key in turn gets another value; the others stay."""
    config = Config().to_dict()
    run = RunDirectory(tmp_path / "run", config, MAY_CHANGE, {})
    run.begin(0)
    run._lock.close()
    *sections, name = key.split(".")
    section = config
    for part in sections:
        section = section[part]
    before, section[name] = section[name], "something else"
    if key in FIXED:
        with pytest.raises(ConfigError, match=f"{key}: .* -> 'something else'"):
            RunDirectory(tmp_path / "run", config, MAY_CHANGE, {})
    else:
        RunDirectory(tmp_path / "run", config, MAY_CHANGE, {})._lock.close()
    assert before != "something else"


def test_26_labels_out_of_range_are_refused_where_they_are_read(latents_folder, tmp_path):
    shard = load_file(latents_folder / "latents_rank00_shard000.safetensors")
    for label in (NUM_CLASSES, -1):
        labels = shard["labels"].clone()
        labels[3] = label
        folder = tmp_path / str(label)
        names = ["a", "b", "c"]
        write_latents(
            folder,
            [Shard(shard["latents"], shard["latents_flip"], labels)],
            {"vae": "../vae", "class_names": names},
        )
        with pytest.raises(DataError, match=f"label {label}, expected 0 to 2"):
            LatentDataset(folder).draw([0, 3], [False, False], [torch.Generator()] * 2)


def test_26_labels_out_of_range_are_refused_by_the_pipeline():
    pipeline = make_pipeline()
    for label in (1000, -1):
        with pytest.raises(ValueError, match=rf"{label}.*0.*2"):
            pipeline([label], num_inference_steps=1)
