"""Features of images: our loop beside torch-fidelity's own, and the memory of ten times as many images.

    python benchmarks/evaluation.py [--images 10000]

After ``make demo``, whose classifier the memory is measured with. Speed is Inception's, with random weights,
on which it does not depend; small pictures drawn here.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch_fidelity.feature_extractor_inceptionv3 as theirs
from PIL import Image
from torch import nn
from torch_fidelity.datasets import ImagesPathDataset
from torch_fidelity.utils import get_featuresdict_from_dataset

from iwin_dit.evaluation.evaluate import extract_features
from iwin_dit.evaluation.extractors import Inception
from iwin_dit.evaluation.images import FolderImages

ROOT = Path(__file__).parent.parent


def draw_images(folder: Path, count: int) -> Path:
    """So many pictures of 32 x 32 pixels, each a few colours."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{i:06d}.png")
    return folder


class RandomInception(Inception):
    """torch-fidelity's network, drawn at random."""

    def __init__(self):
        nn.Module.__init__(self)
        load = theirs.FeatureExtractorInceptionV3.load_state_dict
        theirs.load_state_dict_from_url = lambda *a, **k: {}
        theirs.FeatureExtractorInceptionV3.load_state_dict = lambda *a, **k: None
        layers = ["2048", "logits_unbiased"]
        self.network = theirs.FeatureExtractorInceptionV3("inception-v3-compat", layers)
        theirs.FeatureExtractorInceptionV3.load_state_dict = load
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)


def compare_speed(folder: Path, batch: int, rounds: int) -> None:
    extractor, images = RandomInception(), FolderImages(folder)
    files = [str(path) for path in images.paths]
    rates: dict[str, list[float]] = {"ours": [], "torch-fidelity": []}
    for i in range(rounds):
        started = time.perf_counter()
        features = folder.parent / f"features-{i}"
        extract_features(images, extractor, extractor.layers, features, batch, torch.device("cpu"))
        rates["ours"].append(len(images) / (time.perf_counter() - started))
        started = time.perf_counter()
        dataset = ImagesPathDataset(files)
        get_featuresdict_from_dataset(dataset, extractor.network, batch, False, False, False)
        rates["torch-fidelity"].append(len(images) / (time.perf_counter() - started))
    ours, theirs = (statistics.median(rates[name]) for name in ("ours", "torch-fidelity"))
    print(f"features/s over {len(images)} images in batches of {batch}, {rounds} rounds in turn:")
    print(f"ours {ours:.1f}, torch-fidelity's loop {theirs:.1f}, ratio {ours / theirs:.2f}", flush=True)


def peak_mib(folder: Path, reference: Path, extractor: str, batch: int) -> tuple[float, float]:
    """Of the resident memory of ``evaluate_fid.py``, and its seconds."""
    started = time.perf_counter()
    command = [sys.executable, "evaluate_fid.py", "--generated", folder, "--reference", reference]
    command += ["--extractor", extractor, "--batch-size", batch, "--out", folder.parent / "result.json"]
    environment = os.environ | {"XDG_CACHE_HOME": str(folder.parent / f"cache-{folder.name}")}
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit("evaluate_fid.py failed")
    return usage.ru_maxrss / 1024, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000, help="and a tenth of them (10,000)")
    own = "iwin:runs/digits_classifier"
    parser.add_argument("--extractor", default=own, help=f"whose memory is measured ({own})")
    parser.add_argument("--speed-images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        few = draw_images(Path(root) / "speed", arguments.speed_images)
        compare_speed(few, arguments.batch, arguments.rounds)
        for count in (arguments.images // 10, arguments.images):
            folder = draw_images(Path(root) / f"images-{count}", count)
            peak, seconds = peak_mib(folder, few, arguments.extractor, arguments.batch)
            print(f"{count:,} images: {peak:.0f} MiB at the peak, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
