"""Every lever of a recipe trains images and clips, resumes to the same bits, and its pipeline draws."""

import json

import pytest
import torch
import yaml
from conftest import (
    ROOT,
    assert_equal,
    assert_two_processes_train_the_same,
    make_vae,
    read_checkpoint,
    stopped_before,
)
from PIL import Image

from iwin_dit.build.loading import load_pipeline
from iwin_dit.config.schema import SampleConfig
from iwin_dit.data.latents import Shard, write_latents

LEVERS = {
    "token dropping": dict(
        model={"depth": 3, "dense_blocks": [1, 1], "dense_from_step": 3}, sample={"path_drop": True}
    ),
    "value residual": dict(model={"value_residual": True}),
    "muon": dict(optimizer={"name": "muon", "schedule": "linear", "min_learning_rate": 1e-4}),
    "shift": dict(objective={"shift": 2.0}, sample={"sampler": "unipc"}),
    "data": dict(objective={"prediction": "data", "logit_mean": 0.8, "logit_std": 0.8}),
    "internal guidance": dict(model={"base_block": 1}, sample={"internal_guidance": 1.5}),
    "internal guidance of noise": dict(
        objective={"name": "ddpm"}, model={"base_block": 1}, sample={"internal_guidance": 1.5}
    ),
    "self-alignment": dict(
        alignment={"teacher": "self", "student_block": 1, "teacher_block": 2, "projector": "conv"}
    ),
    "self-alignment of noise": dict(
        objective={"name": "ddpm"}, alignment={"teacher": "self", "stop_step": 3, "time_gap": 0.5}
    ),
    "patch bottleneck": dict(
        model={"patch_bottleneck": 6, "patch_size": 2, "mixer": {"window_size": "auto"}}
    ),
    "sde": dict(sample={"sampler": "euler_maruyama"}),
    "zero star": dict(sample={"guidance": "cfg_zero_star", "guidance_rescale": 0.5, "shift": 3.0}),
}
CLIPS = {"sample_frames": 2, "mixer": {"window_size": "auto"}}


@pytest.fixture(scope="session")
def clips_folder(tmp_path_factory):
    """12 clips of two frames, as random latents."""
    root = tmp_path_factory.mktemp("clips")
    make_vae().save_pretrained(root / "vae")
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 12, 4, 2, 8, 8, generator=generator)
    facts = {
        "vae": "../vae",
        "image_size": [16, 16],
        "class_names": ["a", "b", "c"],
        "frames": 2,
        "frame_stride": 1,
    }
    write_latents(root / "latents", [Shard(*latents, torch.arange(12) % 3)], facts)
    return root / "latents"


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("lever", LEVERS)
def test_a_lever_trains_resumes_and_draws(lever, rank, recipe, clips_folder, train_here, run_here, tmp_path):
    options = {key: dict(value) for key, value in LEVERS[lever].items()}
    if rank == 3:
        options["model"] = options.get("model", {}) | CLIPS
        options["data"] = {"path": str(clips_folder)}
    options["train"] = {"max_steps": 4, "save_every_steps": 2, "keep_checkpoints": 5}
    config = recipe(**options)
    code, output = train_here("--config", config)
    assert code == 0, output
    again = stopped_before(tmp_path / "run", 4)
    code, output = train_here("--config", config, "--output_dir", again)
    assert code == 0, output
    assert_equal(read_checkpoint(tmp_path / "run", 4), read_checkpoint(again, 4))
    moved, start = read_checkpoint(again, 4)["model"], read_checkpoint(again, 2)["model"]
    assert any(not torch.equal(moved[name], start[name]) for name in moved)

    out = tmp_path / "samples.png"
    run_here("sample.py", "--checkpoint", again / "pipeline", "--class", 1, "--num-images", 1, "--out", out)
    drawn = json.loads(out.with_suffix(".json").read_text())
    for key, value in options.get("sample", {}).items():
        found = drawn["scheduler_settings"] if key == "shift" else drawn
        if key != "sampler":
            assert found[key] == value
    settings = load_pipeline(str(again / "pipeline")).scheduler.config
    if lever == "shift":
        assert settings["flow_shift"] == 2.0, "sampling takes the shift of training"


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
@pytest.mark.parametrize("lever", ["muon", "internal guidance", "data"])
def test_two_processes_train_the_same(lever, sharding, recipe, tmp_path):
    options = {key: dict(value) for key, value in LEVERS[lever].items()}
    config = recipe(**options, train={"max_steps": 3, "save_every_steps": 3})
    assert_two_processes_train_the_same(config, sharding, tmp_path)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_tiny_copy_of_every_recipe_trains_and_draws(
    path, latents_folder, clips_folder, train_here, run_here, tmp_path
):
    """Each with all that it chooses, but for its sizes, its data and its number of steps."""
    content = yaml.safe_load(path.read_text())
    model, train, data = content["model"], content["train"], content["data"]
    model |= {"size": None, "depth": 3, "width": 32, "heads": 2, "patch_size": 1, "num_classes": 3}
    model |= {"in_channels": 4, "sample_size": 8}
    model |= {key: value for key, value in {"base_block": 1, "dense_blocks": [1, 1]}.items() if key in model}
    if "window_size" in (mixer := model.get("mixer", {})):
        model["mixer"] = mixer | {"window_size": "auto"}
    if "sample_frames" in model:
        model["sample_frames"] = 2
    data |= {"path": str(clips_folder if "sample_frames" in model else latents_folder), "prepare": None}
    if data.get("vae") == "none":  # pixels
        for i in range(6):
            file = tmp_path / "images" / "abc"[i % 3] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (40 * i, 90, 10)).save(file)
        data |= {"path": str(tmp_path / "images"), "kind": "images"}
        model |= {"in_channels": 3, "sample_size": 16, "patch_size": 4, "patch_bottleneck": 6}
    if "dense_from_step" in model:
        model["dense_from_step"] = 1
    train |= {"max_steps": 2, "batch_images": 4, "precision": "fp32", "num_workers": 0}
    train |= {"save_every_steps": 2, "log_every_steps": 1, "sample_every_steps": 0}
    content["optimizer"] |= {"warmup_steps": 0} if "warmup_steps" in content["optimizer"] else {}
    content["output_dir"] = str(tmp_path / "run")
    content["sample"]["num_inference_steps"] = 2
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content))
    code, output = train_here("--config", tmp_path / "tiny.yaml")
    assert code == 0, output
    out = tmp_path / "samples.png"
    run_here("sample.py", "--checkpoint", tmp_path / "run", "--class", 1, "--num-images", 1, "--out", out)
    drawn = json.loads(out.with_suffix(".json").read_text())
    assert drawn["guidance_scale"] == content["sample"].get("guidance_scale", SampleConfig().guidance_scale)
