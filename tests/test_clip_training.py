"""From folders of videos to a generator of clips, by the commands that people type."""

import json
import shutil
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import make_vae, read_checkpoint
from PIL import Image
from safetensors.torch import load_file

from iwin_dit.build import data as build_data
from iwin_dit.build import generator, loading
from iwin_dit.commands import extract as extract_command
from iwin_dit.config.parse import load_config
from iwin_dit.data.codec import encode
from iwin_dit.data.images import center_crop
from iwin_dit.data.latents import LatentDataset
from iwin_dit.data.sources import ClipFolderSource
from iwin_dit.data.video import read_frames, write_gif

CLASSES, FRAMES, STRIDE = ("a walk", "z", "ünï 漢"), 4, 2
CLIPS = {"sample_frames": FRAMES, "mixer": {"window_size": "auto"}}


def grey(level, side=20):
    return Image.new("RGB", (side + 2, side), (level, level // 2, 255 - level))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """18 videos of 9 frames: frame k of video i has the colour 20 k + i."""
    root = tmp_path_factory.mktemp("clips shop")
    for i in range(18):
        folder = root / "videos" / CLASSES[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        frames = [grey(20 * k + i) for k in range(9)]
        if i % 2:
            write_gif(frames, folder / f"{i:02d} é.gif", 8)
        else:
            (folder / f"{i:02d}").mkdir()
            for k, frame in enumerate(frames):
                frame.save(folder / f"{i:02d}" / f"{k:03d}.png")
            frame.save(root / f"{i:02d}.png")
    for i in range(9):
        path = root / "images" / CLASSES[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey(20 * i).save(path)
    make_vae().save_pretrained(root / "vae")
    return root


def extract(workshop, out, *more, videos="videos"):
    return (
        *("extract_latents.py", "--images", workshop / videos, "--vae", workshop / "vae", "--out", out),
        *("--size", 16, "--workers", 0, "--batch-images", 4, "--shard-images", 7, *more),
    )


CLIP_OPTIONS = ("--frames", FRAMES, "--frame-stride", STRIDE)


@pytest.fixture(scope="module")
def latents(workshop):
    """Clips and images, through the command's own function."""
    for name, more in (("videos", CLIP_OPTIONS), ("images", ())):
        command = extract(workshop, workshop / f"latents of {name}", *more, videos=name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", list(map(str, command)))
            extract_command.main()
    return workshop


def test_latents_are_those_of_the_chosen_frames(latents, run_here):
    folder = latents / "latents of videos"
    dataset, vae = LatentDataset(folder), make_vae()
    assert dataset.latent_shape == (4, FRAMES, 8, 8)
    assert dataset.class_names == list(CLASSES)
    assert (dataset.index["frames"], dataset.index["frame_stride"]) == (FRAMES, STRIDE)
    source = ClipFolderSource(latents / "videos")
    starts = set()
    for i in range(len(source)):
        raw, mirrored = (dataset.read_raw([i], flip)[0] for flip in (False, True))
        candidates = []
        for start in range(9 - (FRAMES - 1) * STRIDE):
            frames = read_frames(source.path(i), range(start, start + (FRAMES - 1) * STRIDE + 1, STRIDE))
            pixels = torch.stack([center_crop(frame, 16, 16) for frame in frames], 1) / 127.5 - 1
            candidates.append(float((encode(vae, pixels[None])[0] - raw).abs().max()))
            if candidates[-1] < 1e-5:
                starts.add(start)
                torch.testing.assert_close(encode(vae, pixels[None].flip(-1))[0], mirrored)
        assert min(candidates) < 1e-5, source.name(i)
    assert starts == {0, 1, 2}, "every place is taken"
    values = torch.cat([load_file(path)["latents"] for path in sorted(folder.glob("*.safetensors"))])
    np.testing.assert_allclose(dataset.mean, values.double().mean((0, 2, 3, 4)), atol=1e-6)
    assert "4 x 4 x 8 x 8" in run_here("extract_latents.py", "--info", folder)
    sheet = Image.open(folder / "contact.png")
    assert sheet.size == (2 + FRAMES * 18, 2 + 8 * 18), "a film strip for each of eight clips"
    assert "18 clips" in run_here("extract_latents.py", "--verify", folder)


def test_more_clips_of_each_video_and_the_same_bytes(workshop, tmp_path, run_here):
    for name in ("one", "two"):
        output = run_here(*extract(workshop, tmp_path / name, *CLIP_OPTIONS, "--clips-per-video", 3))
        assert "54 clips in" in output
    for path in (tmp_path / "one").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    labels = LatentDataset(tmp_path / "one").labels
    assert torch.equal(labels, torch.arange(3).repeat_interleave(18))


def test_bad_clips_are_named_and_counted(workshop, tmp_path, run_here, refused_here):
    videos = tmp_path / "videos" / "z"
    videos.mkdir(parents=True)
    frames = [grey(20 * k) for k in range(9)]
    write_gif(frames, videos / "good.gif", 8)
    write_gif(frames[:6], videos / "short.gif", 8)
    (videos / "text.mp4").write_text("#EXTM3U\n")
    (videos / "cut.gif").write_bytes((videos / "good.gif").read_bytes()[:-100])
    (videos / "sizes").mkdir()
    for k, frame in enumerate(frames):
        frame.resize((20 + k, 20)).save(videos / "sizes" / f"{k}.png")
    with av.open(videos / "sound.mp4", "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        for packet in [*stream.encode(sound), *stream.encode()]:
            container.mux(packet)
    command = extract(workshop, tmp_path / "out", *CLIP_OPTIONS, videos=tmp_path / "videos")
    assert "has a single class, z" in refused_here(*command)
    command += ("--allow-odd-classes",)
    error = refused_here(*command)
    assert "5 bad clips, allowed are 0" in error
    output = run_here(*command, "--max-bad-images", 5)
    left_out = [line for line in output.splitlines() if line.startswith("left out: ")]
    assert len(left_out) == 5
    for name, reason in (
        ("short.gif", "has 6 frames"),
        ("text.mp4", ""),
        ("cut.gif", ""),
        ("sizes", "21 x 20"),
        ("sound.mp4", "none of video"),
    ):
        assert any(str(videos / name) in line and reason in line for line in left_out), (name, left_out)
    assert "1 clips in" in output


def test_mistakes_of_clips_are_one_line(workshop, latents, recipe, tmp_path, refused_here):
    out = tmp_path / "out"
    for more, message in (
        (("--frame-stride", 2), "--frame-stride and --clips-per-video are for clips; give --frames"),
        ((*CLIP_OPTIONS, "--labels", "x.csv"), "--labels is for images"),
        (("--frames", 0), "all numbers are at least 1"),
    ):
        assert message in refused_here(*extract(workshop, out, *more))
    data = {"path": str(latents / "latents of videos")}
    images = str(latents / "latents of images")
    for model, changes, message in (
        ({}, {}, "has latent frames 4"),
        ({"sample_frames": 8}, {}, "set model.sample_frames to 4"),
        ({"sample_frames": 4, "mixer": {"window_size": [4, 4]}}, {}, "window_size [4, 4] has 2 axes"),
        ({"sample_frames": 4, "position_embedding": "rope"}, {}, "take none, time or sincos"),
        (
            {"sample_frames": 4},
            {"frame_stride": 2},
            "frame_stride is 2, but is not read without data.kind images",
        ),
        ({"sample_frames": 4}, {"images": images}, "set both to mix images in"),
        ({"sample_frames": 4}, {"image_share": 0.5}, "set both to mix images in"),
        ({"position_embedding": "time"}, {}, "time is for clips"),
        ({}, {"image_share": 0.5}, "data.image_share is 0.5, but is not read without model.sample_frames"),
        ({}, {"prepare": "moving_digits"}, "makes clips; set model.sample_frames"),
        ({"sample_frames": 4}, {"images": str(tmp_path), "image_share": 0.5}, "there are no latents"),
    ):
        model = {"mixer": {"window_size": "auto"}} | model
        config = recipe(data={**data, **changes}, model=model)
        assert message in refused_here("train_dit.py", "--config", config), message


def test_train_resume_and_sample(latents, recipe, tmp_path, run_here, refused_here):
    """Killed and gone on with, bit for bit, with images mixed in; then clips as people look at them."""
    data = {
        "path": str(latents / "latents of videos"),
        "images": str(latents / "latents of images"),
        "image_share": 0.4,
        "random_flip": False,
    }
    short = {"max_steps": 12, "save_every_steps": 4, "sample_every_steps": 12}
    config = recipe(data=data, model=CLIPS, train=short, ema={"decays": [0.9]})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_here("train_dit.py", "--config", config, "--output_dir", whole)
    for steps in (5, 12):
        run_here("train_dit.py", "--config", config, "--output_dir", parts, "--train.max_steps", steps)
    one, two = (read_checkpoint(folder, 12) for folder in (whole, parts))
    for group in one:
        for name, tensor in one[group].items():
            assert torch.equal(tensor, two[group][name]), name
    assert (whole / "samples" / "step-00000012.gif").exists()
    assert (whole / "samples" / "step-00000012.png").exists()

    other = tmp_path / "other"  # images of the same names elsewhere, but not the same
    shutil.copytree(latents / "latents of images", other)
    index = json.loads((other / "index.json").read_text())
    index["mean"][0] += 1
    (other / "index.json").write_text(json.dumps(index))
    longer = ("--config", config, "--output_dir", whole, "--train.max_steps", 13, "--data.images", other)
    assert "was begun on other data (mixed_in" in refused_here("train_dit.py", *longer)

    draw = (
        "sample.py",
        "--checkpoint",
        whole,
        "--steps",
        2,
        "--class",
        "ünï 漢",
        "a walk",
        "--num-images",
        2,
    )
    assert "4 clips in" in run_here(*draw, "--out", tmp_path / "grid.png")
    grid = Image.open(tmp_path / "grid.png")
    assert grid.height == 4 * 66
    animation = Image.open(tmp_path / "grid.gif")
    assert (animation.n_frames, animation.height) == (FRAMES, 2 * 66)
    with av.open(tmp_path / "grid.mp4") as container:
        assert sum(1 for _ in container.decode(video=0)) == FRAMES
    recipe_of = json.loads((tmp_path / "grid.json").read_text())
    assert recipe_of["classes"] == [2, 0]

    folder = tmp_path / "folder"
    assert "4 clips in" in run_here(*draw, "--out", folder)
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        *(f"000{c}-0000{k}.{x}" for c in (0, 2) for k in (0, 1) for x in ("gif", "mp4", "png")),
        "recipe.json",
    ]
    before = (folder / "0002-00001.gif").read_bytes()
    for suffix in (".gif", ".png"):
        (folder / f"0002-00001{suffix}").unlink()
    assert "1 clips in" in run_here(*draw, "--out", folder, "--batch-size", 1)
    assert (folder / "0002-00001.gif").read_bytes() == before
    longer = run_here(*draw, "--out", tmp_path / "long.gif", "--num-frames", 6)
    assert "4 clips" in longer
    assert Image.open(tmp_path / "long.gif").n_frames == 6
    assert "--fps is 0" in refused_here(*draw, "--fps", 0)


def test_images_have_steps_of_their_own(latents, recipe, tmp_path):
    config = load_config(
        recipe(
            data={
                "path": str(latents / "latents of videos"),
                "images": str(latents / "latents of images"),
                "image_share": 0.4,
            },
            model=CLIPS,
        )
    )
    clips = build_data.build_dataset(config)
    sets = generator.TrainingData(clips, build_data.build_images(config, clips))
    examples = generator.build_examples(config, sets)
    frames = []
    for step in range(200):
        batch = examples.__getitems__(list(range(8 * step, 8 * step + 8)))
        assert batch.x0.shape == batch.noise.shape == (8, *batch.x0.shape[1:])
        frames.append(batch.x0.shape[2])
    assert set(frames) == {1, FRAMES}
    assert frames.count(1) / 200 == pytest.approx(0.4, abs=0.1)
    step = frames.index(1)
    example = examples[8 * step]
    raw = LatentDataset(latents / "latents of images")
    mean, std = (torch.tensor(values)[:, None, None, None] for values in (clips.mean, clips.std))
    every = torch.stack([(raw.read_raw([i], f)[0][:, None] - mean) / std for i in range(9) for f in (0, 1)])
    assert (every - example.x0).abs().amax((1, 2, 3, 4)).min() < 1e-5, "in the clips' normalisation"


def test_a_model_of_images_is_where_one_of_clips_begins(latents, recipe, tmp_path, run_here, refused_here):
    images = {"path": str(latents / "latents of images")}
    short = {"max_steps": 3, "save_every_steps": 3}
    flat = recipe("flat.yaml", data=images, train=short)
    run_here("train_dit.py", "--config", flat, "--output_dir", tmp_path / "flat")
    mixer = {"window_size": ["all", 4, 4]}
    config = recipe(
        data={"path": str(latents / "latents of videos")},
        model={"sample_frames": FRAMES, "mixer": mixer, "init_from": str(tmp_path / "flat")},
        train=short,
    )
    model = loading.build_denoiser(load_config(config)).eval()
    flat_model = loading.load_pipeline(str(tmp_path / "flat")).transformer
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([100.0, 900.0]), torch.tensor([0, 3])
    assert torch.equal(model(x[:, :, None], t, y).sample[:, :, 0], flat_model(x, t, y).sample)
    run_here("train_dit.py", "--config", config, "--output_dir", tmp_path / "solid")
    error = refused_here(
        *("train_dit.py", "--config", config, "--output_dir", tmp_path / "other", "--model.width", 64)
    )
    assert "is another network than the config's" in error


def test_straight_from_videos(latents, recipe, tmp_path, run_here, refused_here):
    """Places and encoding are the step's; a broken video stops it with its name."""
    data = {
        "kind": "images",
        "path": str(latents / "videos"),
        "vae": str(latents / "vae"),
        "frame_stride": STRIDE,
        "normalization": "vae",
    }
    short = {"max_steps": 3, "save_every_steps": 3, "num_workers": 1}
    config = recipe(data=data, model=CLIPS, train=short)
    run_here("train_dit.py", "--config", config)
    dataset = build_data.build_dataset(load_config(config))
    x0, labels = dataset.draw([0, 5], [False, True], [torch.Generator().manual_seed(s) for s in (0, 1)])
    assert x0.shape == (2, 3, FRAMES, 16, 16)
    assert x0.dtype == torch.uint8
    steps = x0[0, 0, :, 8, 8].diff()
    assert torch.equal(steps, torch.full((FRAMES - 1,), 20 * STRIDE, dtype=torch.uint8)), "every second frame"
    assert labels == [0, 0]
    for path in Path(latents / "videos").rglob("*.gif"):
        copy = tmp_path / "broken" / path.parent.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes()[: 200 if "07" in path.name else None])
    config = recipe(data={**data, "path": str(tmp_path / "broken")}, model=CLIPS, train=short)
    assert "07 é.gif" in refused_here("train_dit.py", "--config", config, "--output_dir", tmp_path / "b")
