"""What generated digits are worth: two figures of samples of any size.

They are those of :mod:`studies.digits_report`: FD (iwin) to held-out digits, and the share that a
support vector machine recognises.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from iwin_dit.config.schema import Config
from iwin_dit.data.codec import decode, encode
from iwin_dit.data.digits import read_images
from iwin_dit.pipelines.base import ClassConditionalPipeline
from iwin_dit.pipelines.sampling import sample_classes
from iwin_dit.runtime import files
from iwin_dit.runtime.errors import ConfigError, DataError
from studies.digits_report import SEED, Distance, Recogniser, to_samples, to_tensor

LEAST_IMAGES = 20
BATCH_IMAGES = 50


class Judge:
    """Compares images with real digits of their size.

    Args:
        data: folder of the digits.
        classifier: a run of ``train_classifier.py``.
        num_images: to judge, equally many of each digit.

    Raises:
        ConfigError: where ten does not divide ``num_images``, or they are too few.
        DataError: where digits or classifier are not there.
    """

    def __init__(self, data: Path, classifier: str, num_images: int):
        if num_images < LEAST_IMAGES or num_images % 10:
            raise ConfigError(
                f"--num-images is {num_images}, expected a multiple of 10 from {LEAST_IMAGES} on: as many of "
                "each digit"
            )
        if not (data / "test").is_dir() or not Path(classifier).is_dir():
            raise DataError(
                f"{data}/test or {classifier}, which judge the samples, is not there; "
                "accelerate launch train_classifier.py makes both"
            )
        self.classifier, self.num_images = classifier, num_images
        self.recogniser = Recogniser(*read_images(data / "train")[:2])
        self.real, self.labels, _ = read_images(data / "test")
        self._distances: dict[int, Distance] = {}
        self.identity = {  # what figures depend on
            "classifier": self.distance(self.real.shape[-1]).extractor.sha256,
            "held_out": files.digest(self.real.numpy().tobytes() + self.labels.numpy().tobytes())["sha256"],
            "num_images": num_images,
            "distance": "by halves of equally many of each digit",
        }

    def held_out(self, side: int) -> Tensor:
        """Real digits ``(N, 3, side, side)`` in [-1, 1], of which :attr:`labels` are the labels."""
        if side == self.real.shape[-1]:
            return self.real
        samples = to_samples(self.real, "real")
        resized = [sample.image.resize((side, side), Image.Resampling.BICUBIC) for sample in samples]
        return to_tensor(
            [s._replace(frames=[image], label=0) for s, image in zip(samples, resized, strict=True)]
        )[0]

    def distance(self, side: int) -> Distance:
        """FD (iwin) to the held-out digits of this size."""
        if side not in self._distances:
            most = self.num_images // 10
            self._distances[side] = Distance(self.classifier, self.held_out(side), self.labels, most)
        return self._distances[side]

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """``fd``, and ``recognised``, a share: of ``(N, 3, side, side)`` in [-1, 1] and ``(N,)``."""
        right = self.recogniser(images) == labels
        fd = self.distance(images.shape[-1])(images, labels)
        return {"fd": fd, "recognised": right.float().mean().item()}

    def of_real(self, side: int) -> dict[str, float]:
        """Of the held-out digits themselves: what can be reached."""
        return self(self.held_out(side), self.labels)

    def of_reconstructions(self, vae: Any, side: int) -> dict[str, float]:
        """Of the same through the autoencoder: what a perfect model of the latents reaches."""
        return self(decode(vae, encode(vae, self.held_out(side))), self.labels)

    def of_samples(
        self, pipeline: ClassConditionalPipeline, config: Config, side: int, **guidance: Any
    ) -> dict[str, float]:
        """Of samples from the same noise for every model, without guidance but for what is given."""
        options = unguided(config, side) | guidance
        per_class = self.num_images // 10
        samples = sample_classes(pipeline, range(10), per_class, SEED, BATCH_IMAGES, **options)
        return self(*to_tensor(list(samples)))


def unguided(config: Config, side: int) -> dict[str, Any]:
    """The pipeline's options for images of ``side x side`` pixels, as they are judged."""
    steps = config.sample.num_inference_steps
    return {"guidance_scale": 1.0, "num_inference_steps": steps, "height": side, "width": side}
