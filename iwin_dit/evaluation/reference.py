"""What generated images are compared with: real images, stored statistics, or both."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from iwin_dit.config.metrics import looks_at_clips
from iwin_dit.evaluation.archives import array_names
from iwin_dit.evaluation.evaluate import extract_features, features_key, read_features
from iwin_dit.evaluation.images import AS_THEY_ARE, Extractor, Images, Reading, open_set
from iwin_dit.evaluation.metrics import METRICS, Features, check_counts
from iwin_dit.evaluation.statistics import STATISTICS, read_statistics
from iwin_dit.runtime import files
from iwin_dit.runtime.errors import FULL, ConfigError, DataError
from iwin_dit.runtime.lock import hold
from iwin_dit.runtime.processes import together


@dataclass
class Reference:
    """What is compared with; without any of both, nothing.

    images: for the metrics that compare samples one by one and, without statistics, for the others.
    statistics: a file of means and covariances, for the other metrics.
    features: the folder of the images' features, once :meth:`extract` has made them.
    """

    images: Images | None = None
    statistics: Path | None = None
    features: Path | None = None

    def check_counts(self, metrics: list[str], generated: int) -> None:
        """As :func:`iwin_dit.evaluation.metrics.check_counts`, but that statistics need not tell a count."""
        one_by_one, by_moments = split(metrics)
        real = None if self.images is None else len(self.images)
        check_counts(one_by_one, generated, real)
        check_counts(by_moments, generated, None if self.statistics else real)

    def check_fit(
        self, generated: Images, metrics: list[str], extractor: Extractor, device: torch.device
    ) -> None:
        """Sizes of images; of statistics, the number of features. Looks at one image, or draws it.

        Raises:
            DataError: where they do not fit.
        """
        if self.statistics is None and self.images is None:
            return
        first = generated.read(0, 1)
        if self.statistics is not None:
            found = extractor(first.to(device))
            known = read_statistics(self.statistics, split(metrics)[1], extractor)
            for layer, moments in known.moments.items():
                if (count := found[layer].shape[1]) != len(moments.mean):
                    raise DataError(
                        f"the reference's statistics are of {len(moments.mean)} features, {extractor.name} "
                        f"has {count}; take the extractor that they were made with"
                    )
        if self.images is not None:
            sides = [tuple(pixels.shape[2:]) for pixels in (first, self.images.read(0, 1))]
            if sides[0] != sides[1]:
                raise DataError(
                    f"the generated images have {sides[0]} pixels, the reference's have {sides[1]}; "
                    "take a reference of the same size, or crop its images with --size"
                )

    def extract(self, extractor: Extractor, batch_size: int, accelerator: Accelerator) -> None:
        """Makes the features of real images that are not in the cache, under a key of their content.

        Another evaluation that makes them now is waited for.
        """
        if self.images is None:
            return
        with reference_cache() as cache:
            self.features = folder = cache / features_key(self.images, extractor)

            def reserve() -> Any:
                folder.mkdir(parents=True, exist_ok=True)
                return hold(folder, wait=True)

            with together(accelerator, reserve) or contextlib.nullcontext():
                extract_features(self.images, extractor, folder, batch_size, accelerator, "reference")

    def describe(self) -> dict[str, Any] | None:
        """For the result."""
        counted = {} if self.images is None else {"images": len(self.images)}
        if self.statistics is not None:
            sha256 = files.fingerprint(self.statistics)["sha256"]
            return {"statistics": str(self.statistics), **counted, "sha256": sha256}
        return None if self.images is None else self.images.description | {"sha256": self.images.fingerprint}

    def read(self, metrics: list[str], extractor: Extractor) -> Features:
        """What the metrics need of it.

        Raises:
            DataError: where the file of statistics does not hold them.
        """
        one_by_one, by_moments = split(metrics)
        features = Features(())
        if self.images is not None:
            assert self.features is not None, "extract comes first"
            wanted = metrics if self.statistics is None else one_by_one
            features = read_features(self.features, len(self.images), wanted)
        if self.statistics is not None:
            features.moments = read_statistics(self.statistics, by_moments, extractor).moments
        return features


def split(metrics: list[str]) -> tuple[list[str], list[str]]:
    """Those that compare samples one by one, and those that compare moments."""
    one_by_one = [name for name in metrics if METRICS[name].every_sample]
    return one_by_one, [name for name in metrics if name not in one_by_one]


def open_reference(
    location: str | None, metrics: list[str], extractor: str, reading: Reading = AS_THEY_ARE
) -> Reference:
    """Images, clips, a file of statistics or one of both, as ADM's; neither where no metric needs one.

    Args:
        extractor: as ``--extractor`` names it; ``i3d:FILE`` takes clips.

    Raises:
        ConfigError: where a reference is needed and not given, or the cache of references cannot be written.
        DataError: where an image cannot be used, or statistics are given where images are needed.
    """
    needing = [name for name in metrics if METRICS[name].needs_reference]
    if location is None or not needing:
        if needing:
            raise ConfigError(f"{', '.join(needing)} compares with real images: give --reference")
        return Reference()
    path = Path(location)
    names = array_names(path) if path.suffix == ".npz" and path.is_file() else set()
    one_by_one, by_moments = split(needing)
    holds_images = "arr_0" in names
    stored = path.suffix == ".safetensors" or (
        STATISTICS["pool"][0] in names and bool(by_moments or not holds_images)
    )
    if stored and one_by_one and not holds_images:
        raise DataError(
            f"{path} holds statistics, {', '.join(one_by_one)} needs the images themselves; give a folder"
        )
    if stored and not one_by_one:
        return Reference(statistics=path)
    with reference_cache():
        pass  # made now: where it cannot be, that shows before images are drawn
    images = open_set(location, looks_at_clips(extractor), reading)
    return Reference(images, path if stored else None)


@contextlib.contextmanager
def reference_cache() -> Iterator[Path]:
    """The folder of the references' features, which is made.

    Raises:
        ConfigError: where it cannot be made or, in the context, written.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "iwin-dit" / "references"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        yield cache
    except OSError as error:
        if error.errno in FULL:
            raise
        raise ConfigError(
            f"features of the reference cannot be kept in {cache}: {error.strerror or error}; "
            "set XDG_CACHE_HOME to a folder that is yours"
        ) from None
