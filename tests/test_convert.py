"""Importers of official checkpoints against figures from the official implementations (tests/data)."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_vae
from safetensors import safe_open

from iwin_dit.build.data import read_statistics
from iwin_dit.build.loading import begin_from, choose_sampler, load_pipeline
from iwin_dit.commands.convert import main, read_config
from iwin_dit.convert import (
    from_dit,
    from_flashdit,
    from_iwin_transformer,
    from_ldm_vae,
    from_lightningdit,
    load_official,
)
from iwin_dit.models.transformer import IwinDiTTransformer2DModel
from iwin_dit.runtime.errors import CheckpointError, ConfigError, DataError, run_script

DATA = Path(__file__).parent / "data"
IMPORTERS = {"flashdit_0": from_flashdit, "lightningdit_0": from_lightningdit, "dit_0": from_dit}


def read(name):
    """Weights, inputs, outputs and the official constructor's arguments of one vector."""
    with safe_open(DATA / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    groups = {"weight": {}, "input": {}, "output": {}}
    for key, tensor in tensors.items():
        group, _, rest = key.partition(".")
        groups[group][rest] = tensor
    return groups["weight"], groups["input"], groups["output"].get("prediction"), config


def answer(model, inputs, noise_first):
    timesteps = 1000 * (1 - inputs["timesteps"]) if noise_first else inputs["timesteps"]
    with torch.no_grad():
        prediction = model(inputs["latents"], timesteps, inputs["labels"]).sample
    return -prediction if noise_first else prediction


@pytest.mark.parametrize("name", IMPORTERS)
def test_official_predictions_are_met(name):
    weights, inputs, expected, config = read(name)
    model = IMPORTERS[name](weights, config)
    torch.testing.assert_close(answer(model, inputs, name != "dit_0"), expected, rtol=1e-4, atol=1e-5)


def test_integer_and_float_timesteps_agree():
    weights, inputs, expected, config = read("dit_0")
    inputs["timesteps"] = inputs["timesteps"].float()
    torch.testing.assert_close(
        answer(from_dit(weights, config), inputs, False), expected, rtol=1e-4, atol=1e-5
    )


def test_training_checkpoints_are_unwrapped_ema_first():
    weights, inputs, expected, config = read("flashdit_0")
    wrapped = {
        "model": {f"module.{k}": torch.zeros_like(v) for k, v in weights.items()},
        "ema": {f"module.{k}": v for k, v in weights.items()},
        "opt": {},
    }
    model = from_flashdit(wrapped, config)
    torch.testing.assert_close(answer(model, inputs, True), expected, rtol=1e-4, atol=1e-5)


def test_discarded_sigma_is_dropped_at_import():
    """LightningDiT and FlashDiT with learn_sigma compute 2 C channels and return the first C."""
    weights, inputs, expected, config = read("flashdit_0")
    for leaf in ("weight", "bias"):
        rows = weights[f"final_layer.linear.{leaf}"]
        weights[f"final_layer.linear.{leaf}"] = torch.cat([rows, torch.randn_like(rows)])
    model = from_flashdit(weights, config | {"learn_sigma": True})
    torch.testing.assert_close(answer(model, inputs, True), expected, rtol=1e-4, atol=1e-5)


def test_names_that_do_not_fit_are_listed():
    weights, _, _, config = read("flashdit_0")
    weights["blocks.0.surprise.weight"] = weights.pop("blocks.0.attn.qkv.weight")
    with pytest.raises(
        ValueError, match=r"missing blocks\.0\.attn\.qkv\.weight; unexpected blocks\.0\.surprise\.weight"
    ):
        from_flashdit(weights, config)


def test_arguments_that_do_not_fit_are_listed():
    weights, _, _, config = read("flashdit_0")
    with pytest.raises(ValueError, match="unknown arguments windw_size"):
        from_flashdit(weights, config | {"windw_size": 4})
    with pytest.raises(ValueError, match=r"x_embedder\.proj\.weight \(48, 8, 1, 1\)|instead of"):
        from_flashdit(weights, config | {"in_channels": 4})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"depth": "2"}, "depth is '2', expected a whole number of at least 1"),
        ({"num_heads": 0}, "num_heads is 0, expected a whole number of at least 1"),
        ({"num_heads": 5}, "num_heads is 5, expected a divisor of hidden_size 48"),
        ({"patch_size": True}, "patch_size is True, expected a whole number"),
        ({"mlp_ratio": None}, "mlp_ratio is None, expected a number above 0"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio is nan, expected a number above 0"),
        ({"class_dropout_prob": 2}, "class_dropout_prob is 2, expected a number from 0 to 1"),
        ({"learn_sigma": "no"}, "learn_sigma is 'no', expected true or false"),
        ({"learn_sigma": True}, r"final_layer\.linear\.weight is \(8, 48\), expected 16 rows"),
        ({"window_size": []}, r"window_size is \[\], expected a whole number of at least 1, or a list"),
        ({"window_size": [4, 0]}, r"window_size is \[4, 0\], expected"),
        ({3: 4, "a": 5}, "unknown arguments 3, a; the official constructor has"),
    ],
)
def test_values_of_another_kind_are_refused(given, message):
    weights, _, _, config = read("flashdit_0")
    with pytest.raises(ValueError, match=message):
        from_flashdit(weights, config | given)


def test_values_of_the_other_constructors_are_checked():
    weights, _, _, config = read("iwin_classifier_1")
    for given, message in (
        ({"num_heads": 2}, "num_heads is 2, expected a list of whole numbers"),
        ({"num_heads": [0, 4]}, r"num_heads is \[0, 4\], expected a list"),
        ({"mlp_ratio": "4"}, "mlp_ratio is '4', expected a number above 0"),
        ({"qk_scale": 0}, "qk_scale is 0, expected a number above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            from_iwin_transformer(weights, config | given)
    weights, _, _, config = read("ldm_vae_0")
    for given, message in (
        ({"ch_mult": []}, r"ch_mult is \[\], expected a list of whole numbers"),
        ({"attn_resolutions": 8}, "attn_resolutions is 8, expected a list"),
        ({"embed_dim": "8"}, "embed_dim is '8', expected a whole number"),
        ({"ddconfig": 3}, "ddconfig is int, expected arguments by name"),
    ):
        with pytest.raises(ValueError, match=message):
            from_ldm_vae(weights, config | given)


ODD = {
    "dit_0": (from_dit, "x_embedder.proj.weight", r" \(3,\) instead of \(48, 16\)"),
    "ldm_vae_0": (from_ldm_vae, "encoder.conv_in.weight", r" \(3,\) instead of \(32, 3, 3, 3\)"),
    "iwin_classifier_1": (from_iwin_transformer, "patch_embed.proj.weight", r" is \(3,\), expected two axes"),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_tensor_by_name_is_refused(name):
    weights, _, _, config = read(name)
    convert, key, misshapen = ODD[name]
    for odd, message in (
        ({3: torch.ones(1)}, "has the key 3, expected names of tensors"),
        ({key: 1.0}, f"{key} is float, expected a tensor; give the weights alone, or under"),
        ({key: torch.ones(3)}, f"{key}{misshapen}"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(weights | odd, config)
        with pytest.raises(ValueError, match=message):
            convert({"ema": weights | odd}, config)


def test_the_first_ten_names_are_listed():
    weights, _, _, config = read("dit_0")
    with pytest.raises(ValueError, match=r"missing blocks\..* and \d\d\d more; unexpected none") as caught:
        from_dit(weights, config | {"depth": 28})
    assert len(str(caught.value)) < 500
    weights, _, _, config = read("flashdit_0")
    with pytest.raises(ValueError, match=r"instead of .* and \d+ more$"):
        from_flashdit(weights, config | {"hidden_size": 40})


def test_a_config_is_arguments_by_name(tmp_path):
    for text, message in (
        ("depth: !!timestamp 2001-99-99", "is not valid YAML: line 1: '2001-99-99' is not what its tag"),
        ("[1]", "holds list, expected keys and values"),
    ):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_config(str(tmp_path / "config.yaml"), "dit")


def test_a_position_table_of_another_size_is_refused():
    weights, _, _, config = read("dit_0")
    with pytest.raises(ValueError, match="not the fixed table of a 16 x 16 grid"):
        from_dit(weights, config | {"input_size": 32})


def test_official_files_are_read_without_running_code(tmp_path):
    marker = tmp_path / "marker"

    class Malicious:
        def __reduce__(self):
            return (marker.write_text, ("ran",))

    torch.save({"ema": {"w": torch.ones(2)}, "args": Namespace(model="DiT-XL/2")}, tmp_path / "good.pt")
    torch.save({"ema": Malicious()}, tmp_path / "bad.pt")
    assert load_official(tmp_path / "good.pt")["ema"]["w"].tolist() == [1, 1]
    with pytest.raises(Exception, match="objects that could run code are not read"):
        load_official(tmp_path / "bad.pt")
    assert not marker.exists()


@pytest.fixture
def convert_here(monkeypatch, capfd):
    """``convert_here(*arguments, error=None)``: python -m iwin_dit.convert; its one line has the error."""

    def call(*arguments, error=None):
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run_script(main)
        output = "".join(capfd.readouterr())
        assert ended.value.code == (0 if error is None else 2), output
        assert error is None or (error in output and output.count("\n") == 1), output

    return call


def official_file(name, folder):
    """A vector's weights as a training checkpoint, and its config."""
    weights, _, _, config = read(name)
    torch.save({"ema": weights, "best_fid": np.float64(9.6)}, folder / f"{name}.pt")
    (folder / f"{name}.json").write_text(json.dumps(config))
    return folder / f"{name}.pt", "--config", folder / f"{name}.json"


@pytest.mark.parametrize("name", IMPORTERS)
def test_an_imported_pipeline_draws_what_the_model_draws(name, convert_here, run_here, tmp_path):
    """From the official file to pixels, against a loop over the imported model."""
    kind = name.removesuffix("_0")
    weights, _, _, config = read(name)
    model, channels = IMPORTERS[name](weights, config), config["in_channels"]
    make_vae(channels).save_pretrained(tmp_path / "vae")
    mean, std = torch.linspace(-1, 1, channels), torch.linspace(0.5, 2, channels)
    statistics = ()
    if kind != "dit":
        torch.save({"mean": mean.view(1, -1, 1, 1), "std": std.view(1, -1, 1, 1)}, tmp_path / "stats.pt")
        statistics = ("--latents-stats", tmp_path / "stats.pt")
    file, *given = official_file(name, tmp_path)
    convert_here(kind, file, tmp_path / "out", *given, "--vae", tmp_path / "vae", *statistics)
    pipeline = load_pipeline(str(tmp_path / "out"))
    choose_sampler(pipeline, "ddim" if kind == "dit" else None)
    noise = torch.randn(2, channels, *model.latent_size, generator=torch.Generator().manual_seed(0))
    options = dict(guidance_scale=1.0, num_inference_steps=4, output_type="pt")
    images = pipeline([0, 3], latents=noise, **options).images

    scheduler = pipeline.scheduler
    if kind == "dit":
        assert pipeline.config.latents_mean is None  # as the autoencoder says
        mean, std = torch.zeros(channels), torch.full((channels,), 1 / pipeline.vae.config.scaling_factor)
        assert scheduler.config.timestep_spacing == "leading", "as it is published"
        scheduler.set_timesteps(4)
        times = scheduler.timesteps
    else:
        times = [1000.0, 750.0, 500.0, 250.0]
    x = noise
    for t in times:
        with torch.no_grad():
            prediction = model(x, torch.tensor([float(t)] * 2), torch.tensor([0, 3])).sample[:, :channels]
        x = scheduler.step(prediction, t, x).prev_sample if kind == "dit" else x - prediction / 4
    latents = x * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
    with torch.no_grad():
        pixels = pipeline.vae.decode(latents).sample
    torch.testing.assert_close(images, (pixels / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=1e-4)
    command = ("sample.py", "--checkpoint", tmp_path / "out", "--class", 0, "--num-images", 1, "--steps", 1)
    run_here(*command, "--guidance-scale", 1, "--out", tmp_path / "x.png")


def test_an_imported_model_is_what_training_begins_from(convert_here, refused_here, tmp_path):
    weights, _, _, config = read("flashdit_0")
    file, *given = official_file("flashdit_0", tmp_path)
    convert_here("flashdit", file, tmp_path / "out", *given)
    model = from_flashdit(weights, config)
    other = IwinDiTTransformer2DModel.from_config(model.config)
    begin_from(other, str(tmp_path / "out"))
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in other.state_dict().items())
    command = ("sample.py", "--checkpoint", tmp_path / "out", "--class", 0, "--out", tmp_path / "x.png")
    assert "holds a model without its autoencoder, which model.init_from takes" in refused_here(*command)
    weight = tmp_path / "out" / "diffusion_pytorch_model.safetensors"
    weight.write_bytes(weight.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'out'} is a damaged model"):
        begin_from(other, str(tmp_path / "out"))
    (tmp_path / "out" / "config.json").write_text('{"_class_name": ["AutoencoderKL"]}')
    with pytest.raises(CheckpointError, match=r"_class_name \['AutoencoderKL'\], expected IwinDiT"):
        begin_from(other, str(tmp_path / "out"))


def test_what_makes_no_pipeline_is_refused(convert_here, tmp_path):
    make_vae(3).save_pretrained(tmp_path / "vae")
    for name, arguments, error in [
        ("flashdit_0", ("--vae", tmp_path / "vae"), "give them by --latents-stats"),
        (
            "dit_0",
            ("--latents-stats", tmp_path / "s.pt"),
            "--latents-stats belongs to a pipeline; give --vae",
        ),
        ("dit_0", ("--vae", tmp_path / "vae"), "has 3 latent channels, the model has 4; take its own"),
        ("ldm_vae_0", ("--vae", tmp_path / "vae"), "--vae is for a model that draws"),
    ]:
        file, *given = official_file(name, tmp_path)
        convert_here(name.removesuffix("_0"), file, tmp_path / "out", *given, *arguments, error=error)
    for content in ({"mean": torch.zeros(4)}, {"mean": torch.zeros(3), "std": torch.ones(4)}, {"mean": "x"}):
        torch.save(content, tmp_path / "s.pt")
        with pytest.raises(DataError, match="numbers, expected 4, one for each latent channel"):
            read_statistics(tmp_path / "s.pt", 4)
    torch.save({"mean": torch.zeros(4), "std": torch.zeros(4)}, tmp_path / "s.pt")
    with pytest.raises(DataError, match="finite and above 0"):
        read_statistics(tmp_path / "s.pt", 4)


AUTHORS = dict(mixer={"window_size": 8}, num_classes=1000)
COUNTS = {  # the authors' options: SwiGLU, RMSNorm, Iwin; and LightningDiT's
    "B/1": (137_538_848, AUTHORS),
    "L/1": (483_326_976, AUTHORS),
    "XL/1": (712_475_552, AUTHORS),
    "1p0B/1": (1_086_036_512, AUTHORS),
    "1p6B/1": (1_721_775_696, AUTHORS),
    "XL/2": (712_438_672, AUTHORS | dict(in_channels=4, sample_size=32)),
    "LightningDiT-XL/1": (
        674_961_824,
        dict(mixer={"name": "global"}, position_embedding="sincos+rope", open_gates=False),
    ),
}


@pytest.mark.parametrize("size", COUNTS)
def test_parameter_counts(size):
    count, options = COUNTS[size]
    with torch.device("meta"):
        model = IwinDiTTransformer2DModel.from_size(size.removeprefix("LightningDiT-"), **options)
    assert sum(p.numel() for p in model.parameters()) == count
