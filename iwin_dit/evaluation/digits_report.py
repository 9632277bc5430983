"""The report of the quickstart: ``python -m iwin_dit.evaluation.digits_report RUN``.

Writes to ``RUN/report``: samples, the loss curve, reconstructions of the VAE, and a table: how many of 200
samples an independent classifier recognises, a support vector machine that knows real scans only; and, for
scale, how many real digits and how many of their reconstructions.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from iwin_dit.build import load_pipeline
from iwin_dit.data.codec import decode, encode
from iwin_dit.data.digits import read_images
from iwin_dit.pipelines.sampling import Sample, draw_grid, sample_classes
from iwin_dit.runtime.cpu import keep_freed_memory
from iwin_dit.runtime.errors import DataError, run_script
from iwin_dit.runtime.run import read_config

NUM_PER_CLASS = 20
SEED = 1
NEXT = """
Look at samples.png, loss.png and reconstructions.png in {report}. Then try
  python sample.py --class 3 --num-images 16                   sixteen threes
  python sample.py --class 3 8 --guidance-scale 1              without guidance
  accelerate launch train_dit.py --train.max_steps 2000        train on from where it stopped"""


class Recogniser:
    """A support vector machine on the pixels of real scans."""

    def __init__(self, images: Tensor, labels: Tensor):
        from sklearn.svm import SVC

        self.machine = SVC(gamma="scale", C=10).fit(self._pixels(images), labels.numpy())

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of images ``(B, 3, H, W)`` in [-1, 1] that are recognised as their labels ``(B,)``."""
        return float((self.machine.predict(self._pixels(images)) == labels.numpy()).mean())

    @staticmethod
    def _pixels(images: Tensor) -> np.ndarray:
        """Grey, at the resolution of the scans."""
        small = torch.nn.functional.adaptive_avg_pool2d(images.float().mean(1, keepdim=True), 8)
        return small.flatten(1).numpy()


def to_tensor(samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """Images ``(B, 3, H, W)`` in [-1, 1] and labels ``(B,)``."""
    images = np.stack([np.asarray(sample.image) for sample in samples])
    return torch.from_numpy(images).movedim(-1, 1) / 127.5 - 1, torch.tensor([s.label for s in samples])


def to_samples(images: Tensor, label: str) -> list[Sample]:
    """The inverse, for a grid."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(1, -1).numpy()
    return [Sample(label, number, Image.fromarray(image)) for number, image in enumerate(pixels)]


def main() -> None:
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart")
    keep_freed_memory()
    pipeline = load_pipeline(str(run))
    config = read_config(run)
    data = Path(config["data"]["path"])
    if not (data / "test").is_dir():
        raise DataError(f"{data}/test does not exist: the report is for runs that were trained on the digits")
    report = run / "report"
    report.mkdir(exist_ok=True)

    sampling = {
        key: config["sample"][key] for key in ("num_inference_steps", "guidance_scale", "guidance_interval")
    }
    samples = list(sample_classes(pipeline, range(10), NUM_PER_CLASS, SEED, batch_size=50, **sampling))
    draw_grid([s for s in samples if s.number < 8], pipeline.id2label).save(report / "samples.png")
    shutil.copyfile(run / "loss.png", report / "loss.png")

    recogniser = Recogniser(*read_images(data / "train")[:2])
    real, labels, _ = read_images(data / "test")
    reconstructions = decode(pipeline.vae, encode(pipeline.vae, real))
    shown = [int((labels == digit).nonzero()[0]) for digit in range(10)]
    rows = to_samples(real[shown], "real") + to_samples(reconstructions[shown], "through the VAE")
    draw_grid(rows, {}).save(report / "reconstructions.png")

    table = [
        ("real digits, never trained on", len(real), recogniser.accuracy(real, labels)),
        ("the same through the VAE", len(real), recogniser.accuracy(reconstructions, labels)),
        ("samples of the model", len(samples), recogniser.accuracy(*to_tensor(samples))),
    ]
    lines = ["| images | number | recognised |", "|---|---|---|"]
    lines += [f"| {name} | {count} | {100 * share:.1f} % |" for name, count, share in table]
    (report / "report.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(NEXT.format(report=report))


if __name__ == "__main__":
    run_script(main)
