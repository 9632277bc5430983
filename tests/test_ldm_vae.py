"""LDM's autoencoder against figures that the official implementation computed (tests/data)."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open

from iwin_dit.convert import from_ldm_vae

DATA = Path(__file__).parent / "data" / "ldm_vae_0.safetensors"
VAVAE = dict(
    ch=128,
    ch_mult=[1, 1, 2, 2, 4],
    num_res_blocks=2,
    resolution=256,
    attn_resolutions=[16],
    z_channels=32,
)


@pytest.fixture
def vector():
    """Weights, pixels, moments, reconstruction and the official constructor's arguments."""
    with safe_open(DATA, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    weights = {k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")}
    names = ("input.pixels", "output.moments", "output.reconstruction")
    return weights, *(tensors[name] for name in names), config


def official_shapes(config):
    """Names and shapes of an official autoencoder's tensors, level by level."""
    shapes = {}

    def conv(name, ins, outs, size):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outs, ins, size, size), (outs,)

    def norm(name, width):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def block(name, ins, outs):
        norm(f"{name}.norm1", ins)
        conv(f"{name}.conv1", ins, outs, 3)
        norm(f"{name}.norm2", outs)
        conv(f"{name}.conv2", outs, outs, 3)
        if ins != outs:
            conv(f"{name}.nin_shortcut", ins, outs, 1)

    def attention(name, width):
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    def level(name, index, ins, layers):
        outs = config["ch"] * config["ch_mult"][index]
        for layer in range(layers):
            block(f"{name}.block.{layer}", ins if layer == 0 else outs, outs)
            if config["resolution"] // 2**index in config["attn_resolutions"]:
                attention(f"{name}.attn.{layer}", outs)
        return outs

    def ends(name, ins, first, middle, last, outs):
        conv(f"{name}.conv_in", ins, first, 3)
        block(f"{name}.mid.block_1", middle, middle)
        attention(f"{name}.mid.attn_1", middle)
        block(f"{name}.mid.block_2", middle, middle)
        norm(f"{name}.norm_out", last)
        conv(f"{name}.conv_out", last, outs, 3)

    levels, z = len(config["ch_mult"]), config["z_channels"]
    width = config["ch"]
    for index in range(levels):
        width = level(f"encoder.down.{index}", index, width, config["num_res_blocks"])
        if index < levels - 1:
            conv(f"encoder.down.{index}.downsample.conv", width, width, 3)
    ends("encoder", 3, config["ch"], width, width, 2 * z)
    middle = width
    for index in reversed(range(levels)):
        width = level(f"decoder.up.{index}", index, width, config["num_res_blocks"] + 1)
        if index > 0:
            conv(f"decoder.up.{index}.upsample.conv", width, width, 3)
    ends("decoder", z, middle, middle, width, 3)
    conv("quant_conv", 2 * z, 2 * z, 1)
    conv("post_quant_conv", z, z, 1)
    return shapes


@torch.no_grad()
def answer(model, pixels):
    """Moments, and the reconstruction of the mean."""
    moments = model.encode(pixels).latent_dist.parameters
    return moments, model.decode(moments.chunk(2, dim=1)[0]).sample


def check(model, vector):
    _, pixels, *expected, _ = vector
    torch.testing.assert_close(answer(model, pixels), tuple(expected), rtol=1e-4, atol=1e-5)


def test_official_moments_and_reconstructions_are_met(vector):
    weights, pixels, moments, _, config = vector
    model = from_ldm_vae(weights, config)
    check(model, vector)
    assert not model.training
    assert model.config.scaling_factor == 1.0
    mean, log_variance = moments.chunk(2, dim=1)
    with torch.no_grad():
        found = model.encode(pixels).latent_dist
    torch.testing.assert_close((found.mean, found.logvar), (mean, log_variance), rtol=1e-4, atol=1e-5)


def test_attention_has_a_single_head(vector):
    weights, _, _, _, config = vector
    model = from_ldm_vae(weights, config)
    heads = [module.heads for module in model.modules() if hasattr(module, "to_q")]
    assert heads == [1] * 5  # encoder 1 + 1, decoder 1 + 2


def test_the_nested_config_is_accepted(vector):
    weights, _, _, _, config = vector
    full = config | dict(double_z=True, in_channels=3, out_ch=3, dropout=0.0)
    check(from_ldm_vae(weights, {"ddconfig": full, "embed_dim": 8}), vector)
    check(from_ldm_vae(weights, full | {"embed_dim": 8}), vector)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "first_stage_model.", "module.first_stage_model."])
def test_training_checkpoints_are_unwrapped(vector, wrapper, prefix):
    weights, _, _, _, config = vector
    extra = ("loss.logvar", "foundation_model.model.norm.weight", "linear_proj.weight", "model_ema.decay")
    weights |= dict.fromkeys(extra, torch.ones(1))
    names = {prefix + name: tensor for name, tensor in weights.items()}
    check(from_ldm_vae({wrapper: names, "epoch": 3} if wrapper else names, config), vector)


def test_ema_comes_first(vector):
    weights, _, _, _, config = vector
    zeros = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    check(from_ldm_vae({"model": zeros, "state_dict": zeros, "ema": weights}, config), vector)


def test_names_that_do_not_fit_are_listed(vector):
    weights, _, _, _, config = vector
    weights["encoder.surprise.weight"] = weights.pop("decoder.up.2.attn.1.q.weight")
    weights["lossy.weight"] = weights.pop("quant_conv.bias")
    with pytest.raises(
        ValueError,
        match=r"missing decoder\.up\.2\.attn\.1\.q\.weight, quant_conv\.bias; "
        r"unexpected encoder\.surprise\.weight, lossy\.weight$",
    ):
        from_ldm_vae(weights, config)


def test_attention_at_another_level_is_refused(vector):
    weights, _, _, _, config = vector
    with pytest.raises(ValueError, match=r"missing decoder\.up\.1\.attn.*unexpected decoder\.up\.2\.attn"):
        from_ldm_vae(weights, config | {"attn_resolutions": [16]})


def test_shapes_that_do_not_fit_are_listed(vector):
    weights, _, _, _, config = vector
    weights["encoder.mid.attn_1.q.weight"] = weights["encoder.mid.attn_1.q.weight"].flatten(1)
    weights["decoder.conv_out.bias"] = torch.zeros(4)
    with pytest.raises(ValueError, match="instead of") as error:
        from_ldm_vae(weights, config)
    assert "encoder.mid.attn_1.q.weight (64, 64) instead of (64, 64, 1, 1)" in str(error.value)
    assert "decoder.conv_out.bias (4,) instead of (3,)" in str(error.value)


def test_arguments_that_do_not_fit_are_listed(vector):
    weights, _, _, _, config = vector
    with pytest.raises(ValueError, match="unknown arguments attn_res, chmult; the official"):
        from_ldm_vae(weights, config | {"chmult": [1], "attn_res": []})
    nested = {"ddconfig": config | {"chmult": [1]}}
    with pytest.raises(ValueError, match="unknown arguments chmult; the official autoencoder has"):
        from_ldm_vae(weights, nested)
    with pytest.raises(ValueError, match=r"unknown arguments ch, monitor; .* beside ddconfig has embed_dim"):
        from_ldm_vae(weights, nested | {"monitor": "loss", "ch": 32})
    with pytest.raises(ValueError, match=r"the config lacks ch_mult, z_channels$"):
        from_ldm_vae(weights, {k: v for k, v in config.items() if k not in ("z_channels", "ch_mult")})
    with pytest.raises(ValueError, match="double_z must be true"):
        from_ldm_vae(weights, config | {"double_z": False})
    with pytest.raises(ValueError, match="embed_dim 4 is not z_channels 8"):
        from_ldm_vae(weights, {"ddconfig": config, "embed_dim": 4})


def test_vavae_f16d32_fits(vector):
    weights, _, _, _, config = vector
    assert official_shapes(config) == {name: tuple(tensor.shape) for name, tensor in weights.items()}
    with torch.device("meta"):
        model = from_ldm_vae({n: torch.empty(s) for n, s in official_shapes(VAVAE).items()}, VAVAE)
        moments, reconstruction = answer(model, torch.empty(1, 3, 256, 256))
    assert model.config.latent_channels == 32
    assert moments.shape == (1, 64, 16, 16)
    assert reconstruction.shape == (1, 3, 256, 256)


def test_saved_models_give_the_same_output(vector, tmp_path):
    weights, pixels, _, _, config = vector
    model = from_ldm_vae(weights, config)
    model.save_pretrained(tmp_path)
    again = AutoencoderKL.from_pretrained(tmp_path)
    assert again.config.scaling_factor == 1.0
    torch.testing.assert_close(answer(again, pixels), answer(model, pixels), rtol=0, atol=0)
