"""Where the name of an extractor becomes a network, and samples are held against their reference."""

from __future__ import annotations

import pkgutil
from pathlib import Path

import torch

from iwin_dit.build.classifier_network import load_classifier
from iwin_dit.config.metrics import EXTRACTORS
from iwin_dit.evaluation.extractors import Classifier
from iwin_dit.evaluation.images import Extractor, Images
from iwin_dit.evaluation.reference import Reference, split
from iwin_dit.evaluation.statistics import read_statistics
from iwin_dit.runtime.errors import DataError


def build_extractor(name: str, inception_weights: str | None) -> Extractor:
    """The network that ``--extractor`` names, on the CPU.

    Raises:
        CheckpointError: where its weights are not there, or of another network.
    """
    kind, _, source = name.partition(":")
    path = source or inception_weights
    return pkgutil.resolve_name(EXTRACTORS[kind].implementation)(None if path is None else Path(path))


def own_classifier(run: Path) -> Classifier:
    """The features of a classifier that ``train_classifier.py`` has trained."""
    loaded = load_classifier(str(run))
    return Classifier(loaded.model, loaded.image_size, loaded.mean, loaded.std, loaded.sha256)


def check_fit(
    generated: Images, reference: Reference, metrics: list[str], extractor: Extractor, device: torch.device
) -> None:
    """Sizes of images; of statistics, the number of features. Looks at one image, or draws it.

    Raises:
        DataError: where they do not fit.
    """
    first = generated.read(0, 1)
    if reference.statistics is not None:
        found = extractor(first.to(device))
        known = read_statistics(reference.statistics, split(metrics)[1], extractor)
        for layer, moments in known.moments.items():
            if (count := found[layer].shape[1]) != len(moments.mean):
                raise DataError(
                    f"the reference's statistics are of {len(moments.mean)} features, {extractor.name} has "
                    f"{count}; take the extractor that they were made with"
                )
    if reference.images is None:
        return
    sides = [tuple(images.shape[2:]) for images in (first, reference.images.read(0, 1))]
    if sides[0] != sides[1]:
        raise DataError(
            f"the generated images have {sides[0]} pixels, the reference's have {sides[1]}; "
            "take a reference of the same size, or crop its images with --size"
        )
