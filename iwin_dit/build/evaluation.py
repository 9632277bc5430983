"""Where the name of an extractor becomes a network; figures of a generator while it trains."""

from __future__ import annotations

import pkgutil
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from iwin_dit.build.classifier_network import load_classifier
from iwin_dit.build.pipeline import pipeline_of, sampling_options
from iwin_dit.config.metrics import EXTRACTORS, chosen_metrics, name_figures
from iwin_dit.config.schema import Config
from iwin_dit.data.codec import weights_sha256
from iwin_dit.data.examples import Data
from iwin_dit.evaluation.drawing import SampledImages, drawer, label_plan
from iwin_dit.evaluation.evaluate import extract_features, features_key, read_features
from iwin_dit.evaluation.extractors import Classifier
from iwin_dit.evaluation.images import Extractor, Reading
from iwin_dit.evaluation.metrics import compute
from iwin_dit.evaluation.reference import open_reference
from iwin_dit.runtime import scratch
from iwin_dit.runtime.processes import cores, on_main, together
from iwin_dit.runtime.signals import StopRequest
from iwin_dit.training.attention import any_attention
from iwin_dit.training.state import Run, full_ema


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


class Stopped(Exception):
    """The run was asked to stop while images were drawn."""


class Monitor:
    """Measures samples of the EMA while a run trains: what ``train.evaluate_every_steps`` asks for.

    All processes do it together.

    Features are kept in ``OUTPUT_DIR/.evaluation`` until the figures are there, so that an evaluation that
    was stopped goes on where it was. Weights and reference are read now: what is wrong shows before training.
    """

    def __init__(self, config: Config, dataset: Data, accelerator: Accelerator):
        options = config.evaluation
        self.config, self.dataset, self.accelerator = config, dataset, accelerator
        self.metrics = chosen_metrics(options.extractor, options.metrics)
        with accelerator.local_main_process_first():
            extractor = build_extractor(options.extractor, options.inception_weights)
        self.extractor = extractor.to(accelerator.device)
        reading = Reading(workers=min(4, cores()))
        self.reference = on_main(
            accelerator, lambda: open_reference(options.reference, self.metrics, options.extractor, reading)
        )
        self.reference.check_counts(self.metrics, options.num_images)
        self.reference.extract(self.extractor, options.batch_images, accelerator)
        self.labels = label_plan("equal", options.num_images, config.model.num_classes, options.seed)
        self.folder = Path(config.output_dir) / ".evaluation"

    @any_attention
    def evaluate(self, run: Run, step: int, stop: StopRequest) -> dict[str, float] | None:
        """The figures of a step, none of the first, which is noise; None where it was stopped."""
        if step == 0:
            return {}
        accelerator, extractor, options = self.accelerator, self.extractor, self.config.evaluation
        generated = self._samples(run, stop)
        together(accelerator, partial(scratch.make, self.folder))
        own = self.folder / features_key(generated, extractor)
        stopped = torch.zeros((), device=accelerator.device)
        try:
            self.reference.check_fit(generated, self.metrics, extractor, accelerator.device)
            extract_features(generated, extractor, own, options.batch_images, accelerator, "evaluate")
        except Stopped:
            stopped += 1
            accelerator.wait_for_everyone()  # the others do, after their last image
        if accelerator.reduce(stopped, "sum") > 0:
            return None

        def measure() -> dict[str, float]:
            features = read_features(own, len(generated), self.metrics)
            other = self.reference.read(self.metrics, extractor)
            figures = compute(self.metrics, features, other, accelerator.device)
            scratch.remove(self.folder)
            return name_figures(figures, options.extractor.partition(":")[0])

        return on_main(accelerator, measure)

    def _samples(self, run: Run, stop: StopRequest) -> SampledImages:
        """Samples of the EMA, drawn as they are asked for; once ``stop`` is true this raises Stopped."""
        options, recipe = self.config.evaluation, sampling_options(self.config)
        pipeline = pipeline_of(self.config, self.dataset, self.accelerator.device, full_ema(run.state))
        draw = drawer(pipeline, recipe)

        def draw_unless_stopped(labels: list[int], generators: list[torch.Generator]) -> Tensor:
            if stop:
                raise Stopped
            return draw(labels, generators)

        recipe = recipe | {"weights_sha256": weights_sha256(pipeline.transformer)}
        return SampledImages(draw_unless_stopped, self.labels, options.seed, recipe, options.batch_images)
