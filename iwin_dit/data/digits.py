"""The quickstart's data: scikit-learn's 1,797 scans of handwritten digits, as images, a VAE and latents.

```
data/digits/
  train/3/0042.png     1,500 images of 32 x 32, a folder per class
  test/3/0007.png      297 images that nothing is trained on
  vae/                 a small AutoencoderKL, trained here in about a minute
  index.json, *.safetensors     the latents of train/
```
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2.functional import pil_to_tensor

from iwin_dit.data.codec import encode
from iwin_dit.data.latents import Shard, write_latents
from iwin_dit.runtime import scratch
from iwin_dit.runtime.errors import DataError
from iwin_dit.runtime.lock import hold
from iwin_dit.runtime.progress import progress
from iwin_dit.runtime.seeds import derive_seed, generator

IMAGE_SIZE = 32
NUM_TRAIN = 1500
VAE_STEPS = 120


def prepare(root: Path, seed: int = 0) -> None:
    """Makes ``root``; what is there already is kept, so that an interrupted call is simply repeated."""
    with alone_in(root):
        if not (root / "index.json").is_file():  # made by who held it before
            _prepare(root, seed)


@contextlib.contextmanager
def alone_in(root: Path) -> Iterator[None]:
    """Makes a folder, in which one process at a time works."""
    root.mkdir(parents=True, exist_ok=True)
    with hold(root, wait=True):
        yield


def _prepare(root: Path, seed: int) -> None:
    write_splits(root, seed, _write_image)
    images, labels, class_names = read_images(root / "train")
    if not (root / "vae" / "config.json").is_file():
        trained = train_vae(images, seed)
        with scratch.replacement(root / "vae") as new:
            trained.save_pretrained(new)
    vae = AutoencoderKL.from_pretrained(root / "vae", use_safetensors=True).eval()
    shard = Shard(encode(vae, images), encode(vae, images.flip(-1)), labels)
    description = {"vae": "vae", "image_size": [IMAGE_SIZE, IMAGE_SIZE], "class_names": class_names}
    write_latents(root, [shard], description)


class Scan(NamedTuple):
    """A handwritten digit. number: among all scans; pixels: (8, 8) uint8, white on black."""

    number: int
    pixels: np.ndarray
    digit: int

    def resized(self, side: int) -> Image.Image:
        """Of ``side x side`` pixels, smoothly."""
        return Image.fromarray(self.pixels).resize((side, side), Image.Resampling.BICUBIC)


def scans(seed: int) -> dict[str, list[Scan]]:
    """1,500 scans to train on, as ``train``, and 297 others as ``test``."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("the digits come with scikit-learn: pip install 'iwin-dit[demo]'") from None
    values, labels = load_digits(return_X_y=True)
    pixels = (values.reshape(-1, 8, 8) * 255 / 16).round().astype(np.uint8)
    order = torch.randperm(len(values), generator=generator(seed, "digits")).tolist()
    drawn = [Scan(number, pixels[number], int(labels[number])) for number in order]
    return {"train": drawn[:NUM_TRAIN], "test": drawn[NUM_TRAIN:]}


def write_images(root: Path, seed: int = 0) -> None:
    """The scans, scaled to 32 x 32, as PNG in a folder per class."""
    with alone_in(root):
        write_splits(root, seed, _write_image)


def _write_image(scan: Scan, split: Path) -> None:
    folder = split / str(scan.digit)
    folder.mkdir(exist_ok=True)
    scan.resized(IMAGE_SIZE).save(folder / f"{scan.number:04d}.png")


def write_splits(root: Path, seed: int, write: Callable[[Scan, Path], None]) -> None:
    """The folders ``train`` and ``test``, where missing; ``write(scan, folder)`` puts one scan there."""
    for split, chosen in scans(seed).items():
        if not (root / split).is_dir():
            with scratch.replacement(root / split) as new:
                for scan in progress(chosen, desc=split, unit="scan", delay=3):
                    write(scan, new)


def read_images(folder: Path) -> tuple[Tensor, Tensor, list[str]]:
    """A folder of class folders: images ``(N, 3, H, W)`` in [-1, 1], labels ``(N,)`` and class names."""
    dataset = ImageFolder(str(folder))
    images = torch.stack([pil_to_tensor(image) for image, _ in dataset]).float() / 127.5 - 1
    return images, torch.tensor(dataset.targets), dataset.classes


def train_vae(images: Tensor, seed: int, steps: int = VAE_STEPS) -> AutoencoderKL:
    """A small autoencoder of factor 4 with 4 latent channels, by mean absolute error and a KL term."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "vae"))
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 3,
            up_block_types=["UpDecoderBlock2D"] * 3,
            block_out_channels=[16, 32, 32],
            latent_channels=4,
            norm_num_groups=8,
            sample_size=IMAGE_SIZE,
            mid_block_add_attention=False,
        )
    rng = generator(seed, "vae batches")
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for _ in progress(range(steps), desc="VAE", unit="step"):
        batch = images[torch.randint(len(images), (32,), generator=rng)]
        posterior = vae.encode(batch).latent_dist
        reconstruction = vae.decode(posterior.sample(generator=rng)).sample
        loss = F.l1_loss(reconstruction, batch) + 1e-2 * posterior.kl().mean() / posterior.mean[0].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return vae
