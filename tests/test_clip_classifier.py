"""train_classifier.py on clips: what it learns, how clips are varied and seen, where weights come from."""

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from conftest import assert_equal, read_checkpoint
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform

from iwin_dit.build import classifier, classifier_network
from iwin_dit.config.classifier import VIDEO_MODELS, ClassifierConfig
from iwin_dit.config.parse import load_config
from iwin_dit.data.labelled import HeldOutClips, LabelledClips, LabelledExamples, LabelledImages
from iwin_dit.data.sources import ClipFolderSource, open_source
from iwin_dit.data.video import ClipSpec, write_gif
from iwin_dit.models import iwin_transformer
from iwin_dit.models.backbone import IwinTransformer3D
from iwin_dit.models.official_names import official_name
from iwin_dit.runtime.errors import CheckpointError

FRAMES, HEIGHT, WIDTH = 6, 16, 20
SIZES = {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
MODEL = SIZES | {"patch_size": [2, 4, 4]}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A bar that moves right, round and round, and the same films backwards: no frame alone tells which.

    And first frames as images.
    """
    root = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 12)):
        for i in range(count):
            start, film = rng.integers(WIDTH), []
            for k in range(FRAMES):
                pixels = rng.integers(0, 40, (HEIGHT, WIDTH), dtype=np.uint8)
                pixels[:, (start + 2 * k + np.arange(4)) % WIDTH] += 200
                film.append(Image.fromarray(pixels))
            for name, frames in (("right", film), ("left", film[::-1])):
                (root / split / name).mkdir(parents=True, exist_ok=True)
                write_gif(frames, root / split / name / f"{i:02d}.gif", 8)
                (root / f"{split} images" / name).mkdir(parents=True, exist_ok=True)
                frames[0].save(root / f"{split} images" / name / f"{i:02d}.png")
    return root


@pytest.fixture
def write(videos, tmp_path):
    """``write(**sections)``: a recipe of clips that runs in a second."""

    def call(name="recipe.yaml", **sections):
        config = {
            "output_dir": str(tmp_path / "run"),
            "data": {
                **{"path": str(videos / "train"), "held_out": str(videos / "test"), "image_size": 16},
                **{"frames": 4, "crop_share": 1.0},
            },
            "augment": {
                **{"scale": [0.8, 1.0], "random_flip": False, "color_jitter": 0.0, "mixup": 0.0},
                **{"cutmix": 0.0, "rand_augment": "none", "random_erasing": 0.0},
            },
            "model": {"name": "iwin_tiny_video", "options": MODEL, "num_classes": 2},
            "optimizer": {"learning_rate": 3e-3, "schedule": "constant", "backbone_lr_scale": 0.5},
            "ema": {"decays": [0.8]},
            "train": {
                **{"max_steps": 4, "batch_images": 8, "precision": "fp32", "num_workers": 0},
                **{"log_every_steps": 2, "save_every_steps": 2, "sample_every_steps": 0},
            },
        }
        for section, values in sections.items():
            config[section] = config[section] | values if isinstance(values, dict) else values
        path = tmp_path / name
        path.write_text(yaml.safe_dump(config))
        return path

    return call


@pytest.fixture
def classify_here(script_here):
    return functools.partial(script_here, "train_classifier.py")


def read_log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def build(path):
    return classifier_network.build_classifier(load_config(path, ClassifierConfig)).eval()


def test_it_learns_what_only_motion_tells(write, classify_here, videos, tmp_path):
    """And the accuracy is that of the exported weights, the mean of their views' probabilities, by hand."""
    recipe = write(
        data={"views": [2, 3]},
        optimizer={"backbone_lr_scale": 1.0},
        train=dict.fromkeys(
            ("max_steps", "save_every_steps", "evaluate_every_steps", "sample_every_steps"), 80
        ),
    )
    code, output = classify_here("--config", recipe)
    assert code == 0, output
    run = tmp_path / "run"
    assert f"weights in {run}/model.safetensors" in output
    found = read_log(run)[-1]
    assert found["top1"] >= 90
    assert (run / "samples" / "step-00000080.png").is_file()

    settings = json.loads((run / "model.json").read_text())
    model = IwinTransformer3D(**settings["arguments"]).eval()
    model.load_state_dict(load_file(run / "model.safetensors"))
    mean, std = (torch.tensor(settings[key])[:, None, None, None] for key in ("mean", "std"))
    right = count = 0
    for label, name in enumerate(settings["class_names"]):
        for path in sorted((videos / "test" / name).iterdir()):
            with Image.open(path) as film:
                frames = []
                for k in range(FRAMES):
                    film.seek(k)
                    frames.append(np.asarray(film.convert("RGB")))
            pixels = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2) / 255  # (3, T, H, W)
            views = [
                ((pixels[:, start : start + 4, :, left : left + 16] - mean) / std)[None]
                for start in (0, 2)
                for left in (0, 2, 4)
            ]
            with torch.no_grad():
                chances = sum(model(view).softmax(-1) for view in views) / 6
            right += int(chances.argmax()) == label
            count += 1
    assert found["top1"] == pytest.approx(100 * right / count, abs=1e-3)
    with pytest.raises(CheckpointError, match="run of a classifier of clips; expected one of images"):
        classifier_network.load_classifier(str(run))


def test_it_stops_and_goes_on_to_the_same_bits(write, classify_here, tmp_path):
    mixed = write(augment={"mixup": 0.8, "cutmix": 1.0, "random_erasing": 0.5}, model={"drop_path": 0.1})
    for steps in ("2", "4"):
        code, output = classify_here("--config", mixed, "--train.max_steps", steps)
        assert code == 0, output
    code, output = classify_here("--config", mixed, "--output_dir", tmp_path / "whole")
    assert code == 0, output
    assert_equal(*(read_checkpoint(tmp_path / name, 4) for name in ("run", "whole")))


def still(frame):
    return [frame] * FRAMES


@pytest.fixture
def noise():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))


@pytest.fixture
def clips(tmp_path):
    """``clips(*films)``: a source of them, as folders of frames."""

    def call(*films):
        for i, film in enumerate(films):
            folder = tmp_path / "clips" / "class" / str(i)
            folder.mkdir(parents=True)
            for k, frame in enumerate(film):
                frame.save(folder / f"{k}.png")
        return ClipFolderSource(tmp_path / "clips")

    return call


def test_all_frames_are_varied_alike(clips, noise):
    varied = create_transform(
        16, is_training=True, auto_augment="rand-m9-mstd0.5-inc1-mmax9", re_prob=0.5, re_mode="pixel"
    )
    images = LabelledClips(clips(still(noise)), varied, spec=ClipSpec(4))
    examples = LabelledExamples(images, seed=0, mixup=0.0, cutmix=0.0)
    seen = [examples[position].image for position in range(8)]
    for position, clip in enumerate(seen):
        assert clip.shape == (3, 4, 16, 16)
        assert torch.equal(clip, clip[:, :1].expand_as(clip))
        assert torch.equal(clip, examples[position].image), "a function of the position"
    assert len({clip.sum().item() for clip in seen}) == 8, "each position draws anew"


def test_places_are_drawn_and_say_nothing_of_flips(clips):
    """Frame k has level 40 k on its left, so that a clip tells its place and whether it is mirrored."""
    film = [Image.new("RGB", (16, 16)) for _ in range(3)]
    for k, frame in enumerate(film):
        frame.paste((40 * k + 40,) * 3, (0, 0, 8, 16))
    transform = create_transform(
        16, is_training=True, scale=(1, 1), ratio=(1, 1), color_jitter=None, mean=(0,) * 3, std=(1,) * 3
    )
    images = LabelledClips(clips(film), transform, spec=ClipSpec(2))
    torch.manual_seed(0)
    found = [
        tuple((255 * images[0][0][0, :, 8, [2, 13]]).round().int().flatten().tolist()) for _ in range(60)
    ]
    assert set(found) == {(40, 0, 80, 0), (0, 40, 0, 80), (80, 0, 120, 0), (0, 80, 0, 120)}
    assert min(found.count(kind) for kind in set(found)) > 5


@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (17, 16)])
def test_one_view_of_one_frame_is_what_an_image_would_be(tmp_path, size, shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    (tmp_path / "class" / "clip").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "class" / "clip" / "0.png")
    plain = create_transform((3, *size), interpolation="bicubic", crop_pct=0.9)
    view, label = HeldOutClips(ClipFolderSource(tmp_path), plain, None, ClipSpec(1), (1, 1))[0]
    image, _ = LabelledImages(open_source(str(tmp_path)), plain)[0]
    assert label == 0
    assert torch.equal(view[0, :, 0], image)


def test_views_are_clips_over_the_video_and_crops_along_its_longer_side(clips, noise):
    frames = [noise.point(lambda value, k=k: value // 4 + 30 * k) for k in range(FRAMES)]
    turned = [frame.transpose(Image.Transpose.TRANSPOSE) for frame in frames]
    plain = create_transform(24, interpolation="bicubic", crop_pct=1.0, mean=(0,) * 3, std=(1,) * 3)
    images = HeldOutClips(clips(frames, turned), plain, None, ClipSpec(2, stride=2), (2, 3))
    views = (images[0][0] * 255).round().byte()
    assert views.shape == (6, 3, 2, 24, 24)
    for i, (start, left) in enumerate((s, x) for s in (0, 3) for x in (0, 8, 16)):
        expected = np.stack([np.asarray(frames[k])[:, left : left + 24] for k in (start, start + 2)])
        assert torch.equal(views[i], torch.from_numpy(expected).permute(3, 0, 1, 2))
    assert torch.equal((images[1][0] * 255).round().byte(), views.transpose(-1, -2))


@pytest.fixture
def flat(write, classify_here, videos, tmp_path):
    """The run of an image classifier, with weights that matter."""
    recipe = write(
        "flat.yaml",
        output_dir=str(tmp_path / "flat"),
        data={"path": str(videos / "train images"), "held_out": str(videos / "test images"), "frames": None},
        model={"name": "iwin_tiny_patch4_window7_224", "options": SIZES | {"patch_size": 4}},
    )
    code, output = classify_here("--config", recipe)
    assert code == 0, output
    return tmp_path / "flat"


@pytest.mark.parametrize("kind", ["run", "authors", "ours"])
def test_a_clip_that_stands_still_is_the_image_that_the_weights_knew(flat, write, tmp_path, kind):
    image_model = classifier_network.load_classifier(str(flat)).model
    stored = image_model.state_dict()
    source = {"run": flat, "authors": tmp_path / "a.pth", "ours": tmp_path / "ours.safetensors"}[kind]
    if kind == "authors":
        torch.save({"model": {official_name(name): tensor for name, tensor in stored.items()}}, source)
    elif kind == "ours":
        save_file(stored, source)
    model = build(write(model={"init_from": str(source)}))
    assert not model.pos_embed.any()
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        found = model(images[:, :, None].expand(-1, -1, 4, -1, -1))
        torch.testing.assert_close(found, image_model(images), atol=1e-4, rtol=0)
        other = model(torch.randn(3, 3, 4, 16, 16))
    assert (found - other).abs().max() > 1e-2, "it looks at the clip"


def test_clips_begin_from_clips_and_not_from_other_networks(flat, write, classify_here, tmp_path):
    code, output = classify_here("--config", write())
    assert code == 0, output
    first = load_file(tmp_path / "run" / "model.safetensors")
    for source in (tmp_path / "run", tmp_path / "run" / "model.safetensors"):
        begun = build(write(model={"init_from": str(source)})).state_dict()
        assert all(torch.equal(begun[name], tensor) for name, tensor in first.items())
        assert begun.keys() == first.keys()

    theirs = {official_name(name, 3): tensor for name, tensor in first.items() if not name.startswith("head")}
    theirs["time_embed"] = first["pos_embed"].movedim(-1, 1)
    theirs = {
        name: tensor.squeeze(2) if tensor.shape[2:3] == (1,) else tensor for name, tensor in theirs.items()
    }
    heads = {"cls_head.fc_cls.weight": torch.zeros(400, 32)}
    torch.save(
        {"state_dict": {f"backbone.{n}": t for n, t in theirs.items()} | heads}, tmp_path / "video.pth"
    )
    begun = build(write(model={"init_from": str(tmp_path / "video.pth")})).state_dict()
    assert all(torch.equal(begun[n], t) for n, t in first.items() if not n.startswith("head"))

    options = MODEL | {"num_heads": [2, 2]}
    with pytest.raises(CheckpointError, match=r"has \[1, 2\] heads, the model \[2, 2\]"):
        build(write(model={"init_from": str(flat), "options": options}))
    with pytest.raises(CheckpointError, match="holds the weights of another network"):
        build(write(model={"init_from": str(flat), "options": MODEL | {"embed_dim": 32}}))
    with pytest.raises(CheckpointError, match="holds the weights of another network"):
        classifier_network.begin_classifier(build(flat / "config.yaml"), str(tmp_path / "run"))


def test_the_head_learns_faster_than_what_is_below_it(write):
    path, rates = write(optimizer={"layer_decay": 0.5, "weight_decay": 0.02}), {}
    model, config = build(path), load_config(path, ClassifierConfig)
    for scale in (1.0, 0.1):
        config = replace(config, optimizer=replace(config.optimizer, backbone_lr_scale=scale))
        groups = classifier.parameter_groups(model, config)
        found = {
            id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]
        }
        rates[scale] = {name: found[id(p)] for name, p in model.named_parameters()}
        assert len(found) == len(rates[scale])
    assert rates[1.0]["layers.1.blocks.0.mlp.fc1.weight"] < rates[1.0]["head.fc.weight"] == (1, 0.02)
    for name, (rate, decay) in rates[1.0].items():
        below = 1.0 if name.startswith("head.fc.") else 0.1
        assert rates[0.1][name] == (pytest.approx(below * rate), decay), name


def test_the_table_of_models_is_the_configs_and_its_figures_are_the_images():
    """Those of 1,000 classes, less 600 classes, with a second frame in each patch and 16 places in time."""
    assert tuple(iwin_transformer.VIDEO_MODELS) == VIDEO_MODELS
    for name, images in (("iwin_tiny_video", 30_226_504), ("iwin_small_video", 51_566_152)):
        with torch.device("meta"):
            model = IwinTransformer3D(num_classes=400, **iwin_transformer.VIDEO_MODELS[name])
        added = 3 * 4 * 4 * 96 + 16 * 96 - 600 * 769
        assert sum(p.numel() for p in model.parameters()) == images + added


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data.frames", "null"), "model.name iwin_tiny_video takes clips, the data are images; set"),
        (
            ("--model.name", "iwin_tiny_patch4_window7_224"),
            "expected one of iwin_tiny_video, iwin_small_video",
        ),
        (
            ("--data.frames", "null", "--data.views", "[2, 1]"),
            "data.views is [2, 1], but is not read without data.frames",
        ),
        (
            ("--data.frames", "null", "--data.frame_stride", "2"),
            "data.frame_stride is 2, but is not read without data.frames",
        ),
        (("--data.frames", "null", "--data.prepare", "moving_digits"), "moving_digits makes clips; set"),
        (("--data.frames", "0"), "data.frames is 0, expected a number above 0"),
        (("--data.frame_stride", "0"), "data.frame_stride is 0, expected a number above 0"),
        (("--data.views", "[1, 2]"), "data.views is [1, 2], expected the number of clips"),
        (("--data.views", "[0, 1]"), "data.views is [0, 1], expected the number of clips"),
        (("--data.views", "3"), "data.views is"),
        (
            ("--data.labels", "labels.csv"),
            "data.labels is 'labels.csv', but is not read without data.frames null",
        ),
        (
            ("--data.held_out_labels", "labels.csv"),
            "data.held_out_labels is 'labels.csv', but is not read without data.frames null",
        ),
        (("--data.prepare", "digits"), "data.prepare digits makes images; remove data.frames"),
        (("--optimizer.backbone_lr_scale", "0"), "optimizer.backbone_lr_scale is 0"),
        (("--data.held_out", "nowhere"), "nowhere is not a folder"),
        (("--model.num_classes", "3"), "has 2 classes, the config's model.num_classes is 3; set it to 2"),
        (("--model.options", "{embed: 3}"), "do not make a iwin_tiny_video"),
        (("--data.frames", "7"), ".gif has 6 frames, a clip of 7 frames with stride 1 takes 7"),
        (("--data.frame_stride", "2"), "has 6 frames, a clip of 4 frames with stride 2 takes 7"),
    ],
)
def test_mistakes_are_one_line(write, classify_here, arguments, message):
    code, output = classify_here("--config", write(), *arguments)
    assert code == 2
    assert message in output
    assert "Traceback" not in output
    assert output.count("error: ") == 1


def test_a_broken_held_out_video_is_named(write, classify_here, videos, tmp_path):
    film = (videos / "test" / "left" / "00.gif").read_bytes()
    for name, data in (("left", film), ("right", film[:-100])):
        (tmp_path / "held" / name).mkdir(parents=True)
        (tmp_path / "held" / name / "a.gif").write_bytes(data)
    recipe = write(data={"held_out": str(tmp_path / "held")}, train={"evaluate_every_steps": 2})
    code, output = classify_here("--config", recipe)
    assert code == 2
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "held/right/a.gif" in lines[0]
    assert "cut off" in lines[0]


def test_dry_run_counts_clips(write, classify_here):
    code, output = classify_here("--config", write(), "--dry-run")
    assert code == 0
    assert "6.0 steps (48 clips)" in output
    assert "multiply-adds per clip" in output
    assert "4 steps of 8 clips" in output
