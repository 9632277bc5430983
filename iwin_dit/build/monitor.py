"""Figures of a generator while it trains: what ``train.evaluate_every_steps`` asks for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from iwin_dit.build.evaluation import build_extractor, check_fit
from iwin_dit.build.pipeline import build_pipeline, model_of, sampling_options
from iwin_dit.config.metrics import chosen_metrics, name_figures
from iwin_dit.config.schema import Config
from iwin_dit.data.codec import weights_sha256
from iwin_dit.data.examples import Data
from iwin_dit.evaluation.drawing import drawer
from iwin_dit.evaluation.evaluate import features_key, read_features
from iwin_dit.evaluation.images import Reading, SampledImages, label_plan
from iwin_dit.evaluation.metrics import check_counts, compute
from iwin_dit.evaluation.reference import extract, extract_reference, on_main, open_reference
from iwin_dit.runtime import scratch
from iwin_dit.runtime.cpu import cores
from iwin_dit.runtime.processes import together
from iwin_dit.training.attention import any_attention
from iwin_dit.training.state import State, full_ema


class Stopped(Exception):
    """The run was asked to stop while images were drawn."""


def build_monitor(
    config: Config, dataset: Data, state: State, accelerator: Accelerator
) -> Callable[[int, Any], dict[str, float] | None]:
    """``evaluate(step, stop)``: the figures of the EMA, by all processes together; None where it was stopped.

    Features are kept in ``OUTPUT_DIR/.evaluation`` until the figures are there, so that an evaluation that
    was stopped goes on where it was. Weights and reference are read now: what is wrong shows before training.
    """
    options = config.evaluation
    metrics = chosen_metrics(options.extractor, options.metrics)
    with accelerator.local_main_process_first():
        extractor = build_extractor(options.extractor, options.inception_weights).to(accelerator.device)
    reading = Reading(workers=min(4, cores()))
    reference = on_main(
        accelerator, lambda: open_reference(options.reference, metrics, options.extractor, reading)
    )
    if reference is None:
        check_counts(metrics, options.num_images, None)
    else:
        reference.check_counts(metrics, options.num_images)
        extract_reference(reference, extractor, options.batch_images, accelerator)
    labels = label_plan("equal", options.num_images, config.model.num_classes, options.seed)
    folder = Path(config.output_dir) / ".evaluation"

    @any_attention
    def evaluate(step: int, stop: Any) -> dict[str, float] | None:
        if step == 0:  # noise
            return {}
        weights = {name: tensor.to(accelerator.device) for name, tensor in full_ema(state).items()}
        pipeline = build_pipeline(config, model_of(config, weights), dataset)
        pipeline.set_progress_bar_config(disable=True)
        draw = drawer(pipeline, sampling_options(config))

        def draw_unless_stopped(labels: list[int], generators: list[torch.Generator]) -> Tensor:
            if stop:
                raise Stopped
            return draw(labels, generators)

        recipe = sampling_options(config) | {"weights_sha256": weights_sha256(pipeline.transformer)}
        generated = SampledImages(draw_unless_stopped, labels, options.seed, recipe, options.batch_images)
        together(accelerator, partial(scratch.make, folder))
        own = folder / features_key(generated, extractor)
        stopped = torch.zeros((), device=accelerator.device)
        try:
            if reference is not None:
                check_fit(generated, reference, metrics, extractor, accelerator.device)
            extract(generated, extractor, own, options.batch_images, accelerator, "evaluate")
        except Stopped:
            stopped += 1
            accelerator.wait_for_everyone()  # the others do, after their last image
        if accelerator.reduce(stopped, "sum") > 0:
            return None

        def measure() -> dict[str, float]:
            other = None if reference is None else reference.read(metrics, extractor)
            features = read_features(own, len(generated), metrics)
            figures = compute(metrics, features, other, accelerator.device)
            scratch.remove(folder)
            return name_figures(figures, options.extractor.partition(":")[0])

        return on_main(accelerator, measure)

    return evaluate
