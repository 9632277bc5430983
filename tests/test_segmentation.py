"""examples/segmentation: drawn images, ADE20K's layout, mIoU by scikit-learn, a run and its resumption."""

import functools
import json
import sys

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import jaccard_score

from iwin_dit.runtime.errors import DataError

pytest.importorskip("segmentation_models_pytorch", reason="the examples extra")
FOLDER = ROOT / "examples" / "segmentation"
OPTIONS = "{patch_size: 4, embed_dim: 8, depths: [1, 1, 1], num_heads: [1, 2, 4], window_size: 4}"
TINY = (
    *("--encoder_options", OPTIONS, "--decoder_channels", "8", "--image_size", "32", "--max_steps", "4"),
    *(
        "--held_out_images",
        "6",
        "--batch_images",
        "4",
        "--save_every_steps",
        "2",
        "--evaluate_every_steps",
        "2",
    ),
)


@pytest.fixture(autouse=True)
def example(monkeypatch):
    """The folder's modules can be imported; then they are forgotten, as another's may have their names."""
    names = {path.stem for path in FOLDER.glob("*.py")}
    for name in names:
        sys.modules.pop(name, None)
    monkeypatch.syspath_prepend(FOLDER)
    yield
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def train(script_here):
    return functools.partial(script_here, "examples/segmentation/train.py")


def test_a_drawn_image_is_a_function_of_its_key_and_its_mask_of_its_pixels():
    from shapes import CLASSES, Shapes, draw

    seen = set()
    for index in range(40):
        pixels, mask = draw((3, "train", index), 48, noise=0.0)
        again, mask_again = draw((3, "train", index), 48, noise=0.0)
        assert np.array_equal(pixels, again)
        assert np.array_equal(mask, mask_again)
        colours = {}  # each shape has one colour, which no other class and no background pixel has
        for colour, label in zip(map(bytes, pixels.reshape(-1, 3)), mask.flat, strict=True):
            if label:
                colours.setdefault(colour, set()).add(int(label))
        assert 1 <= len(colours) <= 3
        assert all(len(labels) == 1 for labels in colours.values())
        assert not {bytes(colour) for colour in pixels[mask == 0]} & set(colours)
        seen |= set(np.unique(mask))
    assert seen == set(range(len(CLASSES)))

    one, other = Shapes(3, "train", 5, 48), Shapes(3, "held-out", 5, 48)
    assert torch.equal(one[2][0], Shapes(3, "train", 9, 48)[2][0])
    assert not torch.equal(one[2][1], other[2][1])
    assert not torch.equal(one[2][1], one[3][1])


@pytest.mark.parametrize(
    ("kind", "area"),
    [("circle", np.pi), ("ring", np.pi * (1 - 0.55**2)), ("square", 2.0), ("triangle", 0.75 * 3**0.5)],
)
def test_a_shape_has_the_area_of_its_name(kind, area):
    from shapes import inside

    found = inside(kind, 200, np.array([100.0, 100.0]), 80.0, 0.3)
    assert found.sum() == pytest.approx(area * 80**2, rel=0.01)
    assert found[100, 100] == (kind != "ring")


def test_miou_is_that_of_an_independent_count():
    from upernet import IGNORED, confusion, iou_per_class

    rng = np.random.default_rng(0)
    masks, found = rng.choice([0, 1, 2, 4, IGNORED], (2, 9, 7)), rng.choice([0, 1, 2, 3], (2, 9, 7))
    counts = sum(confusion(torch.tensor(f), torch.tensor(m), 6) for m, f in zip(masks, found, strict=True))
    kept = masks != IGNORED
    expected = jaccard_score(masks[kept], found[kept], labels=range(5), average=None)
    values = iou_per_class(counts)
    np.testing.assert_allclose(values[:5], expected)
    assert torch.isnan(values[5]), "nowhere seen"
    assert values.nanmean().item() == pytest.approx(
        jaccard_score(masks[kept], found[kept], labels=range(5), average="macro")
    )


def test_a_run_goes_on_to_the_same_weights_and_says_that_it_is_finished(train, tmp_path, monkeypatch):
    code, output = train(*TINY, "--output_dir", tmp_path / "whole")
    assert code == 0, output
    assert "step 2: mIoU" in output
    assert "triangle" in output
    found = json.loads((tmp_path / "whole" / "results.json").read_text())
    values = [value for value in found["iou"].values() if value is not None]
    assert found["miou"] == pytest.approx(np.mean(values), abs=1e-4)
    with Image.open(tmp_path / "whole" / "predictions.png") as picture:
        assert picture.width > 700

    import training

    evaluating = training.evaluate
    monkeypatch.setattr(training, "evaluate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert train(*TINY, "--output_dir", tmp_path / "broken")[0] == 130
    monkeypatch.setattr(training, "evaluate", evaluating)
    code, output = train(*TINY, "--output_dir", tmp_path / "broken")
    assert code == 0, output
    assert "going on from step 2" in output
    whole, broken = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    assert whole.keys() == broken.keys()
    assert all(torch.equal(whole[name], broken[name]) for name in whole)

    code, output = train(*TINY, "--output_dir", tmp_path / "whole")
    assert code == 0
    assert "is finished: step 4" in output
    code, output = train(*TINY, "--output_dir", tmp_path / "whole", "--seed", "1")
    assert code == 2
    assert "holds a run of another recipe" in output


@pytest.mark.parametrize("at", [2, 4, "weights"])
def test_what_is_not_finite_is_not_stored(train, tmp_path, monkeypatch, at):
    """The loss of a step in the middle or of the last one, or weights that a step left so."""
    import training

    losses, real, replacing = [], training.segmentation_loss, training.files.replace

    def loss(*arguments):
        losses.append(0)
        return real(*arguments) * (torch.nan if len(losses) == at else 1)

    def replace(path, data):
        replacing(path, data)
        if path.suffix == ".safetensors":
            assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values())

    monkeypatch.setattr(training, "segmentation_loss", loss)
    monkeypatch.setattr(training.files, "replace", replace)
    if at == "weights":
        monkeypatch.setattr(training, "poly_rate", lambda *_: float("inf"))
    folder = tmp_path / "run"
    code, output = train(*TINY, "--output_dir", folder)
    assert code == 4, output
    assert "training diverged" in output
    assert "lower learning_rate" in output
    assert not (folder / "model.safetensors").exists()
    assert not (folder / "results.json").exists()
    if at == 4:  # the checkpoint of step 2 stays, and the same command goes on from it
        monkeypatch.setattr(training, "segmentation_loss", real)
        code, output = train(*TINY, "--output_dir", folder)
        assert code == 0, output
        assert "going on from step 2" in output


@pytest.mark.parametrize("damage", ["cut", "other", "not finite"])
def test_a_damaged_checkpoint_is_one_line(train, tmp_path, monkeypatch, damage):
    import training

    monkeypatch.setattr(training, "evaluate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert train(*TINY, "--output_dir", tmp_path / "run")[0] == 130
    path = tmp_path / "run" / "checkpoint.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.startswith("model/") and tensors[name].ndim)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage == "other":
        save_file(tensors | {name: tensors[name][None]}, path, {"step": "2"})
    else:
        save_file(tensors | {name: tensors[name] * torch.nan}, path, {"step": "2"})
    code, output = train(*TINY, "--output_dir", tmp_path / "run")
    assert code == 2, output
    assert "remove it, or take another output_dir" in output
    assert "Traceback" not in output


@pytest.fixture
def ade20k(tmp_path):
    """Three images in ADE20K's layout; of each, the left half is not labelled, the right is 1 and 150."""
    root = tmp_path / "ADEChallengeData2016"
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(3):
            height, width = 40 + 8 * i, 70
            labels = np.zeros((height, width), np.uint8)
            labels[:, 35:], labels[height // 2 :, 35:] = 1, 150
            pixels = np.full((height, width, 3), 30, np.uint8)
            pixels[labels == 150] = (200, 40, 40)
            Image.fromarray(pixels).save(root / "images" / split / f"ADE_{i:08d}.jpg", quality=95)
            Image.fromarray(labels).save(root / "annotations" / split / f"ADE_{i:08d}.png")
    return root


def test_ade20k_is_read_with_its_zero_label_ignored(ade20k):
    from ade20k import ADE20K

    held_out = ADE20K(str(ade20k), "validation", 32, seed=0)
    assert len(held_out) == 3
    assert len(held_out.class_names) == 150
    image, mask = held_out[1]
    assert image.shape == (3, 32, 46), "the shorter side is 32"
    assert mask.shape == (48, 70), "its own size"
    assert set(mask[:, :35].unique().tolist()) == {255}
    assert set(mask[:24, 35:].unique().tolist()) == {0}
    assert set(mask[24:, 35:].unique().tolist()) == {149}
    (ade20k / "objectInfo150.txt").write_text("Idx\tRatio\tName\n1\t0.1\twall\n2\t0.1\tbuilding, edifice\n")
    assert ADE20K(str(ade20k), "validation", 32, seed=0).class_names == ("wall", "building")

    train = ADE20K(str(ade20k), "training", 32, seed=0, count=90)
    assert sorted(train.shuffled(i) for i in range(3, 6)) == [0, 1, 2]
    for index in range(12):
        image, mask = train[index]
        assert image.shape == (3, 32, 32)
        assert set(mask.unique().tolist()) <= {0, 149, 255}
        assert torch.equal(image, train[index][0])
        colour = image * torch.tensor(train.std)[:, None, None] + torch.tensor(train.mean)[:, None, None]
        vivid = colour.amax(0) - colour.amin(0) > 0.2
        for label, expected in ((149, True), (0, False)):  # away from edges: mask and image move together
            inner = -torch.nn.functional.max_pool2d(-(mask == label).float()[None], 7, 1, 3)[0] > 0
            assert (vivid[inner] == expected).all()

    (ade20k / "annotations" / "training" / "ADE_00000001.png").unlink()
    with pytest.raises(
        DataError, match="1 of 3 images have no annotation, such as annotations/training/ADE_0"
    ):
        ADE20K(str(ade20k), "training", 32, seed=0)


def test_ade20k_and_swin_train_by_the_same_script(train, ade20k, tmp_path):
    swin = "{embed_dim: 8, depths: [1, 1, 1], num_heads: [1, 2, 4], window_size: 4}"
    code, output = train(
        *("--config", FOLDER / "ade20k.yaml", *TINY, "--encoder", "swin_tiny_patch4_window7_224"),
        *("--encoder_options", swin, "--data_path", ade20k, "--init_from", "null"),
        *("--precision", "fp32", "--num_workers", "0"),
        *("--output_dir", tmp_path / "run"),
    )
    assert code == 0, output
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["held_out_images"] == 3
    assert len(found["iou"]) == 150
    measured = {name: iou for name, iou in found["iou"].items() if iou is not None}
    assert {"class 1", "class 150"} <= set(measured), "the first label and the last are in the masks"
    assert all(0 <= iou <= 1 for iou in measured.values())
    assert found["miou"] == pytest.approx(sum(measured.values()) / len(measured), abs=2e-4)


@pytest.mark.parametrize("encoder", ["iwin_tiny_patch4_window7_224", "swin_tiny_patch4_window7_224"])
def test_a_classifier_of_smaller_images_is_what_the_encoder_begins_with(encoder, tmp_path):
    from train import Recipe
    from upernet import build_model, classifier_name, parameter_groups

    options = yaml.safe_load(OPTIONS)
    classifier = timm.create_model(encoder, img_size=64, num_classes=7, **options)
    save_file(classifier.state_dict(), tmp_path / "classifier.safetensors")
    recipe = Recipe(
        encoder=encoder,
        encoder_options=options,
        image_size=128,
        decoder_channels=8,
        init_from=str(tmp_path / "classifier.safetensors"),
    )
    model = build_model(recipe, 5)
    begun, before = model.encoder.model.state_dict(), classifier.state_dict()
    shared = [name for name in begun if classifier_name(name) in before]
    assert len(shared) > 30
    assert all(torch.equal(begun[name], before[classifier_name(name)]) for name in shared)
    assert all(".convolution." in name for name in set(begun) - set(shared)), "their window was the grid"
    if encoder.startswith("iwin"):
        groups = parameter_groups(model, 0.01, layer_decay=0.5)
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
        (stem,) = [
            g
            for g in groups
            if any(p is model.encoder.model.model.patch_embed.proj.weight for p in g["params"])
        ]
        assert stem["lr_scale"] == min(group["lr_scale"] for group in groups) < 0.2
        assert max(group["lr_scale"] for group in groups) == 1
    assert [tuple(found.shape) for found in model.train()(torch.randn(2, 3, 40, 72))] == [(2, 5, 40, 72)] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--encoder", "iwin_huge"), "encoder iwin_huge is not one of timm's; such as iwin_"),
        (("--encoder_options", "{pretrained_cfg: {file: x}}"), "has pretrained_cfg, which makes timm load"),
        (("--encoder_options", "{embed: 3}"), "do not make a iwin_tiny"),
        (("--init_from", "nowhere"), "init_from nowhere is neither"),
        (("--max_steps", "0"), "max_steps is 0, expected above 0"),
        (("--data", "ade20k"), "ade20k is read from a folder"),
        (("--data", "ade20k", "--data_path", "nowhere"), "nowhere has no images/training"),
        (("--learning_rat", "1"), "did you mean --learning_rate?"),
    ],
)
def test_mistakes_are_one_line(train, tmp_path, arguments, message):
    code, output = train(*TINY, "--output_dir", tmp_path / "run", *arguments)
    assert code == 2
    assert message in output
    assert "Traceback" not in output
    assert output.count("error: ") == 1
