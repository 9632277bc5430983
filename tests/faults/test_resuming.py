"""What a run that goes on may have changed, and labels that do not exist (rows 23 and 26)."""

from dataclasses import fields, replace

import pytest
import torch
from conftest import NUM_CLASSES, make_pipeline
from safetensors.torch import load_file

from iwin_dit.build.trainer import build_run
from iwin_dit.config.bounds import may_change
from iwin_dit.config.classifier import AugmentConfig, ClassifierConfig, ClassifierModelConfig
from iwin_dit.config.schema import Config, ModelConfig
from iwin_dit.data.latents import LatentDataset, Shard, write_latents
from iwin_dit.runtime.errors import ConfigError, DataError
from iwin_dit.runtime.run import RunDirectory, flatten

# What decides what is computed, key by key: all of these are refused. The rest may change.
COMMON = {
    *("seed", "ema.decays", "ema.power_stds", "train.batch_images", "train.precision"),
    *(f"optimizer.{f.name}" for f in fields(Config().optimizer)),
}
FREE_OF_ALIGNMENT = {"alignment.teacher_weights", "alignment.stop_step"}
FREE_OF_MODELS = {"model.mixer", "model.init_from", "model.allow_blind"}
FIXED = COMMON | {
    *(
        "data.kind",
        "data.vae",
        "data.labels",
        "data.split",
        "data.image_column",
        "data.label_column",
        "data.background",
        "data.crop",
        "data.prepare",
        "data.random_flip",
    ),
    *("data.normalization", "data.frame_stride", "data.image_share"),
    *({f"model.{f.name}" for f in fields(Config().model)} - FREE_OF_MODELS),
    *(f"model.mixer.{f.name}" for f in fields(Config().model.mixer)),
    *(f"objective.{f.name}" for f in fields(Config().objective)),
    *({f"alignment.{f.name}" for f in fields(Config().alignment)} - FREE_OF_ALIGNMENT),
}
FIXED_OF_CLASSIFIERS = COMMON | {
    *("data.split", "data.image_column", "data.label_column", "data.background"),
    *("data.labels", "data.prepare", "data.frames", "data.frame_stride", "data.views", "data.image_size"),
    *("data.crop_share", "data.mean", "data.std"),
    *(f"augment.{f.name}" for f in fields(AugmentConfig)),
    *("model.name", "model.options.embed_dim", "model.num_classes", "model.drop_path"),
    *("optimizer.layer_decay", "optimizer.backbone_lr_scale"),
}
CONFIGS = {
    "generator": (Config(model=ModelConfig(size="S/2")), FIXED),
    "classifier": (
        ClassifierConfig(model=ClassifierModelConfig(options={"embed_dim": 8})),
        FIXED_OF_CLASSIFIERS,
    ),
}


def test_23_every_key_is_either_fixed_or_free():
    for config, fixed in CONFIGS.values():
        keys = set(flatten(config.to_dict()))
        assert fixed < keys
        assert keys - fixed == may_change(type(config))


@pytest.mark.parametrize(
    ("kind", "key"), [(kind, key) for kind in CONFIGS for key in sorted(flatten(CONFIGS[kind][0].to_dict()))]
)
def test_23_what_a_resumed_run_may_change(kind, key, tmp_path):
    """Each key in turn gets another value; the others stay."""
    config, fixed = CONFIGS[kind][0].to_dict(), CONFIGS[kind][1]
    free = may_change(type(CONFIGS[kind][0]))
    run = RunDirectory(tmp_path / "run", config, free, {})
    run.begin(0)
    run._lock.close()
    *sections, name = key.split(".")
    section = config
    for part in sections:
        section = section[part]
    before, section[name] = section[name], "something else"
    if key in fixed:
        with pytest.raises(ConfigError, match=f"{key}: .* -> 'something else'"):
            RunDirectory(tmp_path / "run", config, free, {})
    else:
        RunDirectory(tmp_path / "run", config, free, {})._lock.close()
    assert before != "something else"


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_23_a_length_on_which_the_learning_rate_depends_is_kept(kind, schedule, tmp_path):
    """Longer, a cosine would be another one, and its learning rate jump."""
    config = replace(CONFIGS[kind][0], output_dir=str(tmp_path / "run"))
    config = replace(config, optimizer=replace(config.optimizer, schedule=schedule))

    def longer(steps):
        build_run(replace(config, train=replace(config.train, max_steps=steps)), {})._lock.close()

    run = build_run(config, {})
    run.begin(0)
    run._lock.close()
    longer(config.train.max_steps)
    if schedule == "constant":
        longer(500_000)
    else:
        for steps in (500_000, 300_000):
            with pytest.raises(ConfigError) as error:
                longer(steps)
            assert f"begun with train.max_steps 400000, found {steps}: the learning rate" in str(error.value)
            assert f"another output_dir, and model.init_from {tmp_path / 'run'}" in str(error.value)


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
