"""Where the name of an extractor becomes a network."""

from __future__ import annotations

import pkgutil
from pathlib import Path

from iwin_dit.build.classifier_network import load_classifier
from iwin_dit.config.metrics import EXTRACTORS
from iwin_dit.evaluation.extractors import Classifier
from iwin_dit.evaluation.images import Extractor


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
