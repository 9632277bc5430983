"""Sets of latents that are damaged, made up or on bad storage: one line says so, and none is trained on."""

import errno
import json
import os
import resource
import shutil
import struct

import numpy as np
import pytest
import torch
from conftest import NUM_IMAGES
from safetensors.torch import load_file, save_file

from iwin_dit.data import inspection, shards
from iwin_dit.data.examples import TrainingExamples
from iwin_dit.data.latents import LatentDataset, Shard, published_index, write_latents
from iwin_dit.runtime import files
from iwin_dit.runtime.errors import DataError, StorageError

FIRST, SECOND = (f"latents_rank00_shard00{i}.safetensors" for i in range(2))
DESCRIPTION = {"vae": "vae", "image_size": [4, 4], "class_names": ["a", "b", "c"]}


@pytest.fixture
def folder(latents_folder, tmp_path):
    return shutil.copytree(latents_folder, tmp_path / "latents")


def shard(count=6, shape=(4, 2, 2), seed=0):
    rng = torch.Generator().manual_seed(seed)
    latents, mirrored = torch.randn(2, count, *shape, generator=rng)
    return Shard(latents, mirrored, torch.arange(count) % 3)


def edit_index(folder, **changes):
    index = json.loads((folder / "index.json").read_text()) | changes
    (folder / "index.json").write_text(json.dumps(index))


def edit_shard(folder, name, **changes):
    """With another content; the index says the new size and hash, as who edits both would."""
    tensors = load_file(folder / name) | changes
    tensors.pop("crc32", None)
    save_file(tensors, folder / name)
    index = json.loads((folder / "index.json").read_text())
    for entry in index["shards"]:
        if entry["file"] == name:
            entry |= files.fingerprint(folder / name)
    edit_index(folder, **index)


# A constant channel


def test_a_constant_channel_is_refused_when_a_set_is_made_opened_and_verified(folder, tmp_path):
    constant = shard(8)
    constant.latents[:, 1] = 0.1
    with pytest.raises(DataError, match=r"made: channel 1 of the latents is constant \(mean 0\.1"):
        write_latents(tmp_path / "made", [constant], DESCRIPTION)
    assert not (tmp_path / "made" / "index.json").exists()
    std = LatentDataset(folder).std
    edit_index(folder, std=[*std[:2], 0.0, std[3]])
    with pytest.raises(DataError, match=r"index\.json: channel 2 of the latents is constant \(.*std 0\)"):
        LatentDataset(folder)
    edit_index(folder, std=std)

    latents = load_file(folder / SECOND)["latents"]
    latents[:, 3] = 0.25
    edit_shard(folder, SECOND, latents=latents)
    with pytest.raises(DataError, match=rf"{SECOND}: all values of channel 3 are 0\.25"):
        inspection.verify(folder)


def test_published_statistics_of_a_constant_channel_are_refused(folder):
    (folder / "index.json").unlink()
    index = published_index(folder, [0.0] * 4, [1.0, 0, 1, 1], "vae", 3)
    with pytest.raises(DataError, match="channel 1 of the latents is constant"):
        LatentDataset(folder, index)
    with pytest.raises(DataError, match=r"std is \[1\.0, nan, .*expected a finite number for each channel"):
        LatentDataset(folder, published_index(folder, [0.0] * 4, [1.0, float("nan"), 1, 1], "vae", 3))


def test_statistics_that_are_not_those_of_the_latents_are_found(folder):
    std = LatentDataset(folder).std
    inspection.verify(folder)
    edit_index(folder, std=[std[0] * 1.01, *std[1:]])
    with pytest.raises(DataError, match=r"index\.json: std of channel 0 is .*, that of the latents"):
        inspection.verify(folder)


# Labels


@pytest.mark.parametrize(
    "labels", [torch.zeros(39, dtype=torch.int64), torch.zeros(40, 1).long(), torch.zeros(40)]
)
def test_labels_are_as_many_as_images(folder, labels):
    """With one too few, each image of the next shard had its neighbour's label."""
    edit_shard(folder, FIRST, labels=labels)
    with pytest.raises(
        DataError, match=rf"{FIRST} has 40 images and labels of shape .*; expected an integer"
    ):
        LatentDataset(folder)


def test_a_shard_is_not_written_with_too_few_labels(tmp_path):
    whole = shard()
    with pytest.raises(ValueError, match="rows"):
        write_latents(tmp_path, [whole._replace(labels=whole.labels[:-1])], DESCRIPTION)


# Damage


def flip(path, name, row):
    """One bit of a latent's exponent, as a disk or memory might: the value becomes huge, not NaN."""
    entry = shards.ShardFile(path).entries[name]
    content = bytearray(path.read_bytes())
    place = entry.start + row * entry.row_bytes + 4 * 7 + 3
    content[place] ^= 0x40
    status = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_flipped_bit_is_not_trained_on(folder):
    dataset = LatentDataset(folder)
    assert dataset.has_checksums
    flip(folder / SECOND, "latents_flip", 5)
    dataset.read([45])  # not the mirrored one
    dataset.read([44, 46], mirrored=True)
    found = rf"row 5 of latents_flip in .*{SECOND} is not what was written \(CRC-32\).*--verify"
    with pytest.raises(DataError, match=found):
        dataset.read([3, 45, 7], mirrored=True)
    with pytest.raises(DataError, match=found):
        TrainingExamples(dataset, 0, True, 0.1, 3).__getitems__(list(range(4 * NUM_IMAGES)))
    with pytest.raises(DataError, match=f"1 shards .*{SECOND}"):
        inspection.verify(folder)


def test_checksums_are_those_of_the_bytes_on_disk(tmp_path):
    import zlib

    whole = shard(5)._replace(std=torch.rand(5, 4, 2, 2), std_flip=torch.rand(5, 4, 2, 2))
    write_latents(tmp_path, [Shard(*(t if t.ndim == 1 else t.bfloat16() for t in whole))], DESCRIPTION)
    tensors = load_file(tmp_path / FIRST)
    for column, name in enumerate(("latents", "latents_flip", "std", "std_flip")):
        rows = tensors[name].view(torch.int16).numpy()
        assert tensors["crc32"][:, column].tolist() == [zlib.crc32(row.tobytes()) for row in rows]
    dataset = LatentDataset(tmp_path)
    assert dataset.has_checksums
    assert dataset.has_posterior
    draws = dataset.draw([0, 4], [True, False], [torch.Generator(), torch.Generator()])
    assert torch.isfinite(draws[0]).all()


def test_without_checksums_what_is_not_finite_is_found(folder):
    latents = load_file(folder / FIRST)["latents"]
    latents[17, 2, 0, 0] = torch.inf
    edit_shard(folder, FIRST, latents=latents)
    dataset = LatentDataset(folder)
    assert not dataset.has_checksums
    dataset.read([16, 18])
    with pytest.raises(DataError, match=rf"row 17 of latents in .*{FIRST} is not finite"):
        dataset.read([16, 17])


def test_a_shard_that_was_replaced_is_not_read_for_the_old_one(folder):
    dataset = LatentDataset(folder)
    content = (folder / FIRST).read_bytes()
    files.replace(folder / FIRST, content)
    os.utime(folder / FIRST, ns=(0, 0))
    with pytest.raises(DataError, match=f"{FIRST} was cut short or replaced since it was opened"):
        dataset.read([0])
    assert torch.isfinite(LatentDataset(folder).read([0])).all()


# Many shards


@pytest.fixture
def open_files(monkeypatch):
    """``open_files(most)`` bounds the descriptors of this process anew."""

    def bound(most):
        monkeypatch.setattr(shards, "OPEN", shards.OpenFiles(most))

    return bound


def descriptors(folder):
    names = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return sum(os.readlink(name).startswith(str(folder)) for name in names if os.path.lexists(name))


def test_any_number_of_shards_is_read_with_few_open_files(tmp_path, open_files):
    made = [shard(4, seed=i) for i in range(9)]
    write_latents(tmp_path, made, DESCRIPTION)
    open_files(3)
    dataset = LatentDataset(tmp_path)
    expected = torch.cat([s.latents for s in made])
    order = np.random.default_rng(0).permutation(36)
    for indices in (order, order[::-1].copy(), order[:5]):
        assert torch.equal(dataset.read_raw(indices), expected[indices])
        assert descriptors(tmp_path) == 3


def test_the_bound_leaves_half_of_the_files_to_others(tmp_path, open_files, monkeypatch):
    write_latents(tmp_path, [shard(2, seed=i) for i in range(40)], DESCRIPTION)
    dataset = LatentDataset(tmp_path)
    open_files(None)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (64, 64))  # it may come down at any time
    dataset.read(list(range(80)))
    assert descriptors(tmp_path) == 32


# Storage


@pytest.fixture
def failing(monkeypatch, open_files):
    """``failing(number, times)``: reading rows fails so often with this error."""
    monkeypatch.setattr(files, "PAUSES", (0, 0, 0))
    open_files(8)
    real = os.preadv

    def fail(number, times):
        left = [times]

        def preadv(*arguments):
            if left[0]:
                left[0] -= 1
                raise OSError(number, os.strerror(number))
            return real(*arguments)

        monkeypatch.setattr(os, "preadv", preadv)

    return fail


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_reading_is_tried_again(folder, failing, number):
    dataset = LatentDataset(folder)
    failing(number, 0)
    expected = dataset.read([1, 50])
    failing(number, 4)
    assert torch.equal(dataset.read([1, 50]), expected)
    failing(number, 5)
    with pytest.raises(StorageError, match=rf"{FIRST} cannot be read: {os.strerror(number)}"):
        dataset.read([1, 50])


def test_a_set_on_bad_storage_is_said_when_it_is_opened(folder, failing, monkeypatch):
    def broken(path):
        raise OSError(errno.EIO, "Input/output error")

    failing(errno.EIO, 0)
    monkeypatch.setattr(shards, "_read_header", broken)
    with pytest.raises(StorageError, match=rf"{FIRST} cannot be read: Input/output error"):
        LatentDataset(folder)


def test_a_pointer_is_called_one(folder):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize 1234\n" % 0
    (folder / FIRST).write_bytes(pointer)
    edit_index(folder, shards=[{"file": FIRST, "count": 40}, {"file": SECOND, "count": 20}])
    with pytest.raises(DataError, match=rf"{FIRST} .* pointer of Git LFS.*git lfs pull"):
        LatentDataset(folder)


# Malformed indexes and headers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": [1]}, "it has format"),
        ({"vae": "a\0b"}, "vae is"),
        ({"vae": 7}, "vae is 7, expected the name"),
        ({"class_names": []}, "class_names is"),
        ({"class_names": ["a", "\ud800"]}, "class_names is"),
        ({"class_names": "abc"}, "class_names is"),
        ({"latent_shape": [4, 8]}, "latent_shape is"),
        ({"latent_shape": [4, 8, True]}, "latent_shape is"),
        ({"latent_shape": [1 << 16] * 3}, "latent_shape is"),
        ({"mean": [0, 0, 0]}, "mean has 3 numbers, the latents 4 channels"),
        ({"mean": [0, 0, 0, 1e300]}, "mean is"),
        ({"std": [1, 1, 1, float("nan")]}, "std is"),
        ({"std": [1, 1, 1, -1]}, "std is"),
        ({"shards": []}, "shards is"),
        ({"shards": [{"file": FIRST, "count": 40}] * 2}, f"names the shard {FIRST} twice"),
        ({"shards": [{"file": FIRST, "count": 10**40}]}, "which is no shard"),
        ({"shards": [{"file": "../" + FIRST, "count": 40}]}, "which is no shard"),
        ({"shards": [{"count": 40}]}, "which is no shard"),
        ({"num_images": 61}, "num_images is 61, its shards have 60 together"),
        ({"image_size": "big"}, "image_size is"),
    ],
)
def test_an_index_that_cannot_be_is_one_line(folder, changes, message):
    edit_index(folder, **changes)
    with pytest.raises(DataError, match=message) as caught:
        LatentDataset(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b"7",
        b"null",
        b"\xff",
        b'{"format": 1}',
        b" " * (17 << 20),
        b'{"format": 1' + b"0" * 5000,
    ],
)
def test_a_file_that_is_no_index_is_one_line(folder, text):
    (folder / "index.json").write_bytes(text)
    with pytest.raises(DataError, match="is not an index of latents"):
        LatentDataset(folder)


GOOD = {"dtype": "F32", "shape": [1, 4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b"[1]",
        b"{}",
        b'{"__metadata__": {}}',
        b'{"latents": 1}',
        *(
            json.dumps({"latents": GOOD | change}).encode()
            for change in (
                {"dtype": "F8"},
                {"dtype": ["F32"]},
                {"shape": []},
                {"shape": [-1, -4]},
                {"shape": [2**32, 2**32]},
                {"shape": [True, 4]},
                {"shape": 4},
                {"data_offsets": [16, 0]},
                {"data_offsets": [0, 16, 32]},
                {"data_offsets": [0, 10**30]},
                {"data_offsets": [-16, 0]},
            )
        ),
    ],
)
def test_a_header_that_cannot_be_is_one_line(folder, header):
    (folder / FIRST).write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(DataError, match=f"{FIRST} is not a safetensors file"):
        shards.ShardFile(folder / FIRST)
