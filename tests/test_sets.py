"""Sets that metrics compare, and their features on disk: what is looked at, kept, and computed again."""

import tracemalloc

import numpy as np
import pytest
import torch
from evaluation_stub import COUNT, Stub, make_sets, one_of
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from iwin_dit.evaluation import archives, evaluate, every_sample
from iwin_dit.evaluation import images as image_sets
from iwin_dit.evaluation.archives import NpzImages
from iwin_dit.evaluation.drawing import label_plan, open_export
from iwin_dit.evaluation.evaluate import chunk_path, extract_features, read_features
from iwin_dit.evaluation.images import FolderImages, Reading
from iwin_dit.evaluation.metrics import Features, compute
from iwin_dit.evaluation.statistics import read_statistics, write_statistics
from iwin_dit.runtime import limits
from iwin_dit.runtime.errors import ConfigError, DataError
from iwin_dit.runtime.progress import progress


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return make_sets(tmp_path_factory.mktemp("sets"))


def test_bars_are_full_at_the_end(sets, tmp_path, monkeypatch):
    """Of files, features, features that are there already, and distances, as long as the sets are."""
    bars = []

    def kept(*arguments, **options):
        bars.append(progress(*arguments, **options))
        return bars[-1]

    for module in (archives, evaluate, every_sample, image_sets):
        monkeypatch.setattr(module, "progress", kept)
    monkeypatch.setattr(every_sample, "BLOCK", 5)
    images = FolderImages(sets / "real")
    np.savez(tmp_path / "real.npz", images.read(0, COUNT).movedim(1, -1).numpy())
    assert images.fingerprint != NpzImages(tmp_path / "real.npz").fingerprint
    for _ in range(2):
        extract_features(images, Stub(), tmp_path / "features", 5, one_of())
    compute(["pr"], *[read_features(tmp_path / "features", COUNT, ["pr"]) for _ in range(2)])
    found = [bar.n for bar in bars]
    assert found[:4] == [COUNT, COUNT * 16 * 16 * 3 + 128, COUNT, COUNT]
    assert found == pytest.approx([bar.total for bar in bars], rel=0.02)  # the header is not counted on


def test_features_that_are_not_as_written_are_computed_again(sets, tmp_path):
    """One number is another: the layers, shapes and the hash in the file are not."""
    images, folder = FolderImages(sets / "real"), tmp_path / "features"

    def features():
        extract_features(images, Stub(), folder, COUNT, one_of())
        return load_file(chunk_path(folder, 0))

    written = features()
    with safe_open(chunk_path(folder, 0), "pt") as file:
        metadata = file.metadata()
    changed = {layer: tensor.clone() for layer, tensor in written.items()}
    changed["pool"][3, 2] += 1
    save_file(changed, chunk_path(folder, 0), metadata)
    again = features()
    assert all(torch.equal(again[layer], written[layer]) for layer in Stub.layers)


def test_images_of_two_sizes_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    for name, size in (("a", (5, 4)), ("b", (4, 5))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    monkeypatch.setattr(image_sets, "decode_image", None)
    with pytest.raises(DataError, match=r"b\.png has 4 x 5 pixels, .*a\.png has 5 x 4"):
        FolderImages(tmp_path).fingerprint  # noqa: B018
    cropped = [FolderImages(tmp_path, Reading(size=size)).fingerprint for size in ((4, 4), (3, 4))]
    assert cropped[0] != cropped[1]


def test_nothing_to_draw_is_an_error():
    assert label_plan("equal", 3, 2, 0) == [0, 1, 0]
    assert label_plan("uniform", 1, 1, 0) == [0]
    for images, classes in ((0, 1), (1, 0)):
        with pytest.raises(ConfigError, match="nothing to draw"):
            label_plan("equal", images, classes, 0)


@pytest.mark.parametrize("name", ["new/folder/images", "new/folder/images.npz"])
def test_images_are_saved_where_no_folder_is_yet(sets, tmp_path, name):
    images = FolderImages(sets / "real")
    export = open_export(tmp_path / name, images, tmp_path / "work/parts")
    pixels = images.read(0, COUNT)
    export.write(0, pixels)
    export.finish()
    saved = NpzImages(tmp_path / name) if name.endswith(".npz") else FolderImages(tmp_path / name)
    assert torch.equal(saved.read(0, COUNT), pixels)


def test_a_file_of_images_is_not_held_in_memory(tmp_path):
    np.savez(tmp_path / "large.npz", np.zeros((432, 256, 256, 3), np.uint8))  # 81 MiB
    images = NpzImages(tmp_path / "large.npz")
    tracemalloc.start()
    try:
        images.fingerprint  # noqa: B018
        assert tracemalloc.get_traced_memory()[1] < 48 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["images", "images.npz"])
def test_images_are_not_saved_where_others_are(sets, tmp_path, name):
    real, other = (FolderImages(sets / folder) for folder in ("real", "other"))
    export = open_export(tmp_path / name, real, tmp_path / "parts")
    export.write(0, real.read(0, COUNT))
    export.finish()
    assert open_export(tmp_path / name, real, tmp_path / "parts").has(0, COUNT)
    with pytest.raises(ConfigError, match="is there already and not of this evaluation"):
        open_export(tmp_path / name, other, tmp_path / "parts")
    (tmp_path / "new.npz.recipe.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"new\.npz is there already"):
        open_export(tmp_path / "new.npz", real, tmp_path / "parts")
    (tmp_path / "empty").mkdir()
    assert not open_export(tmp_path / "empty", real, tmp_path / "parts").has(0, 1)


def test_statistics_of_the_largest_size_are_read(sets, tmp_path, monkeypatch):
    path, extractor = tmp_path / "statistics.safetensors", Stub()
    features = Features(["fid"])
    features.add(extractor(FolderImages(sets / "real").read(0, COUNT)))
    write_statistics(path, features, extractor, {})
    size = path.stat().st_size  # three layers may be in a file
    monkeypatch.setattr(limits, "ARRAY_BYTES", size / 3)
    read = read_statistics(path, ["fid"], extractor).moments["pool"]
    assert np.array_equal(read.mean, features.moments["pool"].mean)
    monkeypatch.setattr(limits, "ARRAY_BYTES", (size - 1) / 3)
    with pytest.raises(DataError, match="it has more than"):
        read_statistics(path, ["fid"], extractor)
