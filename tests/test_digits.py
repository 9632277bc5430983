"""The quickstarts' data: scans, their autoencoder, and clips in which they move."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import l1_loss

from iwin_dit.data import digits, moving_digits
from iwin_dit.data.codec import decode, encode, load_vae, weights_sha256
from iwin_dit.data.digits import Scan
from iwin_dit.data.latents import LatentDataset
from iwin_dit.data.video import read_frames, write_gif
from studies.moving_digits_report import read_clips

load_digits = pytest.importorskip("sklearn.datasets").load_digits
SQUARE = Scan(7, np.pad(np.full((2, 2), 255, np.uint8), 3), 4)  # its centre is that of the scan


def test_scans_are_scikit_learns_and_each_is_used_once():
    bunch, found = load_digits(), digits.scans(seed=0)
    assert {split: len(scans) for split, scans in found.items()} == {"train": 1500, "test": 297}
    assert sorted(scan.number for scans in found.values() for scan in scans) == list(range(1797))
    for scan in found["test"]:
        assert scan.digit == bunch.target[scan.number]
        np.testing.assert_allclose(scan.pixels, bunch.images[scan.number] * 255 / 16, atol=0.5)
    assert [s.number for s in found["test"]] == [s.number for s in digits.scans(seed=0)["test"]]
    assert [s.number for s in found["test"]] != [s.number for s in digits.scans(seed=1)["test"]]


def path_of(frames):
    """The centre of what is bright, (frames, x and y), from the middle of the picture in pixels."""
    centres = []
    for frame in frames:
        bright = np.asarray(frame, float)
        y, x = np.indices(bright.shape)
        centres.append([(bright * axis).sum() / bright.sum() - 15.5 for axis in (x, y)])
    return np.array(centres)


@pytest.mark.parametrize(
    ("direction", "along", "sign"), [("left", 0, -1), ("right", 0, 1), ("up", 1, -1), ("down", 1, 1)]
)
def test_a_digit_moves_through_the_middle_at_one_speed(direction, along, sign):
    travels, drifts = set(), set()
    for seed in range(40):
        frames = moving_digits.move(SQUARE, direction, torch.Generator().manual_seed(seed))
        assert len(frames) == 8
        assert {(frame.size, frame.mode) for frame in frames} == {((32, 32), "L")}
        path = path_of(frames)
        way, across = sign * path[:, along], path[:, 1 - along]
        assert np.ptp(across) < 0.01
        assert np.diff(way) == pytest.approx((way[-1] - way[0]) / 7, abs=1.01), "as even as whole pixels are"
        assert way.mean() == pytest.approx(0, abs=0.51)
        travels.add(round(way[-1] - way[0]))
        drifts.add(round(across[0]))
    assert travels == {8, 10, 12}, "of 8 to 12, in whole pixels to both sides"
    assert drifts == {-2, -1, 0, 1, 2}


def test_each_scan_moves_along_both_axes(tmp_path, monkeypatch):
    some = {split: scans[:6] for split, scans in digits.scans(0).items()}
    monkeypatch.setattr(digits, "scans", lambda seed: some)
    moving_digits.write_clips(tmp_path / "new" / "one", seed=0)
    moving_digits.write_clips(tmp_path / "two", seed=0)
    for split, scans in some.items():
        for scan in scans:
            found = sorted(
                path.parent.name
                for path in (tmp_path / "new" / "one" / split).glob(f"*/{scan.number:04d}.gif")
            )
            assert [name.split()[0] for name in found] == [str(scan.digit)] * 2
            axes = {"left": "x", "right": "x", "up": "y", "down": "y"}
            assert sorted(axes[name.split()[1]] for name in found) == ["x", "y"]
            for name in found:
                file = f"{split}/{name}/{scan.number:04d}.gif"
                assert (tmp_path / "new" / "one" / file).read_bytes() == (
                    tmp_path / "two" / file
                ).read_bytes()
                frames = read_frames(str(tmp_path / "new" / "one" / file), range(8))
                path, direction = path_of([frame.convert("L") for frame in frames]), name.split()[1]
                way = (path[-1] - path[0])[int(axes[direction] == "y")]
                assert 6 < (-way if direction in ("left", "up") else way) < 14
    gif = next((tmp_path / "new" / "one").rglob("*.gif"))
    with Image.open(gif) as image:
        assert image.info["duration"] in (120, 130), "eight frames a second"
    gif.unlink()
    moving_digits.write_clips(tmp_path / "new" / "one", seed=0)
    assert not gif.exists(), "a split that is there is kept"


def test_the_autoencoder_learns_and_draws_from_its_seed_alone():
    pixels = np.stack([np.asarray(scan.resized(32)) for scan in digits.scans(0)["train"][:16]])
    images = torch.from_numpy(pixels).float().div(127.5).sub(1)[:, None].expand(-1, 3, -1, -1)
    state = torch.get_rng_state()
    first, vae = (digits.train_vae(images, seed=0, steps=steps).eval() for steps in (1, 8))
    before, after = (float(l1_loss(decode(v, encode(v, images)), images)) for v in (first, vae))
    assert after < 0.75 * before
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    again, other = (weights_sha256(digits.train_vae(images, seed, steps=1).eval()) for seed in (0, 1))
    assert again == weights_sha256(first) != other
    assert encode(vae, images).shape == (16, 4, 8, 8)


def test_what_was_prepared_is_kept(tmp_path, monkeypatch):
    some = {split: scans[:8] for split, scans in digits.scans(0).items()}
    monkeypatch.setattr(digits, "scans", lambda seed: some)
    monkeypatch.setattr(digits, "train_vae", partial(digits.train_vae, steps=1))
    tmp_path = tmp_path / "new" / "digits"
    digits.prepare(tmp_path)
    latents, vae = LatentDataset(tmp_path), load_vae(str(tmp_path / "vae"))
    images, labels, names = digits.read_images(tmp_path / "train")
    assert latents.class_names == names == sorted({str(scan.digit) for scan in some["train"]})
    assert (images.min(), images.max()) >= (-1, 0.5)
    torch.testing.assert_close(latents.read_raw(range(8)), encode(vae, images), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        latents.read_raw(range(8), True), encode(vae, images.flip(-1)), atol=1e-5, rtol=1e-5
    )
    assert [int(latents[i][1]) for i in range(8)] == labels.tolist()
    monkeypatch.setattr(digits, "train_vae", None)
    monkeypatch.setattr(digits, "scans", None)
    digits.prepare(tmp_path)


def test_moving_digits_become_latents_of_their_clips(tmp_path, monkeypatch):
    some = {split: scans[:4] for split, scans in digits.scans(0).items()}
    monkeypatch.setattr(digits, "scans", lambda seed: some)
    seen = []

    def train_vae(frames, seed, steps):
        seen.append(frames)
        return digits.train_vae(frames, seed, 1)

    monkeypatch.setattr(moving_digits, "train_vae", train_vae)
    tmp_path = tmp_path / "new" / "clips"
    moving_digits.prepare(tmp_path)
    (frames,) = seen
    assert frames.shape == (4 * 2 * 8, 3, 32, 32)
    assert frames.min() >= -1
    assert frames.max() <= 1
    assert -0.95 < frames.mean() < -0.5, "white on black"
    latents, vae = LatentDataset(tmp_path), load_vae(str(tmp_path / "vae"))
    assert len(latents) == 8
    clip = read_frames(str(sorted((tmp_path / "train").rglob("*.gif"))[0]), range(8))
    pixels = torch.from_numpy(np.stack([np.asarray(frame.convert("RGB")) for frame in clip]))
    expected = encode(vae, pixels.permute(3, 0, 1, 2)[None].float() / 127.5 - 1)
    torch.testing.assert_close(latents.read_raw([0]), expected, atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(moving_digits, "train_vae", None)
    moving_digits.prepare(tmp_path)


def test_the_report_judges_the_clips_that_lie_there(tmp_path):
    for name in ("0 left", "1 up"):
        (tmp_path / name).mkdir()
        for k in range(2):
            frames = [Image.new("RGB", (32, 32), (10 * t + k,) * 3) for t in range(moving_digits.NUM_FRAMES)]
            write_gif(frames, tmp_path / name / f"{k}.gif", 8)
    clips, labels, names = read_clips(tmp_path)
    assert clips.shape == (4, 3, moving_digits.NUM_FRAMES, 32, 32)
    assert (labels.tolist(), names) == ([0, 0, 1, 1], ["0 left", "1 up"])
    brightness = (clips.mean((1, 3, 4)) + 1) * 127.5
    expected = torch.arange(moving_digits.NUM_FRAMES) * 10.0 + torch.tensor([[0.0], [1.0]]).repeat(2, 1)
    torch.testing.assert_close(brightness, expected, atol=1.0, rtol=0)
