"""train_classifier.py: trains, stops, resumes to the same bits, is judged, handed on and fine-tuned."""

import functools
import json
import os
import signal

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import assert_equal, read_checkpoint, watch_attention
from PIL import Image

from iwin_dit.build import classifier, classifier_network
from iwin_dit.build.loading import load_pipeline, newest_run
from iwin_dit.config.classifier import ClassifierConfig
from iwin_dit.config.parse import load_config
from iwin_dit.runtime.errors import CheckpointError

MODEL = {"patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three colours with noise, 12 images of each to train on and 6 held out."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for label in range(3):
            folder = root / split / ["red", "green", "blue"][label]
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (20, 20, 3), dtype=np.uint8)
                pixels[..., label] += 100
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture
def write(pictures, tmp_path):
    """``write(**sections)``: a recipe that runs in a second."""

    def call(name="recipe.yaml", **sections):
        config = {
            "output_dir": str(tmp_path / "run"),
            "data": {"path": str(pictures / "train"), "held_out": str(pictures / "test"), "image_size": 16},
            "augment": {"random_erasing": 0.5},
            "model": {"options": MODEL, "num_classes": 3, "drop_path": 0.1},
            "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2, "layer_decay": 0.8},
            "ema": {"decays": [0.8]},
            "train": {
                **{"max_steps": 8, "batch_images": 8, "precision": "fp32", "num_workers": 0},
                **{"log_every_steps": 2, "save_every_steps": 4, "sample_every_steps": 4},
                **{"evaluate_every_steps": 4},
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


def test_it_trains_stops_and_goes_on_to_the_same_bits(write, classify_here, tmp_path, monkeypatch):
    """Also where SIGTERM comes in the middle of an evaluation, which is then made again."""
    code, output = classify_here("--config", write())
    assert code == 0, output
    assert "trained to step 8, top-1" in output
    whole = read_log(tmp_path / "run")
    assert [record["evaluated"] for record in whole if "evaluated" in record] == [4, 8]
    assert (tmp_path / "run" / "samples" / "step-00000004.png").is_file()
    assert (tmp_path / "run" / "loss.png").is_file()

    reading = classifier.held_out_loader

    def stopping(*arguments):
        for batch in reading(*arguments):
            os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(classifier, "held_out_loader", stopping)
    code, output = classify_here("--config", write(), "--output_dir", tmp_path / "other")
    assert code == 143, output
    broken = read_log(tmp_path / "other")
    assert not [record for record in broken if "evaluated" in record]
    stopped = int(output.split("stopped at step ")[1].split()[0])
    assert 4 <= stopped < 8
    monkeypatch.undo()
    code, output = classify_here("--config", write(), "--output_dir", tmp_path / "other")
    assert code == 0, output
    assert_equal(*(read_checkpoint(tmp_path / name, 8) for name in ("run", "other")))
    found = [record for record in read_log(tmp_path / "other") if "evaluated" in record]
    assert found[-1] == [record for record in whole if "evaluated" in record][-1]


def test_accuracy_is_that_of_the_loaded_classifier(write, classify_here, pictures, tmp_path):
    code, output = classify_here("--config", write(train={"max_steps": 40, "sample_every_steps": 0}))
    assert code == 0, output
    loaded = classifier_network.load_classifier(str(tmp_path / "run"))
    assert loaded.class_names == ["blue", "green", "red"]
    right = count = 0
    for label, name in enumerate(loaded.class_names):
        for path in sorted((pictures / "test" / name).iterdir()):
            pixels = Image.open(path).resize((18, 18), Image.Resampling.BICUBIC).crop((1, 1, 17, 17))
            x = torch.from_numpy(np.asarray(pixels).copy()).permute(2, 0, 1)[None] / 255
            mean, std = (torch.tensor(values)[:, None, None] for values in (loaded.mean, loaded.std))
            right += int(loaded.model((x - mean) / std).argmax()) == label
            count += 1
    last = [record for record in read_log(tmp_path / "run") if "top1" in record][-1]
    assert last["top1"] == pytest.approx(100 * right / count, abs=1e-3)
    assert last["top1"] > 60, "colours are easy"
    assert last["top5"] == 100

    exported = timm.create_model(f"local-dir:{tmp_path / 'run' / 'timm'}", pretrained=True).eval()
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(exported(x), loaded.model(x))
    with pytest.raises(CheckpointError, match="no run"):
        newest_run(tmp_path)
    with pytest.raises(CheckpointError, match="is the run of a classifier"):
        load_pipeline(str(tmp_path / "run"))


def test_a_finer_resolution_and_other_classes_begin_from_a_run(write, classify_here, pictures, tmp_path):
    code, output = classify_here("--config", write(train={"evaluate_every_steps": 0}))
    assert code == 0, output
    first = classifier_network.load_classifier(str(tmp_path / "run"))
    finer = write(
        "finer.yaml",
        output_dir=str(tmp_path / "finer"),
        data={"image_size": [32, 24]},
        model={"init_from": str(tmp_path / "run")},
    )
    config = load_config(finer, ClassifierConfig)
    begun, before = classifier_network.build_classifier(config).state_dict(), first.model.state_dict()
    assert all(torch.equal(begun[name], tensor) for name, tensor in before.items())
    added = set(begun) - set(before)
    assert added
    assert all("layers.1.blocks.0.mixer.convolution" in name for name in added), "its window was the grid"
    code, output = classify_here("--config", finer, "--train.max_steps", "2")
    assert code == 0, output
    evaluated = [record["evaluated"] for record in read_log(tmp_path / "finer") if "evaluated" in record]
    assert evaluated == [0, 2], "as it was loaded, and at the end"

    other = write("head.yaml", model={"init_from": str(tmp_path / "run"), "num_classes": 5})
    config = load_config(other, ClassifierConfig)
    model = classifier_network.build_classifier(config)
    assert model.get_classifier().out_features == 5
    assert torch.equal(model.patch_embed.proj.weight, first.model.patch_embed.proj.weight)

    wider = {"init_from": str(tmp_path / "run"), "options": MODEL | {"embed_dim": 16}}
    code, output = classify_here("--config", write(model=wider), "--output_dir", tmp_path / "wider")
    assert code == 2
    assert "holds the weights of another network" in output


def test_any_model_of_timm_trains(write, classify_here, tmp_path):
    """Swin, with the same recipe."""
    options = {"patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
    swin = write(model={"name": "swin_tiny_patch4_window7_224", "options": options, "drop_path": 0.0})
    code, output = classify_here(
        "--config", swin, "--train.max_steps", "2", "--train.sample_every_steps", "0"
    )
    assert code == 0, output


def test_pairs_stay_in_one_micro_batch(write, classify_here, monkeypatch):
    monkeypatch.setattr("iwin_dit.build.trainer.largest_that_fits", lambda attempt, most: 1)
    code, output = classify_here("--config", write(), "--train.micro_batch", "auto")
    assert code == 0, output
    assert "micro-batches of 2 images, 4 to a step" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model.num_classes", "4"), "has 3 classes, the config's model.num_classes is 4; set it to 3"),
        (("--model.name", "iwin_huge"), "model.name iwin_huge is not one of timm's; such as iwin_"),
        (("--model.options", "{embed: 3}"), "model.options"),
        (("--train.batch_images", "7"), "join images two by two; take 8"),
        (("--train.sharding", "fsdp2"), "train.sharding fsdp2 is for train_dit.py"),
        (("--data.held_out", "nowhere"), "nowhere does not exist"),
        (("--data.crop_share", "0"), "data.crop_share is 0.0, expected a number from 0.1 to 1"),
        (("--optimizer.min_learning_rate", "1"), "is above optimizer.learning_rate 0.003"),
        (("--train.gradient_checkpointing", "2"), "gradient_checkpointing is 2, expected 1 or 0"),
        (("--model.init_from", "nowhere"), "model.init_from nowhere is neither"),
        (("--augment.rand_augment", "rand-m10"), "may reach magnitude 10, where Pillow refuses"),
        (("--augment.rand_augmentation", "none"), "did you mean"),
        (("--augment.rand_augment", "foo"), "augment.rand_augment is foo, expected none or timm's words"),
        (("--augment.rand_augment", "rand-q9-mmax9"), "expected none or timm's words for RandAugment"),
        (("--augment.rand_augment", "augmix-m10"), "expected none or timm's words for RandAugment"),
        (("--augment.ratio", "[0, 0]"), "augment.ratio is [0.0, 0.0], expected 0.01 <= low <= high <= 100"),
        (("--augment.ratio", "[2, 1]"), "augment.ratio is [2.0, 1.0], expected 0.01 <= low <= high <= 100"),
        (("--augment.mixup", "1e-300"), "augment.mixup is 1e-300, expected 0 or at least 0.001"),
        (("--data.image_size", "-32"), "data.image_size is -32, expected a number above 0"),
        (("--data.image_size", "[8, 0]"), "data.image_size is [8, 0], expected a number above 0"),
        (("--data.image_size", "100000"), "data.image_size is 100000, expected at most 8,192"),
        (("--data.std", "[0, 1, 1]"), "data.std is [0.0, 1.0, 1.0], expected numbers above 0"),
        (
            ("--data.mean", "[.nan, 0, 0]"),
            "data.mean is [nan, 0, 0], expected a list of 3, each a finite number",
        ),
        (("--data.crop_share", "0.0001"), "data.crop_share is 0.0001, expected a number from 0.1 to 1"),
        (("--optimizer.layer_decay", "2"), "optimizer.layer_decay is 2.0, expected at most 1"),
        (("--model.options", "{depths: [100000]}"), "has depths [100000], expected at most 1,000 blocks"),
        (
            ("--model.options", "{embed_dim: 100000000000}"),
            "has embed_dim 100000000000, expected numbers of at",
        ),
        (("--model.options", "{patch_size: 0}"), "do not make a iwin_tiny"),
        (("--model.options", "{in_chans: 1}"), "does not take 3 x"),
        (("--model.options", "{features_only: true}"), "does not return a number for each of the 3 classes"),
        (
            ("--model.options", "{checkpoint_path: x.pth}"),
            "has checkpoint_path, which makes timm load a file",
        ),
        (("--model.options", "{pretrained: true}"), "has pretrained, which makes timm load a file"),
        (("--model.options", "{pretrained_cfg_overlay: {file: x.pth}}"), "has pretrained_cfg_overlay, which"),
        (
            ("--model.name", "resnet18.foo", "--model.options", "{}"),
            "Invalid pretrained tag (foo) for resnet18",
        ),
    ],
)
def test_mistakes_are_one_line(write, classify_here, arguments, message):
    code, output = classify_here("--config", write(), *arguments)
    assert code == 2
    assert message in output
    assert "Traceback" not in output
    assert output.count("error: ") == 1


def test_dry_run_and_classes_that_differ(write, classify_here, pictures, tmp_path):
    code, output = classify_here("--config", write(), "--dry-run")
    assert code == 0
    assert "4.5 steps (36 images)" in output
    assert "multiply-adds per image" in output
    (tmp_path / "held" / "red").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "held" / "red" / "0.png")
    code, output = classify_here("--config", write(), "--data.held_out", tmp_path / "held")
    assert code == 2
    assert "has 3 classes and" in output
    assert "blue, green" in output


def test_a_model_that_cannot_compute_blocks_twice_says_so(write, classify_here):
    model = {"name": "dla46_c", "options": {}, "drop_path": 0.0}
    code, output = classify_here("--config", write(model=model), "--train.gradient_checkpointing", "1")
    assert code == 2, output
    assert "train.gradient_checkpointing is 1, but model.name dla46_c does not support it; set 0" in output
    assert "Traceback" not in output


def test_a_longer_run_of_a_cosine_is_another_one(write, classify_here, tmp_path):
    """The learning rate of a finished one has come down to nothing; it would jump back up."""
    recipe = write(train={"max_steps": 2, "sample_every_steps": 0, "evaluate_every_steps": 0})
    code, output = classify_here("--config", recipe)
    assert code == 0, output
    code, output = classify_here("--config", recipe, "--train.max_steps", "4")
    assert code == 2, output
    assert "begun with train.max_steps 2, found 4: the learning rate of optimizer.schedule cosine" in output
    more = ("--output_dir", tmp_path / "longer", "--model.init_from", tmp_path / "run")
    code, output = classify_here("--config", recipe, "--train.max_steps", "4", *more)
    assert code == 0, output


def test_held_out_images_may_move(write, classify_here, pictures, tmp_path):
    recipe = write(train={"max_steps": 2, "sample_every_steps": 0})
    code, output = classify_here("--config", recipe)
    assert code == 0, output
    code, output = classify_here(
        *("--config", recipe, "--data.held_out", pictures / ".." / pictures.name / "test")
    )
    assert code == 0, output


def test_pictures_take_the_attention_that_they_find(write, classify_here, monkeypatch):
    """They are classified in float32, which training's need not serve."""
    seen = watch_attention(monkeypatch)
    train = {"max_steps": 2, "sample_every_steps": 2, "evaluate_every_steps": 0, "attention_backend": "math"}
    code, output = classify_here("--config", write(train=train))
    assert code == 0, output
    assert seen == {(True, False), (False, True)}
