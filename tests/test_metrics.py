"""Metrics of image sets: against torch-fidelity's own command, an independent computation, and themselves."""

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image

from iwin_dit.evaluation.extractors import Inception
from iwin_dit.evaluation.images import FolderImages, NpzImages, SampledImages, label_plan, open_images
from iwin_dit.evaluation.metrics import METRICS, Features, compute
from iwin_dit.runtime.errors import CheckpointError, DataError

COUNT, SIDE = 16, 32


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of noise of different means, the second in subfolders."""
    root = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    for name, low, high in (("a", 0, 200), ("b", 60, 256)):
        for i in range(COUNT):
            path = root / name / (f"{i % 3}" if name == "b" else "") / f"{i:02d} é.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(low, high, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)
    return root / "a", root / "b"


def features(images, extractor, metrics=tuple(METRICS), batch=7):
    found = Features(metrics)
    for start in range(0, len(images), batch):
        found.add(extractor(images.read(start, min(start + batch, len(images)))))
    return found


@pytest.fixture(scope="module")
def extracted(inception_weights, folders):
    extractor = Inception(inception_weights)
    return tuple(features(FolderImages(folder), extractor) for folder in folders)


def test_figures_are_those_of_torch_fidelity(inception_weights, folders, extracted):
    a, b = extracted
    found = compute(METRICS, a, b)
    expected = torch_fidelity.calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        cuda=False,
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=COUNT,
        samples_find_deep=True,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(inception_weights),
        batch_size=5,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    for ours, name in (
        ("fid", "frechet_inception_distance"),
        ("kid", "kernel_inception_distance_mean"),
        ("is", "inception_score_mean"),
        ("is_std", "inception_score_std"),
        ("precision", "precision"),
        ("recall", "recall"),
    ):
        assert found[ours] == pytest.approx(expected[name], rel=1e-6, abs=1e-7), ours


def test_frechet_distances_are_those_of_the_features(extracted, inception_weights, folders):
    """Fewer images than features; in float64, through the few eigenvalues of the product that are not 0."""
    extractor = Inception(inception_weights)
    for name, layer in (("fid", "pool"), ("sfid", "spatial")):
        a, b = (extractor(FolderImages(folder).read(0, COUNT))[layer].double().numpy() for folder in folders)
        mean_a, mean_b = a.mean(0), b.mean(0)
        a, b = ((x - x.mean(0)) / (COUNT - 1) ** 0.5 for x in (a, b))  # covariance: a.T @ a
        cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()  # roots of the eigenvalues of the product
        witness = ((mean_a - mean_b) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * cross
        assert compute([name], *extracted)[name] == pytest.approx(witness, rel=1e-6)


def test_figures_do_not_depend_on_the_batches(inception_weights, folders, extracted):
    extractor = Inception(inception_weights)
    expected = compute(METRICS, *extracted)
    for batch in (1,):
        found = compute(METRICS, features(FolderImages(folders[0]), extractor, batch=batch), extracted[1])
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_an_npz_is_the_folder_it_was_made_of(folders, tmp_path):
    folder = FolderImages(folders[1])
    images = folder.read(0, COUNT)
    for name, save in (("plain", np.savez), ("packed", np.savez_compressed)):
        path = tmp_path / f"{name}.npz"
        save(path, images.movedim(1, -1).numpy())
        found = open_images(str(path))
        assert len(found) == COUNT
        assert torch.equal(found.read(5, 9), images[5:9])
        assert torch.equal(found.read(12, COUNT), images[12:])
    assert NpzImages(tmp_path / "plain.npz").fingerprint != NpzImages(tmp_path / "packed.npz").fingerprint


def test_fingerprints_change_with_the_content(folders, tmp_path):
    before = FolderImages(folders[0]).fingerprint
    assert FolderImages(folders[0]).fingerprint == before
    path = sorted(folders[0].iterdir())[0]
    content = path.read_bytes()
    Image.new("RGB", (SIDE, SIDE)).save(path)
    changed = FolderImages(folders[0]).fingerprint
    path.write_bytes(content)
    assert changed != before == FolderImages(folders[0]).fingerprint


def test_sampled_images_do_not_depend_on_the_batches():
    def draw(labels, generators):
        noise = [torch.randint(256, (3, 4, 4), generator=g) for g in generators]
        return (torch.stack(noise) + torch.tensor(labels).view(-1, 1, 1, 1)).clamp(max=255).to(torch.uint8)

    labels = label_plan("equal", 10, 3, seed=0)
    assert labels == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    images = SampledImages(draw, labels, 0, {"steps": 5})
    whole = images.read(0, 10)
    assert torch.equal(torch.cat([images.read(i, i + 1) for i in range(10)]), whole)
    assert len({image.numpy().tobytes() for image in whole}) == 10
    assert images.fingerprint == SampledImages(draw, labels, 0, {"steps": 5}).fingerprint
    assert images.fingerprint != SampledImages(draw, labels, 0, {"steps": 6}).fingerprint
    assert images.fingerprint != SampledImages(draw, labels, 1, {"steps": 5}).fingerprint
    drawn = label_plan("uniform", 3000, 3, seed=0)
    assert np.bincount(drawn).min() > 900
    assert drawn == label_plan("uniform", 3000, 3, seed=0)


def test_bad_sets_are_refused(folders, tmp_path, extracted):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="there are no images in"):
        FolderImages(tmp_path / "empty")
    with pytest.raises(DataError, match="neither a folder of images nor"):
        open_images(str(tmp_path / "nothing"))
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    Image.new("RGB", (8, 8)).save(mixed / "a.png")
    Image.new("RGB", (9, 8)).save(mixed / "b.png")
    with pytest.raises(DataError, match=r"b\.png has 9 x 8 pixels, .*a\.png has 8 x 8"):
        FolderImages(mixed).read(0, 2)
    (mixed / "b.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"b\.png"):
        FolderImages(mixed).read(0, 2)
    for name, array, message in (
        ("floats", np.zeros((2, 4, 4, 3)), r"holds float64 of shape \(2, 4, 4, 3\)"),
        ("grey", np.zeros((2, 4, 4), np.uint8), "expected uint8"),
        ("objects", np.array([print, 1], dtype=object), "holds object"),
    ):
        np.savez(tmp_path / f"{name}.npz", array)
        with pytest.raises(DataError, match=message):
            NpzImages(tmp_path / f"{name}.npz")
    (tmp_path / "text.npz").write_text("no zip")
    with pytest.raises(DataError, match=r"is no \.npz"):
        NpzImages(tmp_path / "text.npz")
    one = Features(["fid"])
    one.add({"pool": torch.zeros(1, 4)})
    with pytest.raises(DataError, match="fid needs two images or more on each side, found 1 and 1"):
        compute(["fid"], one, one)


def test_weights_that_are_not_inceptions_are_refused(tmp_path, inception_weights):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "marker"), "w"))

    with pytest.raises(CheckpointError, match="is not there"):
        Inception(tmp_path / "nothing.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="does not hold Inception's weights"):
        Inception(tmp_path / "other.pth")
    torch.save(Hostile(), tmp_path / "hostile.pth")
    with pytest.raises(CheckpointError, match="does not hold Inception's weights"):
        Inception(tmp_path / "hostile.pth")
    assert not (tmp_path / "marker").exists()
    assert Inception(inception_weights).name.startswith("inception-"), "other weights have another name"
