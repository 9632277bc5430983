"""What evaluations may be asked for, results that are kept, and sweeps."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from safetensors.torch import save_file

from iwin_dit.commands.evaluate import draw_sweep, named, parse_arguments, values_of
from iwin_dit.config.metrics import chosen_metrics, name_figures
from iwin_dit.evaluation.drawing import drawer
from iwin_dit.evaluation.rules import (
    differences,
    holds_images,
    is_ours,
    read_result,
    stored_command,
)
from iwin_dit.runtime.errors import ConfigError


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    return "--generated=images", "--reference=images"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size=0"], "--batch-size is 0, expected at least 1"),
        (["--batch-size=-3"], "--batch-size is -3, expected at least 1"),
        (
            ["--save-reference=a.npz"],
            r"--save-reference is a\.npz, expected a path that ends with \.safetensors",
        ),
        (["--metrics=fd"], "fd is not of --extractor inception; take some of fid, sfid, kid, is, pr"),
        (["--metrics=fid,fod"], "--metrics has 'fod'; take some of fid"),
        (["--extractor=dinov3"], "--extractor is dinov3, expected inception, dinov2"),
        (["--extractor=inception:x"], "--extractor is inception:x, expected"),
        (["--extractor=dinov2:"], "--extractor is dinov2:, expected"),
        (["--extractor=iwin"], "--extractor is iwin, expected"),
        (
            ["--extractor=dinov2", "--inception-weights=x"],
            "--inception-weights is of no use with --extractor dinov2",
        ),
        (["--steps=5"], "--steps is for what a model draws; images holds images already"),
        (["--seed=0"], "--seed is for what a model draws"),
        (["--compile"], "--compile is for what a model draws"),
        (["--repeat=x"], "--repeat takes no other option; leave --generated out"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(images, options, message):
    with pytest.raises(ConfigError, match=message):
        parse_arguments([*images, *options])


def test_a_size_is_a_side_or_two(images):
    assert parse_arguments([*images, "--size", "16"]).size == [16]
    assert parse_arguments([*images, "--size", "16", "1"]).size == [16, 1]
    for size in (["0"], ["16", "0"], ["1", "2", "3"]):
        with pytest.raises(ConfigError, match=r"--size is .*, expected a side, or height and width"):
            parse_arguments([*images, "--size", *size])


def test_statistics_are_told_from_other_files(tmp_path):
    path, values = tmp_path / "file.safetensors", {"mean": torch.zeros(2)}
    for metadata, expected in (
        ({"about": '{"images": {}}'}, True),
        ({"about": "{}"}, False),
        ({"other": '{"images": {}}'}, False),
        (None, False),
    ):
        save_file(values, path, metadata)
        assert is_ours(path) is expected
    path.write_bytes(b"x" * 100)
    assert is_ours(path) is False
    assert is_ours(tmp_path / "missing.safetensors") is False


@pytest.mark.parametrize("name", ["num-images", "batch-size", "draw-batch", "steps"])
def test_counts_are_at_least_one(tmp_path, name):
    arguments = ["--generated", str(tmp_path / "model"), "--reference=b"]
    with pytest.raises(ConfigError, match=f"--{name} is 0, expected at least 1"):
        parse_arguments([*arguments, f"--{name}=0"])
    assert getattr(parse_arguments([*arguments, f"--{name}=1"]), name.replace("-", "_")) == 1


def test_what_is_not_given_is_filled_in_for_a_model_alone(images, tmp_path):
    given = parse_arguments(images)
    assert (given.metrics, given.steps, given.num_images, given.seed) == ("fid", None, None, None)
    drawn = parse_arguments(["--generated=model", "--reference=images", "--metrics=kid,pr"])
    assert (drawn.metrics, drawn.num_images, drawn.plan, drawn.seed) == ("kid,pr", 50_000, "equal", 0)
    assert (drawn.steps, drawn.guidance_scale, drawn.guidance_interval) == (None, None, None), "the recipe's"
    with pytest.raises(ConfigError, match="--steps is 3, and --sweep gives it too"):
        parse_arguments(["--generated=model", "--reference=images", "--steps=3", "--sweep=steps=5,6"])
    assert parse_arguments(["--generated=model", "--reference=images", "--sweep=steps=5,6"]).steps is None
    with pytest.raises(ConfigError, match="--generated is missing"):
        parse_arguments(["--reference=images"])


def test_a_folder_with_a_model_is_no_set_of_images(tmp_path):
    assert holds_images(str(tmp_path))
    assert not holds_images(str(tmp_path / "missing"))
    for name in ("config.yaml", "model_index.json"):
        (tmp_path / name).write_text("")
        assert not holds_images(str(tmp_path))
        (tmp_path / name).unlink()


def test_the_first_metric_is_the_default_and_names_say_the_extractor():
    assert chosen_metrics("inception", None) == ["fid"]
    assert chosen_metrics("dinov2", None) == chosen_metrics("iwin:run", []) == ["fd"]
    assert chosen_metrics("i3d:file", None) == ["fvd"]
    assert chosen_metrics("dinov2:a:b", ["pr", "kid"]) == ["pr", "kid"]
    figures = {"fd": 1.0, "kid_std": 2.0, "precision": 3.0}
    assert name_figures(figures, "inception") == figures
    assert name_figures(figures, "iwin") == {"FD (iwin)": 1.0, "KID_std (iwin)": 2.0, "precision (iwin)": 3.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected arguments and figures in it"),
        ("{}", "expected arguments and figures in it"),
        ('{"arguments": {"a": 1}}', "expected arguments and figures in it"),
        ('{"arguments": {"a": 1}, "figures": {}}', "expected arguments and figures in it"),
        ('{"arguments": {"a": 1}, "figures": {"fid": "1"}}', "its figures are not all numbers"),
        ("no json", "is no result of evaluate_fid"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, text, message):
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_result(path)


def test_results_are_read_and_compared(tmp_path):
    result = {"arguments": {"seed": 0}, "figures": {"fid": 2.0, "kid": 0.5}, "generated": {"sha256": "a"}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert read_result(tmp_path / "result.json") == result
    with pytest.raises(ConfigError, match=r"missing\.json cannot be read"):
        read_result(tmp_path / "missing.json")
    assert differences(result, result) == ["largest relative difference 0.0e+00"]
    other = result | {"figures": {"fid": 2.5, "kid": 0.49}, "reference": {"sha256": "b"}}
    assert differences(result, other) == [
        "the reference has changed: its hash is another",
        "largest relative difference 2.0e-01",
    ]
    assert differences(other, result)[-1] == "largest relative difference 2.0e-01"
    tiny = [result | {"figures": {"kid": value}} for value in (0.0, 1e-13)]
    assert differences(*tiny) == ["largest relative difference 1.0e-01"], "of 1e-12 at least"
    assert differences(result, result | {"generated": None})[0].startswith("the generated has changed")


def test_a_command_is_stored_without_where_it_writes():
    arguments = {
        **{"generated": "a b", "guidance_interval": [0.0, 0.5], "compile": True, "seed": 0, "guide": None},
        **{
            "out": "x",
            "save_images": "y",
            "save_reference": "z",
            "sweep": "s",
            "repeat": "r",
            "compare": "c",
        },
    }
    options = ["--generated=a b", "--guidance-interval", "0.0", "0.5", "--compile", "--seed=0"]
    assert stored_command({"arguments": arguments}) == options
    assert stored_command({"arguments": arguments, "generated": {"model": "m"}}) == options
    assert stored_command({"arguments": arguments | {"compile": False}}) == [
        o for o in options if o != "--compile"
    ]
    assert stored_command({"arguments": arguments, "generated": {"folder": "f"}}) == ["--generated=a b"]
    of_01 = {"arguments": arguments | {"guidance_channels": None}, "generated": {"model": "m"}}
    assert stored_command(of_01) == [*options, "--guidance-channels=all"], "whatever the recipe says by now"


def test_the_values_of_a_sweep():
    assert values_of("steps=1,20") == ("steps", [1, 20])
    assert values_of("guidance_scale=0,-1.5") == ("guidance_scale", [0.0, -1.5])
    for text, message in (
        ("seed=1", "expected guidance_scale=V1,V2 or"),
        ("steps", "with numbers"),
        ("steps=1,x", "with numbers"),
        ("guidance_scale=1,nan", "with numbers"),
        ("steps=0,5", "expected steps of at least 1"),
        ("guidance_scale=1,1.0", "expected each value once"),
    ):
        with pytest.raises(ConfigError, match=message):
            values_of(text)
    assert named(None, "steps", 5) is None
    assert named("a/result.json", "steps", 5) == str(Path("a/result.steps-5.json"))


def test_a_sweep_is_drawn_as_a_curve_of_each_metric(tmp_path, monkeypatch):
    from matplotlib import pyplot as plt

    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    rows = [{"fid": 3.0, "kid": 0.1, "kid_std": 0.5}, {"fid": 2.0, "kid": 0.2, "kid_std": 0.5}]
    draw_sweep("guidance_scale", [1.0, 2.0], rows, tmp_path / "curve.png")
    (figure,) = drawn
    curves = {axes.get_title(): axes.lines[0].get_xydata().tolist() for axes in figure.axes}
    assert curves == {"fid": [[1, 3], [2, 2]], "kid": [[1, 0.1], [2, 0.2]]}
    assert figure.axes[0].get_xlabel() == "guidance scale"
    assert (tmp_path / "curve.png").stat().st_size > 5000
    assert is_ours(tmp_path / "curve.png")
    draw_sweep("steps", [1, 2], [{"fid": 3.0}, {"fid": 2.0}], tmp_path / "curve.png")
    assert [axes.get_title() for axes in drawn[1].axes] == ["fid"]


@pytest.mark.parametrize("frames", [None, 2])
def test_drawn_pixels_are_rounded_as_a_saved_png_is(frames):
    """To the nearest of 256; diffusers' own way to a picture is the witness."""
    levels = torch.linspace(0, 1, 3 * 40 * 16).reshape(1, 3, 40, 16)  # between two, and on them
    images = levels if frames is None else torch.stack([levels, levels.flip(-1)], 1)  # (1, T, 3, H, W)

    def pipeline(labels, generator, output_type, return_dict):
        return (images,)

    found = drawer(pipeline, {})([0], [torch.Generator()])
    shown = found if frames is None else found[:, :, 0]
    picture = VaeImageProcessor.numpy_to_pil(levels.permute(0, 2, 3, 1).numpy())[0]
    assert torch.equal(shown[0].permute(1, 2, 0), torch.from_numpy(np.array(picture)))
    assert found.shape == ((1, 3, 40, 16) if frames is None else (1, 3, 2, 40, 16))
