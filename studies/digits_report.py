"""The report of the quickstart: ``python -m studies.digits_report RUN [CLASSIFIER]``.

Writes to ``RUN/report``: samples, the loss curve, reconstructions of the VAE, and a table of two figures for
300 samples, and, for scale, for real digits, for their reconstructions, for samples of a model that was
trained for 50 steps only (of ``RUN_50_steps``, where that is there) and for noise:

* how many are recognised as what they should be, by a support vector machine that knows real scans only;
* FD (iwin), the Frechet distance to held-out digits by the features of a run of ``train_classifier.py``, half
  of them against the other half.

The samples are drawn without guidance, and with it in a row of their own.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from iwin_dit.build.classifier_network import load_classifier
from iwin_dit.build.loading import load_pipeline
from iwin_dit.data.codec import decode, encode
from iwin_dit.data.digits import read_images
from iwin_dit.evaluation.extractors import Classifier
from iwin_dit.evaluation.metrics import Moments, frechet_distance
from iwin_dit.pipelines.media import IwinDiTPipeline
from iwin_dit.pipelines.sampling import Sample, draw_grid, sample_classes
from iwin_dit.runtime.errors import DataError, run_script
from iwin_dit.runtime.processes import keep_freed_memory
from iwin_dit.runtime.progress import say
from iwin_dit.runtime.run import read_config
from iwin_dit.runtime.seeds import generator

NUM_PER_CLASS = 30
SEED = 1
NUM_HALVINGS = 10
CLASSIFIER = "runs/digits_classifier"
NEXT = """
Look at samples.png, loss.png and reconstructions.png in {report}. Then try
  python sample.py --class 3 --num-images 16                   sixteen threes
  python sample.py --class 3 8 --guidance-scale 1              without guidance
  accelerate launch train_dit.py --train.max_steps 2000        train on from where it stopped"""


class Recogniser:
    """A support vector machine on the pixels of real scans.

    Args:
        images: ``(B, 3, H, W)`` in [-1, 1].
        labels: ``(B,)``.
        side: of what it looks at; 8 is the resolution of the scans.
    """

    def __init__(self, images: Tensor, labels: Tensor, side: int = 8):
        from sklearn.svm import SVC

        self.side = side
        self.machine = SVC(gamma="scale", C=10).fit(self._pixels(images), labels.numpy())

    def __call__(self, images: Tensor) -> Tensor:
        """The label that each image is recognised as: ``(B,)``."""
        return torch.from_numpy(self.machine.predict(self._pixels(images)))

    def _pixels(self, images: Tensor) -> np.ndarray:
        """Grey, of ``side x side``."""
        small = torch.nn.functional.adaptive_avg_pool2d(images.float().mean(1, keepdim=True), self.side)
        return small.flatten(1).numpy()


def to_tensor(samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """Images ``(B, 3, H, W)`` in [-1, 1] and labels ``(B,)``."""
    images = np.stack([np.asarray(sample.image) for sample in samples])
    return torch.from_numpy(images).movedim(-1, 1) / 127.5 - 1, torch.tensor([s.label for s in samples])


def to_samples(images: Tensor, label: str) -> list[Sample]:
    """The inverse, for a grid."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(1, -1).numpy()
    return [Sample(label, number, [Image.fromarray(image)]) for number, image in enumerate(pixels)]


class Distance:
    """FD (iwin) of images to halves of the held-out digits, so that these have a distance themselves.

    The mean over ten halvings, both ways round: the images that stand where one half stands, against the
    other half. Each side has as many of each digit, drawn at random: otherwise the distance would be that of
    how often a digit occurs. What was trained on is no part of it: a classifier knows that too well.

    Args:
        run: of ``train_classifier.py``.
        held_out: real images ``(B, 3, H, W)`` in [-1, 1].
        labels: their digits ``(B,)``.
        most: of a digit on each side.
    """

    def __init__(self, run: str, held_out: Tensor, labels: Tensor, most: int = 1_000_000):
        loaded = load_classifier(run)
        self.extractor = Classifier(loaded.model, loaded.image_size, loaded.mean, loaded.std, loaded.sha256)
        self.real, self.labels, self.most = self._features(held_out), labels, most

    def __call__(self, images: Tensor, labels: Tensor) -> float:
        """Of images of each digit that was held out, rounded as a saved PNG is."""
        features = self._features(images)
        counts = {
            digit: min(self.most, int((labels == digit).sum()), int((self.labels == digit).sum()) // 2)
            for digit in self.labels.unique().tolist()
        }
        distances = []
        for i in range(NUM_HALVINGS):  # of real images themselves the halves are the same
            own, others = (halves(each, counts, i) for each in (labels, self.labels))
            for one, other in zip(own, reversed(others), strict=True):
                moments = Moments.of(features[one]), Moments.of(self.real[other])
                distances.append(frechet_distance(*moments))
        return sum(distances) / len(distances)

    def _features(self, images: Tensor) -> Tensor:
        pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte()
        return torch.cat([self.extractor(part)["pool"] for part in pixels.split(100)])


def halves(labels: Tensor, counts: dict[int, int], number: int) -> tuple[Tensor, Tensor]:
    """Positions of so many images of each label, at random, twice: apart where there are enough."""
    rng, one, other = generator(SEED, "halves", number), [], []
    for label, count in counts.items():
        own = (labels == label).nonzero().flatten()
        own = own[torch.randperm(len(own), generator=rng)]
        one.append(own[:count])
        other.append(own[len(own) - count :])
    return torch.cat(one), torch.cat(other)


def percent(right: Tensor) -> str:
    """The share that is true."""
    return f"{100 * right.float().mean():.1f} %"


def draw(pipeline: IwinDiTPipeline, options: dict[str, Any]) -> list[Sample]:
    """Equally many of each digit, with the options of the pipeline."""
    return list(sample_classes(pipeline, range(10), NUM_PER_CLASS, SEED, batch_size=50, **options))


def main() -> None:
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart")
    classifier = sys.argv[2] if len(sys.argv) > 2 else CLASSIFIER
    keep_freed_memory()
    pipeline = load_pipeline(str(run))
    config = read_config(run)
    data = Path(config["data"]["path"])
    if config["data"].get("kind") == "images":  # which lie in the folder train
        data = data.parent
    if not (data / "test").is_dir():
        raise DataError(f"{data}/test does not exist: the report is for runs that were trained on the digits")
    report = run / "report"
    report.mkdir(exist_ok=True)

    options = {"num_inference_steps": config["sample"]["num_inference_steps"], "guidance_scale": 1.0}
    scale = config["sample"]["guidance_scale"]
    guided = options | {"guidance_scale": scale, "guidance_interval": config["sample"]["guidance_interval"]}
    samples = draw(pipeline, guided)
    draw_grid([s for s in samples if s.number < 8], pipeline.id2label).save(report / "samples.png")
    shutil.copyfile(run / "loss.png", report / "loss.png")

    known, known_labels, _ = read_images(data / "train")
    real, labels, _ = read_images(data / "test")
    reconstructions = decode(pipeline.vae, encode(pipeline.vae, real))
    shown = [int((labels == digit).nonzero()[0]) for digit in range(10)]
    pairs = to_samples(real[shown], "real") + to_samples(reconstructions[shown], "through the VAE")
    draw_grid(pairs, {}).save(report / "reconstructions.png")

    rows = {
        "real digits, never trained on": (real, labels),
        "the same through the VAE": (reconstructions, labels),
        "samples of the model": to_tensor(draw(pipeline, options)),
    }
    if (early := run.with_name(f"{run.name}_50_steps")).is_dir():
        rows["samples after 50 steps of training"] = to_tensor(draw(load_pipeline(str(early)), options))
    noise = torch.rand(real.shape, generator=generator(SEED, "noise")) * 2 - 1
    rows["noise"] = noise, labels
    rows[f"samples with guidance {scale:g}"] = to_tensor(samples)

    recogniser = Recogniser(known, known_labels)
    columns = {"recognised": lambda images, labels: percent(recogniser(images) == labels)}
    if Path(classifier).is_dir():
        distance = Distance(classifier, real, labels)
        columns["FD (iwin), by halves"] = lambda images, labels: f"{distance(images, labels):.3f}"
    else:
        say(f"no FD (iwin): {classifier} is not there; accelerate launch train_classifier.py makes it")
    lines = [f"| images | number | {' | '.join(columns)} |", "|---|---" + "|---" * len(columns) + "|"]
    for name, (images, labels) in rows.items():
        cells = [column(images, labels) for column in columns.values()]
        lines.append(f"| {name} | {len(images)} | {' | '.join(cells)} |")
    (report / "report.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(NEXT.format(report=report))


if __name__ == "__main__":
    run_script(main)
