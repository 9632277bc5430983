"""From pictures to samples with an autoencoder of Stable Diffusion's architecture, step by step.

    python benchmarks/own_images.py --images 2000 --size 256 --precision bfloat16

Draws the pictures, saves an ``AutoencoderKL`` with random weights, extracts, trains for 20 steps and samples.
Says how much of the extraction's wall time passes in the autoencoder. Run it again to go on.
"""

from __future__ import annotations

import argparse
import colorsys
import random
import subprocess
import sys
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw

from iwin_dit.build.data import load_autoencoder
from iwin_dit.data.codec import weights_sha256
from iwin_dit.data.extraction import LOCAL_VAE, Settings, extract
from iwin_dit.data.sources import open_source
from iwin_dit.runtime.processes import keep_freed_memory

ROOT = Path(__file__).parent.parent
SHAPES = ("ellipse", "rectangle", "triangle", "line")


def draw(folder: Path, images: int, size: int) -> None:
    """``folder/CLASS/0000.png``: one shape on a plain ground, of random place, size and colours."""
    for number in range(images):
        rng = random.Random(number)
        shape = SHAPES[number % len(SHAPES)]
        ground, ink = (tuple(int(255 * c) for c in colorsys.hsv_to_rgb(rng.random(), 0.6, 0.9)) for _ in "12")
        image = Image.new("RGB", (size, size), ground)
        x, y = rng.uniform(0, 0.5) * size, rng.uniform(0, 0.5) * size
        box = (x, y, x + rng.uniform(0.2, 0.5) * size, y + rng.uniform(0.2, 0.5) * size)
        pen = ImageDraw.Draw(image)
        if shape == "triangle":
            pen.polygon(((box[0], box[3]), (box[2], box[3]), ((box[0] + box[2]) / 2, box[1])), fill=ink)
        elif shape == "line":
            pen.line(box, fill=ink, width=size // 16)
        else:
            getattr(pen, shape)(box, fill=ink)
        path = folder / shape / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def save_autoencoder(folder: Path) -> None:
    """Stable Diffusion's autoencoder, 83.7 million parameters, with random weights."""
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[128, 256, 512, 512],
        layers_per_block=2,
        latent_channels=4,
    ).save_pretrained(folder)


class Clock:
    """A function that measures the time that passes in it."""

    def __init__(self, function):
        self.function, self.seconds = function, 0.0

    def __call__(self, *arguments, **options):
        started = time.perf_counter()
        result = self.function(*arguments, **options)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - started
        return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--folder", type=Path, default=Path("data/own_images"))
    options = parser.parse_args()
    folder = options.folder / f"{options.images}_{options.size}px"
    if not (folder / "vae").exists():
        draw(folder / "images", options.images, options.size)
        save_autoencoder(folder / "vae")

    keep_freed_memory()
    vae = load_autoencoder(str(folder / "vae"))
    vae.to("cuda" if torch.cuda.is_available() else "cpu")
    vae.encode = Clock(vae.encode)
    size = (options.size, options.size)
    settings = Settings(size, batch_images=16, shard_images=200, precision=options.precision, store="float16")
    description = {"vae": LOCAL_VAE, "vae_sha256": weights_sha256(vae)}
    started = time.perf_counter()
    extract(
        open_source(str(folder / "images")), vae, folder / "latents", settings, description, num_workers=1
    )
    seconds = time.perf_counter() - started
    share = vae.encode.seconds / seconds
    print(f"extraction: {seconds:.0f} s, of which {share:.1%} in the autoencoder")

    train = {
        "output_dir": folder / "run",
        "data.path": folder / "latents",
        "data.prepare": "null",
        "model.num_classes": len(SHAPES),
        "model.sample_size": options.size // 8,
        "train.max_steps": 20,
        "train.sample_every_steps": 0,
    }
    arguments = [text for key, value in train.items() for text in (f"--{key}", str(value))]
    subprocess.run([sys.executable, "train_dit.py", *arguments], cwd=ROOT, check=True)
    sample = ["--class", *SHAPES, "--num-images", "2", "--steps", "10", "--out", str(folder / "samples.png")]
    subprocess.run(
        [sys.executable, "sample.py", "--checkpoint", folder / "run", *sample], cwd=ROOT, check=True
    )


if __name__ == "__main__":
    main()
