"""Images with labels: mixing, the loss, and examples as functions of the position."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy

from iwin_dit.data.labelled import LabelledExamples, LabelledImages
from iwin_dit.data.sources import open_source
from iwin_dit.training.classification import class_scores, classification_loss, mix, mix_weights

CLASSES = 5


def test_mixup_and_its_targets_are_timms():
    images, labels = torch.rand(4, 3, 6, 5), torch.tensor([0, 1, 2, 2])
    mixing = torch.tensor([[0.3, 0, 0, 0], [0.3, 0, 0, 0], [0.9, 0, 0, 0], [0.9, 0, 0, 0]])
    mixed, targets = mix(images, labels, mixing, CLASSES)
    for pair, share in ((slice(0, 2), 0.3), (slice(2, 4), 0.9)):
        expected = images[pair] * share + images[pair].flip(0) * (1 - share)
        torch.testing.assert_close(mixed[pair], expected)
        theirs = mixup_target(labels[pair], CLASSES, share, smoothing=0.0)
        torch.testing.assert_close(targets[pair], theirs)


@pytest.mark.parametrize("center", [(0.5, 0.5), (0.0, 0.99), (0.2, 0.7)])
def test_cutmix_pastes_a_rectangle_and_weighs_targets_by_its_area(center):
    height, width, share = 12, 9, 0.4
    mixing = torch.tensor([[share, 1.0, *center]] * 2)
    images, labels = torch.rand(2, 3, height, width), torch.tensor([1, 3])
    mixed, targets = mix(images, labels, mixing, CLASSES)
    reach = [int((1 - share) ** 0.5 * side) // 2 for side in (height, width)]
    middle = [int(c * side) for c, side in zip(center, (height, width), strict=True)]
    expected, pasted = images[0].clone(), 0
    for y in range(height):
        for x in range(width):
            near = [m - r <= at < m + r for m, r, at in zip(middle, reach, (y, x), strict=True)]
            if all(near):
                expected[:, y, x] = images[1][:, y, x]
                pasted += 1
    torch.testing.assert_close(mixed[0], expected)
    own = 1 - pasted / (height * width)
    torch.testing.assert_close(targets[0], torch.tensor([0, own, 0, 1 - own, 0]))
    assert 0 < pasted < height * width


def test_a_whole_image_may_be_pasted_and_none():
    whole, none = mix_weights(torch.tensor([[0.0, 1, 0.5, 0.5], [1.0, 1, 0.5, 0.5]]), (8, 8))
    assert not whole.any()
    assert none.all()


def test_the_loss_is_pytorchs_and_timms():
    logits, labels = torch.randn(4, CLASSES), torch.tensor([0, 4, 2, 2])
    options = dict(num_classes=CLASSES, label_smoothing=0.1)
    images, mixing = torch.rand(4, 3, 4, 4), torch.tensor([[0.3, 0.0, 0.0, 0.0]] * 4)
    found = classification_loss(lambda x: logits, images, labels, mixing, mixes=False, **options)
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(found, expected)
    found = classification_loss(lambda x: logits, images, labels, mixing, mixes=True, **options)
    order = [1, 0, 3, 2]
    targets = 0.3 * F.one_hot(labels, CLASSES) + 0.7 * F.one_hot(labels[order], CLASSES)
    targets = 0.9 * targets + 0.1 / CLASSES
    torch.testing.assert_close(found.mean(), SoftTargetCrossEntropy()(logits, targets))


@pytest.fixture
def examples(tmp_path):
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for i in range(3):
            pixels = np.random.default_rng(i).integers(0, 256, (40, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / label / f"{i}.png")
    varied = create_transform(
        16, is_training=True, auto_augment="rand-m9-mstd0.5-inc1-mmax9", re_prob=0.5, re_mode="pixel"
    )
    images = LabelledImages(open_source(str(tmp_path)), varied)
    return LabelledExamples(images, seed=3, mixup=0.8, cutmix=1.0)


def test_examples_are_functions_of_their_positions(examples):
    """Whatever was drawn before, and leaving the global generators as they were."""
    first = [examples[position] for position in range(8)]
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    again = {position: examples[position] for position in (7, 2, 5, 0)}
    for position, example in again.items():
        assert torch.equal(example.image, first[position].image)
        assert example.label == first[position].label
        assert torch.equal(example.mixing, first[position].mixing)
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    drawn = random.random(), np.random.random(), float(torch.rand(()))
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    examples[4]
    assert drawn == (random.random(), np.random.random(), float(torch.rand(())))
    random.setstate(before[0])


@pytest.mark.parametrize(("mixup", "cutmix", "cuts"), [(0.0, 1.0, 1), (0.8, 0.0, 0), (0.0, 0.0, 0)])
def test_one_kind_of_mixing_alone_and_none(examples, mixup, cutmix, cuts):
    few = LabelledExamples(examples.data, seed=3, mixup=mixup, cutmix=cutmix)
    mixings = torch.stack([few._mixing(pair) for pair in range(200)])
    assert (mixings[:, 1] == cuts).all()
    share, centre = mixings[:, 0], mixings[:, 2:]
    if mixup == cutmix == 0:
        assert (share == 1).all()
    else:
        alpha = max(mixup, cutmix)
        assert share.mean() == pytest.approx(0.5, abs=0.07)
        assert share.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.25), "Beta(alpha, alpha)"
    assert centre.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.07)
    assert 0 <= centre.min() < 0.05 < 0.95 < centre.max() < 1


def test_pairs_share_their_mixing_and_a_pass_sees_each_image_once(examples):
    seen = [examples[position] for position in range(6)]
    assert sorted(example.label for example in seen) == [0, 0, 0, 1, 1, 1]
    for k in range(0, 6, 2):
        assert torch.equal(seen[k].mixing, seen[k + 1].mixing)
    assert not torch.equal(examples[0].image, examples[6].image), "the next pass is varied anew"
    mixings = torch.stack([examples._mixing(pair) for pair in range(400)])
    assert 150 < mixings[:, 1].sum() < 250, "half of the pairs are cut"
    cut, mixed = (mixings[mixings[:, 1] == kind, 0] for kind in (1, 0))
    assert cut.var() == pytest.approx(1 / 12, rel=0.25), "Beta(1, 1)"
    assert mixed.var() == pytest.approx(0.8 * 0.8 / (1.6**2 * 2.6), rel=0.25), "Beta(0.8, 0.8)"


def test_scores_of_videos_are_means_over_views():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 2 * 4 * 4, 5))
    views = torch.randn(3, 4, 3, 2, 4, 4)
    with torch.no_grad():
        found = class_scores(model, views)
        expected = torch.stack([model(video).softmax(-1).mean(0) for video in views])
    torch.testing.assert_close(found, expected)


def test_frames_are_mixed_as_one_image():
    clips, labels = torch.rand(4, 3, 5, 6, 7), torch.tensor([0, 1, 2, 2])
    mixing = torch.tensor([[0.3, 0, 0, 0]] * 2 + [[0.4, 1, 0.5, 0.2]] * 2)
    assert 0 < mix_weights(mixing, (6, 7))[2].mean() < 1
    mixed, targets = mix(clips, labels, mixing, 3)
    for k in range(5):
        image, expected = mix(clips[:, :, k], labels, mixing, 3)
        assert torch.equal(mixed[:, :, k], image)
        assert torch.equal(targets, expected)


def test_scores_of_images_are_their_logits():
    model, images = torch.nn.Flatten(), torch.randn(2, 3, 4, 4)
    assert torch.equal(class_scores(model, images), images.flatten(1))
