"""Latent shards, the order of training and the codec."""

import itertools
import json
import os
import pickle
import shutil
import warnings

import numpy as np
import pytest
import torch
from conftest import NUM_IMAGES, make_vae
from PIL import Image
from safetensors.torch import load_file

from iwin_dit.build.data import build_dataset
from iwin_dit.config.parse import load_config
from iwin_dit.data import codec, digits
from iwin_dit.data.examples import StepSampler, TrainingExamples
from iwin_dit.data.latents import LatentDataset, Shard, write_latents
from iwin_dit.runtime.errors import DataError


def shards_of(folder):
    return [load_file(path) for path in sorted(folder.glob("*.safetensors"))]


def test_latents_are_read_as_they_were_written(latents_folder):
    dataset = LatentDataset(latents_folder)
    raw = torch.cat([shard["latents"] for shard in shards_of(latents_folder)])
    mirrored = torch.cat([shard["latents_flip"] for shard in shards_of(latents_folder)])
    assert len(dataset) == NUM_IMAGES
    mean, std = raw.double().mean((0, 2, 3)), raw.double().std((0, 2, 3), correction=0)
    np.testing.assert_allclose(dataset.mean, mean, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(dataset.std, std, rtol=1e-9)
    for i in (0, 39, 40, 59):  # the ends of both shards
        latent, label = dataset[i]
        expected = (raw[i] - mean[:, None, None]) / std[:, None, None]
        torch.testing.assert_close(latent, expected.float())
        assert label == i % 3
        expected = (mirrored[i] - mean[:, None, None]) / std[:, None, None]
        torch.testing.assert_close(dataset.read([i], mirrored=True)[0], expected.float())


def test_workers_open_the_files_themselves(latents_folder):
    dataset = LatentDataset(latents_folder)
    before = dataset[7][0]
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[7][0], before)


def test_bad_latents_are_refused(latents_folder, tmp_path):
    with pytest.raises(DataError, match="there are no latents in"):
        LatentDataset(tmp_path)
    bad = tmp_path / "latents"
    shutil.copytree(latents_folder, bad)
    shard = bad / "latents_rank00_shard001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"shard001.* bytes, the index says"):
        LatentDataset(bad)
    (bad / "index.json").write_text("{}")
    with pytest.raises(DataError, match="not an index of latents"):
        LatentDataset(bad)
    nan = torch.full((1, 4, 2, 2), torch.nan)
    with pytest.raises(DataError, match="not finite"):
        write_latents(tmp_path / "nan", [Shard(nan, nan, torch.zeros(1))], {})
    assert not (tmp_path / "nan" / "index.json").exists()


def test_a_shard_that_shrinks_while_it_is_read_is_an_error(latents_folder, tmp_path):
    shutil.copytree(latents_folder, tmp_path / "latents")
    dataset = LatentDataset(tmp_path / "latents")
    dataset.read([0])
    shard = tmp_path / "latents" / "latents_rank00_shard000.safetensors"
    with open(shard, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(DataError, match=r"shard000.* was cut short"):
        dataset.read([0, 39, 59])


def test_shards_may_not_point_out_of_their_folder(latents_folder, tmp_path):
    shutil.copytree(latents_folder, tmp_path / "latents")
    index = json.loads((tmp_path / "latents" / "index.json").read_text())
    index["shards"][0]["file"] = "../latents/latents_rank00_shard000.safetensors"
    (tmp_path / "latents" / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="which is no shard"):
        LatentDataset(tmp_path / "latents")


def examples(folder, seed=0, dropout=0.25):
    return TrainingExamples(LatentDataset(folder), seed, True, dropout, null_label=3)


def test_examples_are_a_function_of_seed_and_position(latents_folder):
    one, two, other = examples(latents_folder), examples(latents_folder), examples(latents_folder, seed=1)
    for position in (5, 1000, 5, 61):
        a, b, c = one[position], two[position], other[position]
        assert torch.equal(a.x0, b.x0)
        assert torch.equal(a.noise, b.noise)
        assert (a.label, a.u) == (b.label, b.u)
        assert not torch.equal(a.noise, c.noise)
    assert not torch.equal(one[5].noise, one[6].noise)


def test_a_pass_sees_every_image_once_and_the_next_in_another_order(latents_folder):
    stream = examples(latents_folder, dropout=0.0)
    dataset = LatentDataset(latents_folder)
    known = {dataset.read([i], m)[0].numpy().tobytes(): i for i in range(NUM_IMAGES) for m in (False, True)}
    passes = [
        [known[stream[p].x0.numpy().tobytes()] for p in range(e * NUM_IMAGES, (e + 1) * NUM_IMAGES)]
        for e in (0, 1)
    ]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(NUM_IMAGES))
    assert passes[0] != passes[1]


def test_labels_are_dropped_and_images_mirrored_at_their_rates(latents_folder):
    stream = examples(latents_folder)
    dataset = LatentDataset(latents_folder)
    mirrored = {dataset.read([i], True)[0].numpy().tobytes() for i in range(NUM_IMAGES)}
    drawn = [stream[p] for p in range(2000)]
    assert np.mean([e.label == 3 for e in drawn]) == pytest.approx(0.25, abs=0.04)
    assert np.mean([e.x0.numpy().tobytes() in mirrored for e in drawn]) == pytest.approx(0.5, abs=0.04)
    u, noise = torch.stack([e.u for e in drawn]), torch.stack([e.noise for e in drawn])
    assert u.mean() == pytest.approx(0.5, abs=0.03)
    assert noise.mean() == pytest.approx(0, abs=0.01)
    assert noise.std() == pytest.approx(1, abs=0.01)


def test_a_seed_draws_what_it_drew_in_earlier_versions():
    """Else a run that is resumed, or repeated, would see other data."""

    class Ten:
        latent_shape, identity = (1, 1, 1), {}

        def __len__(self):
            return 10

        def draw(self, indices, mirrored, rngs):
            self.mirrored = "".join("RL"[flip] for flip in mirrored)
            return torch.zeros(len(indices), 1, 1, 1), [0] * len(indices)

    data = Ten()
    drawn = TrainingExamples(data, 0, True, 0.25, null_label=3).__getitems__(range(12))
    assert data.mirrored == "RRLRRLLLRLRL"
    assert drawn.label.tolist() == [0, 0, 0, 3, 0, 3, 0, 3, 3, 0, 0, 0]
    assert drawn.u[:4].tolist() == pytest.approx([0.1654, 0.7142, 0.8769, 0.0161], abs=1e-4)


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 6])
def test_every_split_of_a_step_holds_the_same_positions(processes, micro_batch):
    batch = 24
    for start in (0, 3):
        samplers = [
            StepSampler(start, batch, micro_batch, process, processes) for process in range(processes)
        ]
        per_step = batch // processes // micro_batch
        lists = [list(itertools.islice(sampler, (5 - start) * per_step)) for sampler in samplers]
        for step in range(start, 5):
            mine = slice((step - start) * per_step, (step - start + 1) * per_step)
            positions = [p for own in lists for micro in own[mine] for p in micro]
            assert sorted(positions) == list(range(step * batch, (step + 1) * batch))


def test_normalisation_round_trip():
    latents = torch.randn(2, 3, 4, 4)
    mean, std = [0.1, -2.0, 3.0], [1.0, 0.5, 7.0]
    normalized = codec.normalize(latents, mean, std)
    torch.testing.assert_close(normalized[:, 1], (latents[:, 1] + 2) / 0.5)
    torch.testing.assert_close(codec.denormalize(normalized, mean, std), latents)


def test_statistics_that_a_vae_declares():
    vae = make_vae()
    assert codec.vae_statistics(vae) == ([0.0] * 4, [1 / 0.18215] * 4)
    vae.register_to_config(latents_mean=[1.0] * 4, latents_std=[2.0] * 4)
    assert codec.vae_statistics(vae) == ([1.0] * 4, [2.0] * 4)


def test_the_digits_become_images_of_ten_classes(tmp_path):
    root = tmp_path / "new" / "digits"
    digits.write_images(root, seed=0)
    digits.write_images(root, seed=0)  # again: nothing is left to do
    images, labels, names = digits.read_images(root / "train")
    assert images.shape == (1500, 3, 32, 32)
    assert names == [str(d) for d in range(10)]
    assert len(list((root / "test").rglob("*.png"))) == 297
    from sklearn.datasets import load_digits

    scans = load_digits()
    path = next((root / "train" / "3").iterdir())
    scan = scans.images[int(path.stem)]
    assert scans.target[int(path.stem)] == 3
    shrunk = np.asarray(Image.open(path).resize((8, 8), Image.Resampling.BOX), dtype=float)
    assert np.corrcoef(shrunk.ravel(), scan.ravel())[0, 1] > 0.95
    assert set(labels.tolist()) == set(range(10))


def test_an_autoencoder_that_is_not_the_latents_own_is_told(latents_folder, recipe):
    own = str((latents_folder / "../vae").resolve())
    relative = os.path.relpath(own)
    for name, told in (("sd-vae-ft-ema", 1), ("../vae", 0), (own, 0), (relative, 0), (None, 0)):
        config = load_config(recipe(data={"path": str(latents_folder), "vae": name}))
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            assert build_dataset(config).vae_path == own
        lines = [str(warning.message) for warning in found if "data.vae" in str(warning.message)]
        assert lines == [f"data.vae {name} is not used: {latents_folder} was made by ../vae"] * told
