"""Training straight from images, with the autoencoder in the step."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_vae
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from iwin_dit.build import data
from iwin_dit.config.parse import parse_arguments
from iwin_dit.data.examples import TrainingExamples, whole
from iwin_dit.data.pixels import PixelDataset, Reader
from iwin_dit.data.sources import open_source
from iwin_dit.runtime.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    root = tmp_path_factory.mktemp("pixels")
    rng = np.random.default_rng(0)
    for i in range(24):
        path = root / "images" / f"class {i % 3}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 22, 3), dtype=np.uint8)).save(path)
    make_vae().save_pretrained(root / "vae")
    return root


def images(workshop, **more):
    return {
        **{"kind": "images", "path": str(workshop / "images"), "vae": str(workshop / "vae")},
        **{"normalization": "vae", **more},
    }


def dataset(workshop, crop="center"):
    vae = make_vae()
    reader = Reader(open_source(str(workshop / "images")), (16, 16), crop)
    return PixelDataset(reader, vae, str(workshop / "vae"))


def test_training_from_images_is_training_from_their_latents(
    workshop, recipe, tmp_path, run_here, refused_here
):
    run_here(
        *("extract_latents.py", "--images", workshop / "images", "--vae", workshop / "vae"),
        *("--out", tmp_path / "latents", "--size", 16, "--workers", 0),
    )
    short = {"max_steps": 10, "save_every_steps": 10}
    straight = recipe(data=images(workshop), train={**short, "num_workers": 1})
    through = recipe(
        "latents.yaml", data={"path": str(tmp_path / "latents"), "normalization": "vae"}, train=short
    )
    run_here("train_dit.py", "--config", straight, "--output_dir", tmp_path / "straight")
    run_here("train_dit.py", "--config", through, "--output_dir", tmp_path / "through")
    weights = [
        load_file(tmp_path / name / "checkpoints" / "step-00000010" / "ema.safetensors")
        for name in ("straight", "through")
    ]
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], atol=1e-4, rtol=0, msg=key)
    index = json.loads((tmp_path / "straight" / "pipeline" / "model_index.json").read_text())
    assert index["id2label"] == {"0": "class 0", "1": "class 1", "2": "class 2"}
    run_here(
        *("sample.py", "--checkpoint", tmp_path / "straight", "--class", "class 1", "--steps", 2),
        *("--out", tmp_path / "grid.png", "--num-images", 1),
    )

    # a run goes on with the same images only, wherever they lie
    (tmp_path / "moved").symlink_to(workshop / "images")
    longer = ("--config", straight, "--output_dir", tmp_path / "straight", "--train.max_steps", 11)
    run_here("train_dit.py", *longer, "--data.path", tmp_path / "moved")
    other = tmp_path / "other"
    for path in (workshop / "images").rglob("*.png"):
        copy = other / path.parent.name / path.name.replace("23", "24")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    error = refused_here("train_dit.py", *longer, "--data.path", other)
    assert "begun on other data (names_sha256" in error


def test_a_broken_image_stops_training_with_its_name(workshop, recipe, tmp_path, refused_here):
    for path in (workshop / "images").rglob("*.png"):
        copy = tmp_path / "images" / path.parent.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes()[: 60 if path.name == "07.png" else None])
    config = recipe(data=images(workshop, path=str(tmp_path / "images")), train={"num_workers": 1})
    error = refused_here("train_dit.py", "--config", config)
    assert "07.png is a broken or truncated image" in error
    assert "restore or remove it" in error


def test_crops_are_a_function_of_the_position(workshop):
    centred, cropped = (
        TrainingExamples(dataset(workshop, crop), 0, True, 0.1, 3) for crop in ("center", "random")
    )
    again = TrainingExamples(dataset(workshop, "random"), 0, True, 0.1, 3)
    batch = next(iter(DataLoader(cropped, batch_sampler=[[0, 1, 30]], num_workers=1, collate_fn=whole)))
    assert batch.x0.shape == (3, 3, 16, 16)
    assert batch.x0.dtype == torch.uint8
    for i, position in enumerate((0, 1, 30)):
        assert torch.equal(again[position].x0, batch.x0[i])
        assert torch.equal(centred[position].noise, batch.noise[i]), "the crop is drawn after the rest"
    assert not torch.equal(centred[0].x0, cropped[0].x0)


def test_images_that_do_not_fit_are_refused(workshop, recipe):
    for overrides, message in (
        ({"data": {"kind": "images"}}, "nothing encodes them: set data.vae"),
        ({"data": images(workshop, normalization="channel")}, "set data.normalization vae"),
        ({"data": images(workshop, prepare="digits")}, "set data.path .*images/train, or data.prepare null"),
        ({"data": {"crop": "random"}}, "data.crop is 'random', but is not read without data.kind images"),
    ):
        path = str(recipe(**overrides))
        with pytest.raises(ConfigError, match=message):
            parse_arguments(["--config", path], Path(path))
    path = str(recipe(data=images(workshop), model={"in_channels": 16}))
    with pytest.raises(DataError, match=r"has latent channels 4 .*model.in_channels is 16"):
        data.build_dataset(parse_arguments(["--config", path], Path(path))[0])


def test_va_vae_is_a_preset(monkeypatch, tmp_path):
    """Its file comes from the hub, and is read as an LDM autoencoder."""
    asked = []
    file = tmp_path / "va-vae.safetensors"
    save_file({"nothing": torch.zeros(1)}, file)

    def download(*arguments):
        asked.append(arguments)
        return str(file)

    monkeypatch.setattr(data, "hf_hub_download", download)
    with pytest.raises(DataError, match="is not the LDM autoencoder of its config"):
        data.load_autoencoder("va-vae-f16d32")
    repository = "hustvl/vavae-imagenet256-f16d32-dinov2"
    assert asked == [(repository, "vavae-imagenet256-f16d32-dinov2.pt")]
    monkeypatch.undo()
    with pytest.raises(DataError, match="cannot be downloaded"):
        data.load_autoencoder("va-vae-f16d32")


def test_broken_images_are_left_out_up_to_a_number(workshop, recipe, tmp_path, run_here, refused_here, capfd):
    """A run that meets one goes on by the same command with the number raised; the next image stands in."""
    for path in (workshop / "images").rglob("*.png"):
        copy = tmp_path / "images" / path.parent.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    broken = [tmp_path / "images" / "class 1" / name for name in ("07.png", "10.png")]
    for path in broken:
        path.write_bytes(path.read_bytes()[:60])
    source, vae = open_source(str(tmp_path / "images")), make_vae()
    names = [source.name(i) for i in range(24)]
    i = names.index(str(broken[0]))
    assert names[i + 1] == str(broken[1])
    reader = Reader(source, (16, 16), "random")
    rng = torch.Generator().manual_seed(3)
    expected = reader.read(i + 2, rng)
    for order in ([i], [i + 1, i], [i + 2, i]):  # whatever was met before
        images = PixelDataset(reader, vae, "vae", max_bad_images=2)
        pixels, labels = images.draw(
            order, [False] * len(order), [torch.Generator().manual_seed(3) for _ in order]
        )
        assert torch.equal(pixels[-1], expected.pixels)
        assert labels[-1] == expected.label
    out = capfd.readouterr().out
    assert out.count(f"left out: {broken[0]} is a broken or truncated image") == 3
    one = PixelDataset(reader, vae, "vae", max_bad_images=1)
    with pytest.raises(DataError, match=r"10\.png is a broken .*go on without it by data\.max_bad_images 2"):
        one.draw([i], [False], [torch.Generator()])

    short = {"max_steps": 6, "save_every_steps": 2, "num_workers": 0}
    config = recipe(data=images_of(workshop, tmp_path), train=short)
    error = refused_here("train_dit.py", "--config", config)
    assert "by data.max_bad_images 1 or more" in error
    output = run_here("train_dit.py", "--config", config, "--data.max_bad_images", 2)
    assert "left out: " in output


def images_of(workshop, folder):
    return images(workshop, path=str(folder / "images"))
