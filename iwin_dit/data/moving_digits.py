"""The video quickstart's data: real scans of handwritten digits that move left, right, up or down.

```
data/moving_digits/
  train/3 left/0042.gif    3,000 clips of 8 frames of 32 x 32, a folder per digit and direction
  test/3 left/0007.gif     594 clips of scans that nothing is trained on
  vae/                     a small AutoencoderKL, trained here on single frames
  index.json, *.safetensors    the latents of train/, made as extract_latents.py makes them
```
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from iwin_dit.data.codec import weights_sha256
from iwin_dit.data.digits import Scan, alone_in, train_vae, write_splits
from iwin_dit.data.extraction import LOCAL_VAE, Settings, extract
from iwin_dit.data.pixels import Reader
from iwin_dit.data.sources import ClipFolderSource
from iwin_dit.data.video import ClipSpec, write_gif
from iwin_dit.runtime import scratch
from iwin_dit.runtime.seeds import generator

SIDE, NUM_FRAMES, DIGIT_SIDE = 32, 8, 20
MAX_DRIFT = 2  # pixels from the middle, across the direction of motion
TRAVEL = (8, 12)  # pixels from the first frame to the last, least and most
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x to the right, y down
PAIRS = (("left", "right"), ("up", "down"))  # each scan moves in one direction of each
NUM_VAE_CLIPS, VAE_STEPS = 500, 200
FPS = 8


def prepare(root: Path, seed: int = 0) -> None:
    """Makes ``root``; what is there already is kept, so that an interrupted call is simply repeated."""
    with alone_in(root):
        if (root / "index.json").is_file():  # made by who held it before
            return
        write_splits(root, seed, partial(_write_clip, seed))
        source, spec = ClipFolderSource(root / "train"), ClipSpec(NUM_FRAMES)
        if not (root / LOCAL_VAE).is_dir():
            reader = Reader(source, (SIDE, SIDE), clip=spec)
            order = torch.randperm(len(reader), generator=generator(seed, "frames"))[:NUM_VAE_CLIPS].tolist()
            clips = torch.stack([reader.read(i, torch.Generator())[0] for i in order])  # (N, 3, T, H, W)
            frames = clips.transpose(1, 2).flatten(0, 1).float() / 127.5 - 1
            trained = train_vae(frames, seed, VAE_STEPS)
            with scratch.replacement(root / LOCAL_VAE) as new:
                trained.save_pretrained(new)
        vae = (
            AutoencoderKL.from_pretrained(root / LOCAL_VAE, use_safetensors=True).eval().requires_grad_(False)
        )
        description = {"vae": LOCAL_VAE, "vae_sha256": weights_sha256(vae)}
        extract(source, vae, root, Settings(size=(SIDE, SIDE), clip=spec), description)


def write_clips(root: Path, seed: int = 0) -> None:
    """The clips as GIF, a folder per class, such as ``3 left``."""
    with alone_in(root):
        write_splits(root, seed, partial(_write_clip, seed))


def _write_clip(seed: int, scan: Scan, split: Path) -> None:
    for pair in PAIRS:
        rng = generator(seed, "motion", scan.number, pair[0])
        direction = pair[int(torch.randint(2, (), generator=rng))]
        folder = split / f"{scan.digit} {direction}"
        folder.mkdir(exist_ok=True)
        write_gif(move(scan, direction, rng), folder / f"{scan.number:04d}.gif", FPS)


def move(scan: Scan, direction: str, rng: torch.Generator) -> list[Image.Image]:
    """A clip of 8 frames of 32 x 32: the digit moves through the middle, more or less, at one speed."""
    drift = int(torch.randint(-MAX_DRIFT, MAX_DRIFT + 1, (), generator=rng))
    travel = int(torch.randint(TRAVEL[0], TRAVEL[1] + 1, (), generator=rng))
    dx, dy = DIRECTIONS[direction]
    digit, corner = scan.resized(DIGIT_SIDE), (SIDE - DIGIT_SIDE) / 2
    frames = []
    for way in np.linspace(-travel / 2, travel / 2, NUM_FRAMES):
        frame = Image.new("L", (SIDE, SIDE))
        place = corner + way * dx + drift * abs(dy), corner + way * dy + drift * abs(dx)
        frame.paste(digit, tuple(round(side) for side in place))
        frames.append(frame)
    return frames
