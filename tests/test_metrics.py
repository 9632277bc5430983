"""Metrics of image sets: against torch-fidelity's own command, an independent computation, and themselves."""

import io
import json
import sys
import tarfile

import numpy as np
import pytest
import torch
from evaluation_stub import frechet_of_few
from PIL import Image
from torch_fidelity import fidelity

from iwin_dit.commands import measure
from iwin_dit.evaluation.archives import NpzImages
from iwin_dit.evaluation.drawing import SampledImages, label_plan
from iwin_dit.evaluation.extractors import Inception
from iwin_dit.evaluation.images import FolderImages, open_set
from iwin_dit.evaluation.metrics import Features, compute
from iwin_dit.evaluation.rules import holds_images
from iwin_dit.runtime.errors import CheckpointError, DataError

COUNT, SIDE = 12, 32


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of noise, the images of each brighter and brighter; the second, in subfolders, overlaps."""
    root = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    for name, low, high in (("a", 0, 160), ("b", 25, 180)):
        for i in range(COUNT):
            path = root / name / (f"{i % 3}" if name == "b" else "") / f"{i:02d} é.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = rng.integers(low + 4 * i, high + 4 * i, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(noise).save(path)
    return root / "a", root / "b"


def test_the_evaluation_reads_what_training_reads(folders, tmp_path):
    """Images in a tar file are those of the folder; a location that is neither is named."""
    paths = sorted(folders[0].rglob("*.png"))
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for i, path in enumerate(paths):
            tar.add(path, f"{i:02d}.png")
            label = tarfile.TarInfo(f"{i:02d}.cls")
            label.size = 1
            tar.addfile(label, io.BytesIO(b"01"[i % 2 :][:1]))
    packed, folder = open_set(str(tmp_path / "images.tar"), False), FolderImages(folders[0])
    assert len(packed) == len(folder)
    assert torch.equal(packed.read(2, 9), folder.read(2, 9))
    assert len(packed.fingerprint) == 64
    assert holds_images(str(tmp_path / "images.tar"))
    with pytest.raises(DataError, match=r"other.tar"):
        open_set(str(tmp_path / "other.tar"), False)


def test_figures_are_those_of_torch_fidelitys_command_and_of_numpy(
    inception_weights, folders, script_here, tmp_path, monkeypatch, capfd
):
    """Fewer images than features, so that the covariances are singular. The distance is that of numpy alone.

    The command takes VGG for precision and recall unless it is told otherwise; ADM and we take Inception.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as --gpu "" will set it
    monkeypatch.setattr(measure, "use_all_cores", lambda processes: None)
    seen = []

    class Recording(Inception):
        def forward(self, images):
            found = super().forward(images)
            seen.append(found["pool"])
            return found

    monkeypatch.setattr("iwin_dit.evaluation.extractors.Inception", Recording)
    code, output = script_here(
        *("evaluate_fid.py", "--generated", folders[0], "--reference", folders[1], "--batch-size", 7),
        *("--metrics", "fid,kid,is,pr", "--inception-weights", inception_weights),
        *("--out", tmp_path / "result.json"),
    )
    assert code == 0, output
    assert f"fid of {COUNT} images, fewer than the 2048 features" in output
    found = json.loads((tmp_path / "result.json").read_text())["figures"]

    command = ("fidelity", "--gpu", "", "--input1", folders[0], "--input2", folders[1], "--batch-size", 5)
    command += ("--isc", "--kid", "--prc", "--kid-subset-size", COUNT, "--samples-find-deep")
    command += ("--feature-extractor", "inception-v3-compat", "--feature-extractor-weights-path")
    command += (inception_weights, "--no-cache", "--json", "--silent")
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--save-cpu-ram"])
    capfd.readouterr()
    fidelity.main()
    expected = json.loads(capfd.readouterr().out)
    for ours, theirs in (
        ("kid", "kernel_inception_distance_mean"),
        ("kid_std", "kernel_inception_distance_std"),
        ("is", "inception_score_mean"),
        ("is_std", "inception_score_std"),
        ("precision", "precision"),
        ("recall", "recall"),
    ):
        assert found[ours] == pytest.approx(expected[theirs], rel=1e-5, abs=1e-7), ours

    assert 0 < found["recall"] < found["precision"] < 1, "swapped, they would differ"
    assert found["fid"] == pytest.approx(frechet_of_few(*torch.cat(seen).split(COUNT)), rel=1e-6)


def test_features_do_not_depend_on_the_batches(inception_weights, folders):
    """Nor then do figures: see test_evaluate.py."""
    extractor, images = Inception(inception_weights), FolderImages(folders[0]).read(0, 3)
    expected = extractor(images)
    for batch in (1, 2):
        found = [extractor(part) for part in images.split(batch)]
        for layer in extractor.layers:
            torch.testing.assert_close(
                torch.cat([f[layer] for f in found]), expected[layer], rtol=1e-5, atol=1e-6
            )


def test_an_npz_is_the_folder_it_was_made_of(folders, tmp_path):
    folder = FolderImages(folders[1])
    images = folder.read(0, COUNT)
    for name, save in (("plain", np.savez), ("packed", np.savez_compressed)):
        path = tmp_path / f"{name}.npz"
        save(path, images.movedim(1, -1).numpy())
        found = open_set(str(path), of_clips=False)
        assert len(found) == COUNT
        assert torch.equal(found.read(5, 9), images[5:9])
        assert torch.equal(found.read(9, COUNT), images[9:])
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


def test_bad_sets_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="there are no images in"):
        FolderImages(tmp_path / "empty")
    with pytest.raises(DataError, match="neither a folder of images, nor"):
        open_set(str(tmp_path / "nothing"), of_clips=False)
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
    with pytest.raises(DataError, match="fid needs 2 images or more on each side, found 1 and 1"):
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
