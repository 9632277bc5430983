"""Features of images: our loop beside torch-fidelity's own, and the memory of ten times as many images.

    python benchmarks/evaluation.py [--images 10000]
    python benchmarks/evaluation.py --metrics [--images 10000]

The first after ``make demo``, whose classifier the memory is measured with. Speed is Inception's, with random
weights, on which it does not depend; small pictures drawn here. The second measures the metrics: time and
memory of ``evaluate_fid.py``, each metric alone and all together, on one process and on two, with features as
many as Inception's that a random projection makes.
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
from accelerate import Accelerator
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
        extract_features(images, extractor, features, batch, Accelerator(cpu=True))
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


class Projection(nn.Module):
    """As many features as Inception has, of pixels that are projected at random, in microseconds."""

    name, sha256, preprocessing = "projection", "0" * 64, "none"
    layers = Inception.layers

    def __init__(self, weights: Path | None = None):
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        sizes = {"pool": 2048, "logits": 1008, "spatial": 2023}
        self.matrices = {k: torch.randn(192, size, generator=rng) / 8 for k, size in sizes.items()}

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        x = (nn.functional.adaptive_avg_pool2d(images.float(), 8).flatten(1) - 128) / 64
        return {layer: (x @ matrix.to(x.device)).relu() for layer, matrix in self.matrices.items()}


def evaluate_projected(command: list[str]) -> None:
    """``evaluate_fid.py`` with :class:`Projection`; prints this process's peak of memory."""
    import resource

    from iwin_dit.commands import evaluate, measure
    from iwin_dit.evaluation import extractors

    extractors.Inception = Projection
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    measure.evaluate(evaluate.parse_arguments(command))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rank = os.environ.get("RANK", "0")
    print(f"process {rank}: {before:.0f} MiB at the start, {peak:.0f} MiB at the peak", flush=True)


def measure_metrics(root: Path, count: int) -> None:
    """Each metric alone, then all, then all on two processes.

    The reference's features are kept from the first to the last.
    """
    rng = np.random.default_rng(0)
    for name, low in (("generated", 0), ("real", 40)):
        np.savez(root / f"{name}.npz", rng.integers(low, 256, (count, 32, 32, 3), dtype=np.uint8))
    two = [str(Path(sys.executable).parent / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2"]
    two += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    two += ["--main_process_port", "0"]
    environment = os.environ | {"XDG_CACHE_HOME": str(root / "cache"), "PYTHONPATH": str(ROOT)}
    together = "fid,sfid,kid,is,pr"
    for metrics, launcher in (
        *((name, [sys.executable]) for name in together.split(",")),
        (together, [sys.executable]),
        (together, two),
    ):
        command = [*launcher, __file__, "--evaluate", "--generated", root / "generated.npz"]
        command += ["--reference", root / "real.npz", "--metrics", metrics, "--out", root / "result.json"]
        if launcher is two:
            environment |= {"ACCELERATE_USE_CPU": str(not torch.cuda.is_available()).lower()}
        started = time.perf_counter()
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        peaks = [line for line in done.stdout.splitlines() if line.startswith("process ")]
        print(f"{metrics}: {time.perf_counter() - started:.0f} s; {'; '.join(sorted(peaks))}", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--evaluate"]:
        evaluate_projected(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000, help="and a tenth of them (10,000)")
    own = "iwin:runs/digits_classifier"
    parser.add_argument("--extractor", default=own, help=f"whose memory is measured ({own})")
    parser.add_argument("--speed-images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--metrics", action="store_true", help="measure the metrics, and nothing else")
    arguments = parser.parse_args()
    if arguments.metrics:
        with tempfile.TemporaryDirectory() as root:
            measure_metrics(Path(root), arguments.images)
        return
    with tempfile.TemporaryDirectory() as root:
        few = draw_images(Path(root) / "speed", arguments.speed_images)
        compare_speed(few, arguments.batch, arguments.rounds)
        for count in (arguments.images // 10, arguments.images):
            folder = draw_images(Path(root) / f"images-{count}", count)
            peak, seconds = peak_mib(folder, few, arguments.extractor, arguments.batch)
            print(f"{count:,} images: {peak:.0f} MiB at the peak, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
