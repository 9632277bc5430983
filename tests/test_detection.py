"""The detection example: what it draws, reads, counts and trains."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from PIL import Image
from pycocotools import mask as rle
from safetensors.torch import load_file, save_file

sys.path.append(str(ROOT / "examples" / "detection"))
import coco_instances
import drawn_instances
import mask_rcnn
from drawn_instances import DrawnInstances
from mask_rcnn_recipes import RECIPES

from iwin_dit.runtime.errors import ConfigError, DataError

spec = importlib.util.spec_from_file_location("detection_train", ROOT / "examples" / "detection" / "train.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

TINY = '{"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "window_size": 2}'
SMOKE = ["--images", "8", "--test-images", "2", "--model-options", TINY, "--sizes", "64"]


def test_images_are_functions_of_seed_and_index():
    first, again, shifted = (DrawnInstances(3, i, 4, 48) for i in (0, 0, 2))
    for one, two in ((first[3], again[3]), (first[2], shifted[0])):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1]["masks"], two[1]["masks"])
    assert not torch.equal(first[0][0], first[1][0])
    assert not torch.equal(first[0][0], DrawnInstances(4, 0, 1, 48)[0][0])


def test_boxes_are_the_bounding_boxes_of_masks():
    dataset = DrawnInstances(0, 0, 40, 64)
    seen = set()
    for image, target in (dataset[i] for i in range(len(dataset))):
        assert image.shape == (3, 64, 64)
        assert 0 <= image.min() <= image.max() <= 1
        assert target["masks"].sum(0).max() == 1  # no pixel belongs to two shapes
        for box, mask in zip(target["boxes"].numpy(), target["masks"].numpy(), strict=True):
            x, y, width, height = rle.toBbox(rle.encode(np.asfortranarray(mask)))
            assert box.tolist() == [x, y, x + width, y + height]
        seen |= set(target["labels"].tolist())
    assert seen == {1, 2, 3}


@pytest.mark.parametrize(
    ("kind", "area"), [("circle", np.pi), ("square", 2.0), ("triangle", 3 * np.sqrt(3) / 4)]
)
def test_shapes_have_the_area_of_their_formula(kind, area):
    for angle in (0.0, 0.3, 1.1):
        mask = drawn_instances.shape_mask(kind, 101, 50, 50, 40.0, angle)
        assert mask.sum().item() == pytest.approx(area * 40**2, rel=0.03)


def test_mirrored_boxes_are_those_of_mirrored_masks():
    image, target = DrawnInstances(0, 7, 1, 48)[0]
    mirrored, new = mask_rcnn.mirror(image, target)
    assert torch.equal(new["boxes"], drawn_instances.boxes_of(new["masks"].bool()))
    assert torch.equal(mirrored[..., 0], image[..., -1])


def found(boxes, scores, labels=None, size=100):
    """What a detector returns; a mask fills its box."""
    masks = torch.zeros(len(boxes), 1, size, size)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[0, y0:y1, x0:x1] = 1
    labels = torch.tensor(labels or [1] * len(boxes))
    boxes = torch.tensor(boxes, dtype=torch.float32)
    return dict(boxes=boxes, scores=torch.tensor(scores), labels=labels, masks=masks)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_average_precision_by_hand(kind):
    """Two objects, three finds: exact, wrong, and one of IoU 0.62.

    Up to IoU 0.60 precision is 1 up to recall 1/2, and 2/3 up to recall 1: of the 101 recalls 51 and 50.
    From 0.65 the last find is wrong too: precision 1 at 51 recalls, then 0.
    """
    masks = torch.zeros(2, 100, 100, dtype=torch.bool)
    masks[0, :10], masks[1, 50:60] = True, True
    objects = [drawn_instances.annotation(i + 1, 0, 1, mask) for i, mask in enumerate(masks)]
    truth = drawn_instances.index_truth(
        dict(
            info={},
            images=[dict(id=0, width=100, height=100)],
            annotations=objects,
            categories=[dict(id=1, name="bar")],
        )
    )
    finds = found([[0, 0, 100, 10], [0, 80, 100, 90], [0, 50, 62, 60]], [0.9, 0.8, 0.7])
    results = coco_instances.to_results(0, finds, {1: 1})
    figures = coco_instances.average_precision(truth, results, kind)
    loose, strict = (51 + 50 * 2 / 3) / 101, 51 / 101
    assert figures["AP50"] == pytest.approx(loose)
    assert figures["AP75"] == pytest.approx(strict)
    assert figures["AP"] == pytest.approx((3 * loose + 7 * strict) / 10)
    assert coco_instances.average_precision(truth, [], kind)["AP"] == 0


def test_the_truth_has_average_precision_one():
    dataset = DrawnInstances(0, 0, 5, 48)
    results = []
    for i in range(len(dataset)):
        target = dataset[i][1]
        one = dict(target, scores=torch.ones(len(target["labels"])), masks=target["masks"][:, None].float())
        results += coco_instances.to_results(i, one, dataset.category_ids)
    for kind in ("bbox", "segm"):
        assert coco_instances.average_precision(dataset.truth(), results, kind)["AP"] == pytest.approx(1)


@pytest.fixture
def coco(tmp_path):
    """COCO's layout by hand: a square by polygon, a crowd by run lengths, an object without a width, and an
    image without objects; category ids with a gap."""
    (tmp_path / "annotations").mkdir()
    images = [dict(id=139, file_name="a.jpg", width=64, height=48), dict(id=7, file_name="b.jpg", width=40,
              height=40)]  # fmt: skip
    square = dict(category_id=90, bbox=[10, 20, 16, 8], area=128, iscrowd=0)
    square["segmentation"] = [[10, 20, 26, 20, 26, 28, 10, 28]]
    crowd = dict(category_id=3, bbox=[0, 0, 2, 48], area=96, iscrowd=1)
    crowd["segmentation"] = dict(size=[48, 64], counts=[0, 96, 48 * 62])
    flat = dict(category_id=3, bbox=[5, 5, 0, 4], area=0, iscrowd=0, segmentation=[[5, 5, 5, 9, 5, 9]])
    annotations = [dict(one, id=i + 1, image_id=139) for i, one in enumerate((square, crowd, flat))]
    categories = [dict(id=90, name="toothbrush"), dict(id=3, name="car")]
    for split in ("train2017", "val2017"):
        (tmp_path / split).mkdir()
        for image in images:
            Image.new("RGB", (image["width"], image["height"]), (255, 0, 0)).save(
                tmp_path / split / image["file_name"]
            )
        data = dict(info={}, images=images, annotations=annotations, categories=categories)
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(data))
    return tmp_path


def test_coco_is_read_right(coco):
    train = coco_instances.CocoInstances(coco, "train2017", skip_empty=True)
    assert len(train) == 1
    assert train.class_names == ("car", "toothbrush")
    assert train.category_ids == {1: 3, 2: 90}
    image, target = train[0]
    assert image.shape == (3, 48, 64)
    assert image[0].mean() > 0.98
    assert target["image_id"].tolist() == [139]
    assert target["labels"].tolist() == [2]
    assert target["boxes"].tolist() == [[10, 20, 26, 28]]
    expected = torch.zeros(1, 48, 64, dtype=torch.uint8)
    expected[0, 20:28, 10:26] = 1
    assert torch.equal(target["masks"], expected)

    held_out = coco_instances.CocoInstances(coco, "val2017")
    assert sorted(held_out.ids) == [7, 139]
    empty = held_out[held_out.ids.index(7)][1]
    assert empty["boxes"].shape == (0, 4)
    assert empty["masks"].shape == (0, 40, 40)
    finds = found([[10, 20, 26, 28]], [0.9], [2], size=64)
    finds["masks"] = finds["masks"][:, :, :48]
    results = coco_instances.to_results(139, finds, held_out.category_ids)
    assert results[0]["category_id"] == 90
    assert coco_instances.average_precision(held_out.truth(), results, "segm")["AP50"] == pytest.approx(0.5)


def test_coco_that_is_missing_or_something_else_is_told(coco):
    with pytest.raises(DataError, match="test2017 is missing; COCO's layout is"):
        coco_instances.CocoInstances(coco, "test2017")
    (coco / "annotations" / "instances_val2017.json").write_text('{"images": [{}]}')
    with pytest.raises(DataError, match=r"instances_val2017.json is no file of COCO's instances"):
        coco_instances.CocoInstances(coco, "val2017")
    (coco / "train2017" / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"image 139 of .* cannot be read"):
        coco_instances.CocoInstances(coco, "train2017", skip_empty=True)[0]


def test_recipes_of_coco_are_1x_and_3x():
    one, three = RECIPES["coco_1x"], RECIPES["coco_3x"]
    assert (one.epochs, three.epochs) == (12, 36)
    for recipe in (one, three):
        assert (recipe.batch_images, recipe.learning_rate, recipe.weight_decay) == (16, 1e-4, 0.05)
        assert (recipe.sizes[0], recipe.sizes[-1], recipe.max_size) == (480, 800, 1333)
    rates = [one.rate(step, 120_000) for step in (0, 499, 999, 79_999, 80_000, 109_999, 110_000)]
    assert rates == pytest.approx([1e-3, 0.5, 1, 1, 0.1, 0.1, 0.01])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("iwin_tiny_patch4_window7_224", json.loads(TINY)),
        ("swin_tiny_patch4_window7_224", dict(json.loads(TINY), img_size=64)),  # channels last
        ("resnet18", {}),  # has a map of stride 2 as well
    ],
)
def test_pyramid_has_the_strides_of_its_anchors(name, options):
    backbone = mask_rcnn.PyramidBackbone(name, 8, **options)
    maps = backbone(torch.zeros(1, 3, 64, 64))
    sides = {"0": 16, "1": 8, "2": 4, "3": 2, "pool": 1}
    assert {key: tuple(x.shape) for key, x in maps.items()} == {
        key: (1, 8, side, side) for key, side in sides.items()
    }


def test_a_classifier_becomes_the_backbone(tmp_path):
    name, options = "iwin_tiny_patch4_window7_224", json.loads(TINY)
    classifier, file = timm.create_model(name, **options), str(tmp_path / "classifier.safetensors")
    save_file(classifier.state_dict(), file)
    body = mask_rcnn.PyramidBackbone(name, 8, file, feature_norm=True, **options).body.state_dict()
    ours = {key.removeprefix("model."): value for key, value in body.items()}
    theirs = classifier.state_dict()
    assert len(ours.keys() & theirs.keys()) > 50
    assert all(key.startswith("feature_norms.") for key in ours.keys() - theirs.keys())
    assert all(torch.equal(ours[key], theirs[key]) for key in ours.keys() & theirs.keys())

    save_file({"weight": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match=r"classifier.safetensors has no weights of iwin_tiny"):
        mask_rcnn.PyramidBackbone(name, 8, file, **options)


def test_training_writes_weights_that_evaluate_alike(tmp_path, capsys):
    script.main([*SMOKE, "--out", str(tmp_path / "one")])
    first = capsys.readouterr().out
    assert "| boxes |" in first
    weights = tmp_path / "one" / "model.safetensors"
    assert all(value.isfinite().all() for value in load_file(weights).values() if value.is_floating_point())
    with Image.open(tmp_path / "one" / "predictions.png") as picture:
        assert min(picture.size) > 300
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    assert report["recipe"]["sizes"] == [64]
    assert set(report["boxes"]) == {"AP50", "AP75", "AP"}

    again = [*SMOKE, "--weights", str(weights), "--epochs", "0", "--out", str(tmp_path / "two")]
    script.main(again)
    assert capsys.readouterr().out.splitlines()[:4] == first.splitlines()[:4]


def test_weights_that_are_not_finite_are_not_stored(tmp_path):
    """A step of a finite loss can leave them so."""
    from mask_rcnn_recipes import RECIPES
    from train import save

    from iwin_dit.runtime.errors import NonFiniteError

    model = torch.nn.Linear(2, 2)
    path = tmp_path / "model.safetensors"
    save(model, RECIPES["shapes"], ["a"], path)
    before = path.read_bytes()
    model.bias.data[1] = torch.inf
    with pytest.raises(NonFiniteError, match=r"1 weights are not finite, such as bias; .* was not replaced"):
        save(model, RECIPES["shapes"], ["a"], path)
    assert path.read_bytes() == before


def test_training_on_coco(coco, capsys):
    options = ["--coco", str(coco), "--model-options", TINY, "--sizes", "48", "64", "--max-size", "80"]
    options += ["--batch-images", "2", "--accumulate", "2"]
    script.main([*options, "--out", str(coco / "out")])
    assert "2 held-out images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "resnet81"], "--model resnet81 is not known to timm; did you mean resnet"),
        (["--model", "vit_tiny_patch16_224"], "has maps of strides .* the pyramid needs"),
        (["--model-options", '{"depth": [1]}'], "unexpected keyword argument 'depth'"),
        (
            ["--model-options", '{"checkpoint_path": "x"}'],
            "has checkpoint_path, which makes timm",
        ),
        (["--pretrained", __file__], "is no .safetensors file, and no other is read here"),
        (["--model-options", "[1]"], r"--model-options is \[1\], expected a JSON object"),
        (["--batch-images", "3", "--accumulate", "2"], "--batch-images is 3, expected a multiple of 2"),
        (["--recipe", "coco_1x"], "--recipe coco_1x needs --coco FOLDER"),
        (["--sizes", "16"], "--sizes has 16, expected at least 32"),
        (["--images", "0"], "--images is 0, expected at least 1"),
        (["--weights", "nothing.safetensors"], "nothing.safetensors is no file"),
        (["--colour", "red"], "unrecognized arguments: --colour red; see --help"),
    ],
)
def test_wrong_options_are_told(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        script.main([*options, "--out", str(tmp_path / "out")])
