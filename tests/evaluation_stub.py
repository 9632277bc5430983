"""What tests of evaluate_fid.py share: two small sets, a pipeline, and a network in Inception's place."""

from types import SimpleNamespace

import numpy as np
import torch
from conftest import make_pipeline
from PIL import Image
from torch import nn

from iwin_dit.evaluation.extractors import Inception
from iwin_dit.pipelines.base import export_pipeline

COUNT = 12


class Stub(nn.Module):
    """Inception's layers, of 8, 6 and 32 features, in microseconds."""

    name, sha256, preprocessing = "inception-stub", "0" * 64, "none"
    layers = Inception.layers

    def __init__(self, weights=None):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv, self.head = nn.Conv2d(3, 8, 5, stride=3).double(), nn.Linear(8, 6).double()

    @torch.no_grad()
    def forward(self, images):
        x = self.conv(images.double() / 128 - 1).relu()
        pool = x.mean((2, 3))
        found = {"pool": pool, "logits": 9 * self.head(pool), "spatial": x[:, :2].flatten(1)}
        return {layer: features.float() for layer, features in found.items()}


def one_of(processes=1, index=0):
    """In the place of an accelerator, on the CPU."""
    return SimpleNamespace(
        device=torch.device("cpu"),
        process_index=index,
        num_processes=processes,
        wait_for_everyone=lambda: None,
    )


def frechet_of_few(a, b):
    """The distance of fewer features ``(N, D)`` than D, in float64 and without their covariances.

    The product of the covariances has few eigenvalues that are not 0; their roots are singular values.
    """
    a, b = (features.double().numpy() for features in (a, b))
    shift = a.mean(0) - b.mean(0)
    a, b = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))  # the covariance is a.T @ a
    return shift @ shift + (a**2).sum() + (b**2).sum() - 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum()


def make_sets(root):
    """Folders ``real`` and ``other`` of 16 x 16 pixels, and a ``pipeline`` that draws such images."""
    rng = np.random.default_rng(0)
    for name, low in (("real", 0), ("other", 80)):
        (root / name).mkdir()
        for i in range(COUNT):
            pixels = rng.integers(low, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:02d}.png")
    export_pipeline(make_pipeline(), root / "pipeline", {})
    return root


if __name__ == "__main__":
    # evaluate_fid.py with the stub, a millisecond an image, of its arguments or of each line of such
    import json
    import os
    import sys
    import time

    from iwin_dit.commands import evaluate, measure
    from iwin_dit.evaluation import extractors, images
    from iwin_dit.runtime.errors import UserError

    class Slow(Stub):
        def forward(self, images):
            time.sleep(0.001 * len(images))
            return super().forward(images)

    extractors.Inception = Slow
    measure.use_all_cores = lambda processes: None
    counts = dict.fromkeys(("looked at", "listed", "computed"), 0)

    def counted(what, call):
        def counting(*arguments, **options):
            counts[what] += 1
            return call(*arguments, **options)

        return counting

    images.read_header = counted("looked at", images.read_header)
    images.list_files = counted("listed", images.list_files)
    measure.compute = counted("computed", measure.compute)
    if sys.argv[1:]:
        measure.evaluate(evaluate.parse_arguments(sys.argv[1:]))
        group = torch.distributed.distributed_c10d._get_default_group()
        seconds = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
        print(f"process {os.environ['RANK']}: {counts} timeout {seconds:.0f}", flush=True)
        sys.exit()
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            measure.evaluate(evaluate.parse_arguments(json.loads(line)))
            print("ended: well", flush=True)
        except UserError as error:
            print(f"ended: {error}", flush=True)
