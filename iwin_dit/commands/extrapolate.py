"""Makes a trained model better without new data: ``iwin-dit extrapolate RUN --reference FOLDER``.

The model draws samples, a copy of it learns from them for a few steps, and the model moves away from what
the copy has become (Neon, arXiv 2510.03597). ``--out`` holds a pipeline for each weight, and the figure of
each. The same command again goes on after an interruption; other ``--weights`` are added.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iwin_dit.commands import evaluate
from iwin_dit.commands.drawing import add_drawing_options, settle
from iwin_dit.evaluation import rules
from iwin_dit.runtime import files, limits
from iwin_dit.runtime.errors import ConfigError, Parser

if TYPE_CHECKING:
    from iwin_dit.build.extrapolation import OwnSamples
    from iwin_dit.config.schema import Config
    from iwin_dit.pipelines.base import ClassConditionalPipeline

WEIGHTS = (0.5, 1.0, 1.5, 2.0)
SETTINGS = "settings.json"  # in the folder
NOT_SETTINGS = ("out", "weights", "batch_size")  # may be others when the command is given again
DRAWING = (*(name for name in rules.RECIPES if name not in ("ema", "ema_std")), "guide")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", help="a run of train_dit.py")
    add("--reference", required=True, help="a folder or .npz of real images, or statistics, as of evaluate")
    add("--extractor", default="inception", help="as of evaluate (inception)")
    add("--inception-weights", help="as of evaluate")
    add("--size", type=int, nargs="+", metavar="PIXELS", help="as of evaluate")
    add("--num-images", type=int, default=10_000, help="drawn and compared for each weight (10,000)")
    add("--num-samples", type=int, default=10_000, help="drawn for the copy to learn from (10,000)")
    add("--training-steps", type=int, default=200, help="of the copy (200)")
    add("--learning-rate", type=float, help="of the copy (that of the run)")
    add("--weights", type=float, nargs="+", default=WEIGHTS, help="how far to move away (0.5 1 1.5 2)")
    add("--batch-size", type=int, default=32, help="samples that are drawn together (32)")
    add("--seed", type=int, default=0, help="of the samples (0)")
    add("--out", type=Path, help="a folder (RUN-extrapolated)")
    add_drawing_options(parser)
    arguments = parser.parse_args()
    for name in ("num_samples", "training_steps", "batch_size"):
        if (value := getattr(arguments, name)) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}, expected at least 1")
    if not all(math.isfinite(weight) for weight in arguments.weights):
        raise ConfigError(f"--weights are {arguments.weights}, expected finite numbers")
    run = Path(arguments.run)
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run} is no run of train_dit.py; expected a folder with a config.yaml")
    arguments.out = arguments.out or run.with_name(f"{run.name}-extrapolated")
    files.check_writable(arguments.out, "--out", is_file=False)
    return arguments


def main() -> int:
    """Draws, trains, moves away and measures; the last line says which pipeline is best.

    Returns:
        the exit code: 143 where training was stopped, when the same command goes on.

    Raises:
        ConfigError, CheckpointError, DataError: for what does not fit, mostly before anything is drawn.
    """
    arguments = parse_arguments()
    evaluations = {weight: evaluation(arguments, weight) for weight in sorted({0.0, *arguments.weights})}
    import torch
    from accelerate import PartialState

    from iwin_dit.build.extrapolation import extrapolate
    from iwin_dit.build.loading import choose_sampler, load_pipeline, load_transformer
    from iwin_dit.config.parse import load_run
    from iwin_dit.runtime.lock import hold

    if PartialState().num_processes > 1:
        raise ConfigError(
            "extrapolate runs as one process; what it has made is measured on several by accelerate launch "
            f"-m iwin_dit.commands evaluate --generated {arguments.out}/weight-{arguments.weights[0]:g}"
        )
    check_reference(evaluations[0.0])
    config, out = load_run(Path(arguments.run)), arguments.out
    pipeline = load_pipeline(
        arguments.run, PartialState().device, ema_std=arguments.ema_std, ema=arguments.ema
    )
    check_is_ours(out)
    out.mkdir(parents=True, exist_ok=True)
    held = hold(out)  # noqa: F841  to the end
    begin(arguments, pipeline)
    export(pipeline, config, 0.0, arguments)
    choose_sampler(pipeline, arguments.sampler, arguments.shift)
    samples = own_samples(pipeline, config, arguments)
    weights = pipeline.transformer.cpu().state_dict()  # which leaves a GPU to the copy
    if code := train_copy(config, samples, arguments):
        return code
    after = load_transformer(str(out / "copy")).state_dict()
    pipeline = load_pipeline(str(out / "weight-0"))
    torch.set_float32_matmul_precision("highest")  # which training may have lowered
    figures = {}
    for weight, options in evaluations.items():
        pipeline.transformer.load_state_dict(extrapolate(weights, after, weight))
        export(pipeline, config, weight, arguments)
        figures[weight] = measured(options)
    rules.show({f"weight {weight:g}": row for weight, row in figures.items()})
    best = min(figures, key=lambda weight: next(iter(figures[weight].values())))
    print(f"best is weight {best:g}; try: python sample.py --checkpoint {out}/weight-{best:g} --class 0")
    return 0


def evaluation(arguments: argparse.Namespace, weight: float) -> argparse.Namespace:
    """The arguments of the evaluation of a weight, by one metric, a distance."""
    folder = arguments.out / f"weight-{weight:g}"
    command = ["--generated", str(folder), "--reference", arguments.reference, f"--out={folder}.json"]
    command += ["--extractor", arguments.extractor, f"--num-images={arguments.num_images}"]
    if arguments.inception_weights is not None:
        command += ["--inception-weights", arguments.inception_weights]
    if arguments.size is not None:
        command += ["--size", *map(str, arguments.size)]
    options = evaluate.parse_arguments(command)
    return argparse.Namespace(**vars(options) | {name: getattr(arguments, name) for name in DRAWING})


def check_reference(options: argparse.Namespace) -> None:
    """Looks at the reference before hours of work need it."""
    from iwin_dit.evaluation.images import Reading
    from iwin_dit.evaluation.reference import open_reference

    metrics = options.metrics.split(",")
    reading = Reading(options.size and (options.size[0], options.size[-1]))
    reference = open_reference(options.reference, metrics, options.extractor, reading)
    reference.check_counts(metrics, options.num_images)


def check_is_ours(out: Path) -> None:
    """Raises ConfigError where a folder holds what this command did not begin."""
    if out.is_dir() and not (out / SETTINGS).exists() and any(path.name != "lock" for path in out.iterdir()):
        raise ConfigError(f"--out {out} holds other files; give a new folder")


def begin(arguments: argparse.Namespace, pipeline: ClassConditionalPipeline) -> None:
    """Writes down what is made in ``--out``, or compares it with what was begun there.

    Raises:
        ConfigError: where it is not the same.
    """
    from iwin_dit.data.codec import weights_sha256

    path = arguments.out / SETTINGS
    given = {name: value for name, value in vars(arguments).items() if name not in NOT_SETTINGS}
    settings = json.loads(files.to_json(given | {"weights_sha256": weights_sha256(pipeline.transformer)}))
    if not path.exists():
        files.replace(path, files.to_json(settings))
        return
    before = files.read_json(path, limits.JSON_BYTES)
    changed = [name for name in settings if before.get(name) != settings[name]]
    if changed:
        name = changed[0]
        raise ConfigError(
            f"{arguments.out} was begun with another {name} ({before.get(name)!r}, now {settings[name]!r}); "
            "restore it, or give another --out"
        )


def own_samples(
    pipeline: ClassConditionalPipeline, config: Config, arguments: argparse.Namespace
) -> OwnSamples:
    """Samples of the model, as many of each class, drawn as its recipe and the command line say."""
    from iwin_dit.build.extrapolation import OwnSamples, draw_samples
    from iwin_dit.build.loading import load_guide
    from iwin_dit.evaluation.drawing import label_plan

    options = settle(argparse.Namespace(**vars(arguments)), config.sample)
    options["guide"] = None if arguments.guide is None else load_guide(arguments.guide, pipeline)
    labels = label_plan("equal", arguments.num_samples, config.model.num_classes, arguments.seed)
    folder = arguments.out / "samples"
    latents = draw_samples(pipeline, labels, arguments.seed, arguments.batch_size, folder, options)
    return OwnSamples(latents, labels, pipeline, str(arguments.out / "weight-0" / "vae"))


def train_copy(config: Config, samples: OwnSamples, arguments: argparse.Namespace) -> int:
    """Trains the copy, from the newest checkpoint on; returns the exit code."""
    from iwin_dit.build import trainer
    from iwin_dit.build.extrapolation import recipe_of_copy
    from iwin_dit.build.generator import Generator, TrainingData

    start, out = arguments.out / "weight-0", arguments.out / "copy"
    copy = recipe_of_copy(config, start, out, arguments.training_steps, arguments.learning_rate)
    return trainer.train(copy, lambda *_: TrainingData(samples, None), Generator)


def export(
    pipeline: ClassConditionalPipeline, config: Config, weight: float, arguments: argparse.Namespace
) -> None:
    """Writes the pipeline of a weight, once."""
    from iwin_dit.pipelines.base import export_pipeline

    folder = arguments.out / f"weight-{weight:g}"
    if not folder.exists():
        made = {"run": arguments.run, "weight": weight, "source": "arXiv 2510.03597"}
        export_pipeline(pipeline, folder, {"extrapolated": made, "config": config.to_dict()})


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """The figure of a pipeline, found once."""
    from iwin_dit.commands import measure

    path = Path(options.out)
    result = rules.read_result(path) if path.exists() else measure.evaluate(options)
    return result["figures"]
