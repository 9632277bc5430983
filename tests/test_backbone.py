"""The Iwin Transformer: official figures, timm's surface, and a brute-force witness of its block."""

import copy
import json
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors import safe_open
from timm.models._manipulate import group_parameters
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

import iwin_dit.models  # noqa: F401  (registers the names)
from iwin_dit.commands.convert import main
from iwin_dit.convert import from_iwin_transformer
from iwin_dit.layers.specs import BlockSpec, MixerSpec
from iwin_dit.models.backbone import IwinTransformer, IwinTransformer3D
from iwin_dit.models.iwin_transformer import BACKBONE_SIZES, VARIANTS, WINDOWS
from iwin_dit.models.official_names import inflate
from iwin_dit.models.stages import IwinBlock, IwinMixer, PaddedIwinMixer
from iwin_dit.runtime.errors import run_script

# large files are in the second one, which a checkout that stands alone has not
FOLDERS = [Path(__file__).parent / "data", ROOT.parent / "shared" / "parity"]
VECTORS = ["iwin_classifier_0", "iwin_classifier_1", "iwin_dense_features", "iwin_video_features"]
TINY = "iwin_tiny_patch4_window7_224"
TOY = dict(img_size=64, embed_dim=8, depths=(1, 2, 1), num_heads=(1, 2, 2), window_size=4, num_classes=5)


def read(name):
    """Weights, input, output (a list, for dense features) and the official constructor's arguments."""
    paths = [folder / f"{name}.safetensors" for folder in FOLDERS]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        pytest.skip(f"{name}.safetensors is not at hand")
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    weights = {k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")}
    (x,) = (value for key, value in tensors.items() if key.startswith("input."))
    stages = [tensors[key] for key in sorted(tensors) if key.startswith("output.stage")]
    return weights, x, stages or tensors.get("output.logits", tensors.get("output.features")), config


def own_arguments(config, **options):
    """Ours, of a model in timm that the authors' checkpoint of this config fits."""
    theirs = {k: v for k, v in config.items() if k not in ("ape", "out_indices")}
    return theirs | dict(mask_padding=False) | options


def toy(**options):
    torch.manual_seed(0)
    return IwinTransformer(**(TOY | options)).eval()


@torch.no_grad()
def check(model, x, expected, **tolerance):
    torch.testing.assert_close(model(x), expected, **(tolerance or dict(rtol=1e-4, atol=1e-5)))


# Official weights


@pytest.mark.parametrize("name", VECTORS)
def test_official_figures_are_met(name):
    weights, x, expected, config = read(name)
    model = from_iwin_transformer(weights, config)
    assert not model.training
    check(model, x, expected)


def test_pooled_features_are_met():
    weights, x, _, config = read("iwin_classifier_1")
    with safe_open(FOLDERS[0] / "iwin_classifier_1.safetensors", "pt") as file:
        expected = file.get_tensor("output.features")
    model = from_iwin_transformer(weights, config)
    check(lambda x: model.forward_head(model.forward_features(x), pre_logits=True), x, expected)
    model.reset_classifier(0)
    check(model, x, expected)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "ema", "model_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone."])
def test_training_checkpoints_are_unwrapped(wrapper, prefix):
    weights, x, expected, config = read("iwin_dense_features")
    names = {prefix + name: tensor for name, tensor in weights.items()}
    if "backbone" in prefix:
        names["decode_head.conv_seg.weight"] = torch.ones(1)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in names.items()}
    wrapped = {wrapper: names, "epoch": 3} if wrapper else names
    if wrapper in ("ema", "model_ema"):
        wrapped["model"] = zeros
    check(from_iwin_transformer(wrapped, config), x, expected)


def test_fewer_maps_leave_later_stages_out():
    weights, x, expected, config = read("iwin_dense_features")
    del weights["norm2.weight"], weights["norm2.bias"], weights["norm0.weight"], weights["norm0.bias"]
    model = from_iwin_transformer(weights, config | {"out_indices": [1]})
    check(model, x, expected[1:2])
    assert model.feature_info.channels() == [32]
    assert model.feature_info.reduction() == [8]


def test_options_of_the_official_constructor():
    """No bias, another scale of attention and a position embedding, against the same by other means."""
    weights, x, _, config = read("iwin_classifier_1")
    biases = [name for name in weights if name.endswith("qkv.bias")]
    zeros = weights | {name: torch.zeros_like(weights[name]) for name in biases}
    without = {name: tensor for name, tensor in weights.items() if name not in biases}
    with torch.no_grad():
        expected = from_iwin_transformer(zeros, config)(x)
        check(from_iwin_transformer(without, config | {"qkv_bias": False}), x, expected)

        scaled = dict(weights)
        for name in [name for name in weights if ".attn.qkv." in name]:
            width = len(weights[name]) // 3
            scaled[name] = torch.cat([2 * weights[name][:width], weights[name][width:]])
        head_width = config["embed_dim"] / config["num_heads"][0]
        expected = from_iwin_transformer(scaled, config)(x)
        check(from_iwin_transformer(weights, config | {"qk_scale": 2 * head_width**-0.5}), x, expected)

        positions = torch.randn(1, 16 * 16, config["embed_dim"])
        model = from_iwin_transformer(weights, config)
        stem = model.forward_stem
        model.forward_stem = lambda x: stem(x) + positions.view(1, 16, 16, -1)
        learned = from_iwin_transformer(weights | {"absolute_pos_embed": positions}, config | {"ape": True})
        check(learned, x, model(x))
        assert learned(F.pad(x, (0, 40))).shape == (2, 5)


def test_what_does_not_fit_is_named():
    weights, _, _, config = read("iwin_classifier_1")
    surprise = {k.replace("layers.0.blocks.1.norm1", "surprise"): v for k, v in weights.items()}
    for change, given, message in [
        ({}, {"windw_size": 4}, "unknown arguments windw_size; the official constructors have"),
        ({}, {"num_heads": None}, "the config lacks num_heads"),
        ({}, {"num_heads": [1, 2, 4]}, r"num_heads is \[1, 2, 4\], the weights have 2 stages"),
        (
            {},
            {"depths": [2, 2], "num_classes": 7},
            r"num_classes is 7, the weights have 5; depths is \[2, 2\], ",
        ),
        ({"head.bias": torch.zeros(4)}, {}, r"head\.bias \(4,\) instead of \(5,\)"),
        ({"patch_embed.proj.weight": None}, {}, "not an Iwin Transformer's; it has head.bias"),
    ]:
        changed = {k: v for k, v in (weights | change).items() if v is not None}
        with pytest.raises(ValueError, match=message):
            from_iwin_transformer(changed, config | given)
    with pytest.raises(
        ValueError,
        match=r"missing layers\.0\.blocks\.1\.norm1\.bias, .*; unexpected surprise\.bias, surprise",
    ):
        from_iwin_transformer(surprise, config)


def test_timm_reads_official_files(tmp_path):
    weights, x, expected, config = read("iwin_classifier_1")
    path = tmp_path / "iwin.pth"
    torch.save({"model": weights, "epoch": 3}, path)
    check(timm.create_model(TINY, **own_arguments(config), checkpoint_path=path).eval(), x, expected)
    fine_tuned = timm.create_model(
        TINY,
        pretrained=True,
        pretrained_cfg_overlay=dict(file=str(path), num_classes=5),
        **own_arguments(config, num_classes=9),
    )
    assert torch.equal(
        fine_tuned.layers[0].blocks[1].mlp.fc1.weight, weights["layers.0.blocks.1.mlp.fc1.weight"]
    )
    maps = timm.create_model(TINY, features_only=True, **own_arguments(config), checkpoint_path=path)
    assert [m.shape for m in maps(x)] == [(2, 16, 16, 16), (2, 32, 8, 8)]

    weights, x, expected, config = read("iwin_dense_features")
    torch.save({"state_dict": {f"backbone.{name}": tensor for name, tensor in weights.items()}}, path)
    options = dict(features_only=True, feature_norm=True, clip_window=False, convolution=(True, True, False))
    dense = timm.create_model(TINY, **own_arguments(config, **options), checkpoint_path=path)
    check(dense.eval(), x, expected)


@pytest.mark.parametrize("name", ["iwin_classifier_1", "iwin_dense_features"])
def test_the_command_writes_what_timm_reads(name, tmp_path, monkeypatch, capsys):
    weights, x, expected, config = read(name)
    torch.save(weights, tmp_path / "iwin.pth")
    (tmp_path / "config.json").write_text(json.dumps(config))

    def convert(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            run_script(main)
        assert end.value.code == code
        return capsys.readouterr()

    command = ["iwin_transformer", tmp_path / "iwin.pth", tmp_path / "out", "--config"]
    assert "parameters" in convert(*command, tmp_path / "config.json").out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "iwin.pth", "out"]
    check(timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval(), x, expected)

    assert "exists; name a new folder" in convert(*command, TINY, code=2).err
    command[2] = tmp_path / "other"
    assert "the weights have" in convert(*command, TINY, code=2).err
    assert "iwin_huge is not a file, nor is it one of iwin_tiny" in convert(*command, "iwin_huge", code=2).err
    command[1] = tmp_path / "config.json"
    error = convert(*command, TINY, code=2).err
    assert "cannot be read as tensors" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "other").exists()


# The published models


PUBLISHED = {  # parameters; multiply-adds in G at 224, 384, 512 and 1024 pixels (DESIGN, arXiv 2507.18405)
    "tiny": (30_226_504, (4.72, 14.68, 27.77, 111.08)),
    "small": (51_566_152, (8.98, 27.70, 51.98, 207.92)),
    "base": (91_241_576, (15.85, 48.32, 89.54, 358.17)),
    "large": (204_322_984, (35.39, 106.62, 195.01, 780.05)),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameters_and_multiply_adds(size):
    count, costs = PUBLISHED[size]
    for (side, window), cost in zip(WINDOWS.items(), costs, strict=True):
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model = timm.create_model(f"iwin_{size}_patch4_window{window}_{side}").eval()
            model(torch.empty(1, 3, side, side))
        last = 2 * 10 * model.num_features  # at 1024 pixels the last stage gains two convolutions
        assert sum(p.numel() for p in model.parameters()) == count + (last if side == 1024 else 0)
        assert counter.get_total_flops() / 2e9 == pytest.approx(cost, rel=0.01)


def test_the_names_are_registered():
    names = [f"iwin_{size}_patch4_window{w}_{side}" for size in BACKBONE_SIZES for side, w in WINDOWS.items()]
    names += [f"{name}_22k" for name in names]
    assert set(names) == set(VARIANTS)
    assert set(names) <= set(timm.list_models("iwin_*"))
    with torch.device("meta"):
        heads = {
            name: [stage.blocks[0].mixer.attention.heads for stage in timm.create_model(name).layers]
            for name in ("iwin_small_patch4_window7_224", "iwin_small_patch4_window7_224_22k")
        }
    assert list(heads.values()) == [[3, 4, 8, 16], [3, 6, 12, 24]]


# The block, from its definition


def reference_block(block, x, window, masked):
    """Attention over all pairs of tokens with a mask, convolution as a sum of nine shifted grids."""
    batch, height, width, channels = x.shape
    normed = F.layer_norm(x, (channels,), block.norm1.weight, block.norm1.bias)
    sides = [min(window, side) if masked else window for side in (height, width)]
    groups = [-(-side // m) for side, m in zip((height, width), sides, strict=True)]
    tall, wide = (m * g for m, g in zip(sides, groups, strict=True))
    padded = torch.zeros(batch, tall, wide, channels)
    padded[:, :height, :width] = normed
    rows, columns = torch.meshgrid(torch.arange(tall), torch.arange(wide), indexing="ij")
    group = (rows % groups[0] * groups[1] + columns % groups[1]).flatten()  # token h = m G + g is in group g
    visible = group[:, None] == group
    if masked:
        visible = visible & ((rows < height) & (columns < width)).flatten()
    attention = block.mixer.attention
    q, k, v = (padded.flatten(1, 2) @ attention.qkv.weight.T + attention.qkv.bias).chunk(3, -1)
    heads = []
    for part in zip(*(t.chunk(attention.heads, -1) for t in (q, k, v)), strict=True):
        scores = part[0] @ part[1].transpose(1, 2) / part[0].shape[-1] ** 0.5
        heads.append(scores.masked_fill(~visible, -torch.inf).softmax(-1) @ part[2])
    mixed = torch.cat(heads, -1) @ attention.proj.weight.T + attention.proj.bias
    mixed = mixed.view(batch, tall, wide, channels)[:, :height, :width]
    if block.mixer.convolution is not None:
        conv = block.mixer.convolution.conv
        ring = torch.zeros(batch, height + 2, width + 2, channels)
        ring[:, 1:-1, 1:-1] = normed
        for i in range(3):
            for j in range(3):
                mixed = mixed + ring[:, i : i + height, j : j + width] * conv.weight[:, 0, i, j]
        mixed = mixed + conv.bias
    x = x + mixed
    hidden = F.layer_norm(x, (channels,), block.norm2.weight, block.norm2.bias) @ block.mlp.fc1.weight.T
    hidden = hidden + block.mlp.fc1.bias
    hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    return x + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("grid", [(8, 8), (6, 9), (3, 5), (3, 3)])
def test_the_block_is_its_definition(grid, masked):
    torch.manual_seed(0)
    mixer = MixerSpec(window_size=4, convolution=grid != (3, 3), mask_padding=masked)
    spec = BlockSpec(width=12, heads=3, mixer=mixer, norm="layer_norm", mlp="gelu")
    block = IwinBlock(spec, (IwinMixer if masked else PaddedIwinMixer)(spec, grid), drop_path=0.0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, *grid, 12)
    with torch.no_grad():
        torch.testing.assert_close(block(x), reference_block(block, x, 4, masked), rtol=1e-4, atol=1e-5)


# timm's surface


@pytest.mark.parametrize("size", [(64, 64), (45, 70), (17, 33), (4, 4), (1, 3), (100, 31)])
def test_any_image_size(size):
    model, x = toy(), torch.randn(2, 3, *size)
    grids = [(-(-size[0] // 4), -(-size[1] // 4))]
    for _ in range(2):
        grids.append(tuple(-(-side // 2) for side in grids[-1]))
    with torch.no_grad():
        features, maps = model.forward_intermediates(x)
        assert [m.shape for m in maps] == [(2, 8 * 2**i, *grid) for i, grid in enumerate(grids)]
        torch.testing.assert_close(features, model.forward_features(x))
        assert model(x).shape == (2, 5)
        nhwc = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
    assert all(torch.equal(a.movedim(-1, 1), b) for a, b in zip(nhwc, maps, strict=True))


def test_larger_images_take_the_weights_unchanged():
    small = toy(img_size=32)  # grids of 8, 4 and 2 tokens with windows of 4
    large = toy(img_size=64)
    assert [stage.blocks[0].mixer.convolution is not None for stage in small.layers] == [True, False, False]
    assert [stage.blocks[0].mixer.convolution is not None for stage in large.layers] == [True, True, False]
    large.load_state_dict(small.state_dict())
    for side in (32, 64):  # zeros in the new convolutions: the same function at any size
        x = torch.randn(2, 3, side, side)
        check(large, x, small(x))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*layers\.1\.blocks\.0\.mixer\.convolution"):
        small.load_state_dict(large.state_dict())
    toy(img_size=32, convolution=(True, True, False)).load_state_dict(large.state_dict())


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for enable in (False, True):
        model = toy().train()
        model.set_grad_checkpointing(enable)
        model(torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert len(gradients[0]) > 40
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_features_only():
    options = TOY | dict(features_only=True)
    x = torch.randn(2, 3, 50, 70)
    model = timm.create_model(TINY, **options)
    assert model.feature_info.channels() == [8, 16, 32]
    assert model.feature_info.reduction() == [4, 8, 16]
    assert [m.shape for m in model(x)] == [(2, 8, 13, 18), (2, 16, 7, 9), (2, 32, 4, 5)]
    model = timm.create_model(TINY, out_indices=(0, -2), feature_norm=True, **options)
    maps = model(x)
    assert [m.shape[1] for m in maps] == [8, 16]
    assert all(m.mean(1).abs().max() < 1e-5 for m in maps)  # a layer norm on each
    sum(m.square().sum() for m in maps).backward()
    assert all(p.grad is not None for p in model.parameters())  # nothing unused stays
    listed = timm.create_model(TINY, feature_cls="list", **options)
    assert [m.shape for m in listed(x)] == [(2, 13, 18, 8), (2, 7, 9, 16), (2, 4, 5, 32)]
    assert listed.output_fmt == "NHWC"


def test_the_classifier_can_be_replaced():
    model, x = toy(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        model.reset_classifier(0)
        torch.testing.assert_close(model(x), pooled)
        model.reset_classifier(7, "max")
        assert model(x).shape == (2, 7)
        torch.testing.assert_close(
            model.forward_head(model.forward_features(x), pre_logits=True),
            model.forward_features(x).amax((1, 2)),
        )
        assert model.get_classifier().weight.shape == (7, 32)
        model.reset_classifier(0, "")
        assert model(x).shape == (2, 4, 4, 32)
    assert not any(module.training for module in model.modules())


def test_layer_decay_groups_follow_the_depth():
    model = toy(pos_embed=True, feature_norm=True)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups["patch_embed.proj.weight"] == groups["pos_embed"] == 0
    order = ["pos_embed", "layers.0.blocks.0.norm1.bias", "layers.1.downsample.conv.bias"]
    order += ["layers.1.blocks.1.mlp.fc2.bias", "layers.2.blocks.0.norm1.bias", "norm.bias", "head.fc.bias"]
    found = [groups[name] for name in order]
    assert found == sorted(found)
    assert found[-2] == found[-3]  # the last norm goes with the last block
    assert len(set(found)) == len(found) - 1
    assert groups["layers.1.downsample.conv.bias"] == groups["layers.1.blocks.0.norm1.bias"]
    assert len(group_parameters(model, model.group_matcher(coarse=True))) == 5
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="depth"):
        timm.create_model(TINY, depth=3)
    with pytest.raises(ValueError, match=r"num_heads .* has 2 stages, depths .* has 3"):
        toy(num_heads=(1, 2))
    with pytest.raises(ValueError, match="3 heads do not divide the width 8"):
        toy(num_heads=(3, 2, 2))
    with pytest.raises(ValueError, match="expected 'NCHW' or 'NHWC'"):
        toy().forward_intermediates(torch.zeros(1, 3, 32, 32), output_fmt="NLC")


def test_windows_per_stage():
    model = toy(window_size=(2, (4, 2), "auto"))
    found = [stage.blocks[0].mixer.spec.window((8, 8)) for stage in model.layers]
    assert found == [(2, 2), (4, 2), (4, 4)]
    assert toy(window_size=(4, 2)).layers[1].blocks[0].mixer.spec.window((8, 8)) == (4, 2)
    assert model(torch.zeros(1, 3, 50, 30)).shape == (1, 5)


@pytest.mark.parametrize(
    "options", [{}, dict(mask_padding=False), dict(mask_padding=False, clip_window=False)]
)
def test_traced_models_are_the_same(options):
    x = torch.randn(2, 3, 45, 23)
    model = timm.create_model(TINY, **TOY, pos_embed=True, **options).eval()
    with torch.no_grad():
        expected = model(x)
        leaves = dict(leaf_modules=list(timm.models.get_notrace_modules()))
        leaves |= dict(autowrap_functions=list(timm.models.get_notrace_functions()))
        traced = create_feature_extractor(model, {"head": "logits"}, tracer_kwargs=leaves)
        check(lambda x: traced(x)["logits"], x, expected)


def test_clips_of_one_frame_are_images():
    """With one frame and no embedding, three dimensions say what two do; pooling is over space and time."""
    flat = toy(num_classes=0, global_pool="")
    solid = IwinTransformer3D(**(TOY | dict(img_size=(1, 64, 64), num_classes=0)), patch_size=(1, 4, 4))
    solid.load_state_dict(inflate(flat.state_dict(), solid.state_dict()))
    x = torch.randn(2, 3, 45, 70)
    check(lambda x: solid.eval()(x[:, :, None]), x, flat(x).movedim(-1, 1)[:, :, None])
    pooled = copy.deepcopy(solid)
    pooled.reset_classifier(0, "avg")
    clip = torch.randn(1, 3, 5, 30, 30)
    check(pooled, clip, solid(clip).mean((2, 3, 4)))


def test_weights_of_a_part_leave_the_rest_alone():
    torch.manual_seed(0)
    model = IwinTransformer(img_size=32, embed_dim=8, depths=(1, 1), num_heads=(1, 1), window_size=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    head = {name: torch.ones_like(tensor) for name, tensor in before.items() if name.startswith("head.")}
    missing = model.load_state_dict(head, strict=False).missing_keys
    assert {*missing, *head} == before.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, head.get(name, before[name])), name


def test_the_automatic_window_where_none_is_clipped():
    """It is never larger than the grid, so that there is nothing to clip."""
    options = dict(embed_dim=8, depths=(1,), num_heads=(1,), patch_size=4, num_classes=2, mask_padding=False)
    for window in ("auto", (("auto", 4),)):
        torch.manual_seed(0)
        model = IwinTransformer(img_size=32, window_size=window, clip_window=False, **options).eval()
        torch.manual_seed(0)
        other = IwinTransformer(img_size=32, window_size=window, clip_window=True, **options).eval()
        x = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(model(x), other(x))
