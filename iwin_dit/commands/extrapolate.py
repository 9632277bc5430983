"""Makes a trained model better without new data: ``iwin-dit extrapolate RUN --reference FOLDER``.

The model draws samples, a copy of it learns from them for a few steps, and the model moves away from what
the copy has become (Neon, arXiv 2510.03597). ``--out`` holds a pipeline for each scale, and the figure of
each. The same command again goes on after an interruption; it may have other ``--scales``.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iwin_dit.commands import evaluate
from iwin_dit.commands.drawing import FROM_RECIPE, add_drawing_options, settle
from iwin_dit.config.metrics import looks_at_clips
from iwin_dit.evaluation import rules
from iwin_dit.runtime import files, limits
from iwin_dit.runtime.errors import ConfigError, Parser

if TYPE_CHECKING:
    from iwin_dit.build.extrapolation import OwnSamples
    from iwin_dit.config.schema import Config
    from iwin_dit.pipelines.base import ClassConditionalPipeline

SCALES = (0.5, 1.0, 1.5, 2.0)
SETTINGS = "settings.json"  # in the folder
DRAWING = ("sampler", "shift", "guide", *FROM_RECIPE.values())  # options of samples, and of what is measured
SETS = ("num_samples", "training_steps", "learning_rate", "seed", *DRAWING)  # what samples and copy are of


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", type=Path, help="a run of train_dit.py")
    add("--reference", required=True, help="a folder or .npz of real images, or statistics, as of evaluate")
    add("--extractor", default="inception", help="as of evaluate (inception)")
    add("--inception-weights", help="as of evaluate")
    add("--size", type=int, nargs="+", metavar="PIXELS", help="as of evaluate")
    add("--num-images", type=int, default=10_000, help="drawn and compared for each scale (10,000)")
    add("--num-samples", type=int, default=10_000, help="drawn for the copy to learn from (10,000)")
    add("--training-steps", type=int, default=200, help="of the copy (200)")
    add("--learning-rate", type=float, help="of the copy (that of the run)")
    add("--scales", type=float, nargs="+", default=SCALES, help="how far to move away (0.5 1 1.5 2)")
    add("--batch-size", type=int, default=32, help="samples that are drawn together (32)")
    add("--seed", type=int, default=0, help="of the samples (0)")
    add("--out", type=Path, help="a folder (RUN-extrapolated)")
    add_drawing_options(parser)
    arguments = parser.parse_args()
    for name in ("num_samples", "training_steps", "batch_size"):
        if (value := getattr(arguments, name)) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}, expected at least 1")
    scales = sorted({0.0, *arguments.scales})
    if not all(map(math.isfinite, scales)) or len({f"{scale:g}" for scale in scales}) < len(scales):
        raise ConfigError(f"--scales are {arguments.scales}, expected finite numbers of up to six digits")
    arguments.scales, run = scales, arguments.run.resolve()
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{arguments.run} is no run of train_dit.py; expected a folder with a config.yaml")
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
    out = arguments.out
    evaluations = {scale: evaluation(arguments, scale) for scale in arguments.scales}
    import torch
    from accelerate import PartialState

    from iwin_dit.build.extrapolation import extrapolate, recipe_of_copy
    from iwin_dit.build.loading import choose_sampler, load_pipeline, load_transformer
    from iwin_dit.config.parse import load_run
    from iwin_dit.runtime.lock import hold

    if PartialState().num_processes > 1:
        raise ConfigError(
            "extrapolate runs as one process; what it has made is measured on several by accelerate launch "
            f"-m iwin_dit.commands evaluate --generated {out}/scale-1"
        )
    config = load_run(arguments.run)
    steps, rate = arguments.training_steps, arguments.learning_rate
    recipe = recipe_of_copy(config, out / "scale-0", out / "copy", steps, rate)
    averages = {"ema_std": arguments.ema_std, "ema": arguments.ema}
    pipeline = load_pipeline(str(arguments.run), PartialState().device, **averages)
    check_evaluation(evaluations[0.0], pipeline)
    check_is_ours(out)
    out.mkdir(parents=True, exist_ok=True)
    held = hold(out)  # noqa: F841  to the end
    begin(arguments, pipeline)
    export(pipeline, config, 0.0, arguments)
    choose_sampler(pipeline, arguments.sampler, arguments.shift)
    samples = own_samples(pipeline, config, arguments)
    model = pipeline.to("cpu").transformer.state_dict()  # which leaves a GPU to the copy
    if code := train_copy(recipe, samples):
        return code
    copy = load_transformer(str(out / "copy")).state_dict()
    pipeline = load_pipeline(str(out / "scale-0"))
    torch.set_float32_matmul_precision("highest")  # which training may have lowered
    figures = {}
    for scale, options in evaluations.items():
        pipeline.transformer.load_state_dict(extrapolate(model, copy, scale))
        export(pipeline, config, scale, arguments)
        figures[scale] = measured(options)
    rules.show({f"scale {scale:g}": row for scale, row in figures.items()})
    best = min(figures, key=lambda scale: next(iter(figures[scale].values())))
    print(f"best is scale {best:g}; try: python sample.py --checkpoint {out}/scale-{best:g} --class 0")
    return 0


def evaluation(arguments: argparse.Namespace, scale: float) -> argparse.Namespace:
    """The arguments of the evaluation of a scale, by one metric, a distance."""
    folder = arguments.out / f"scale-{scale:g}"
    command = ["--generated", str(folder), "--reference", arguments.reference, f"--out={folder}.json"]
    command += ["--extractor", arguments.extractor, f"--num-images={arguments.num_images}"]
    if arguments.inception_weights is not None:
        command += ["--inception-weights", arguments.inception_weights]
    if arguments.size is not None:
        command += ["--size", *map(str, arguments.size)]
    options = evaluate.parse_arguments(command)
    return argparse.Namespace(**vars(options) | {name: getattr(arguments, name) for name in DRAWING})


def check_evaluation(options: argparse.Namespace, pipeline: ClassConditionalPipeline) -> None:
    """Looks at the reference and at the extractor's weights before hours of work need them.

    Raises:
        ConfigError, DataError, CheckpointError: where one of them is not there, or does not fit the model.
    """
    from iwin_dit.build.evaluation import build_extractor
    from iwin_dit.evaluation.images import Reading
    from iwin_dit.evaluation.reference import open_reference

    draws_clips = pipeline.transformer.rank == 3
    if draws_clips != looks_at_clips(options.extractor):
        what = "clips, which i3d:FILE alone compares" if draws_clips else "images, and i3d compares clips"
        raise ConfigError(f"the run draws {what}; take another --extractor")
    metrics = options.metrics.split(",")
    reading = Reading(options.size and (options.size[0], options.size[-1]))
    reference = open_reference(options.reference, metrics, options.extractor, reading)
    reference.check_counts(metrics, options.num_images)
    build_extractor(options.extractor, options.inception_weights)


def check_is_ours(out: Path) -> None:
    """Raises ConfigError where a folder holds what this command did not begin."""
    if out.is_dir() and not (out / SETTINGS).exists() and any(path.name != "lock" for path in out.iterdir()):
        raise ConfigError(f"--out {out} holds other files; give a new folder")


def begin(arguments: argparse.Namespace, pipeline: ClassConditionalPipeline) -> None:
    """Writes down what samples are drawn in ``--out``, or compares it with those that are there.

    Settings without samples are of a call that was refused, and are replaced.

    Raises:
        ConfigError: where they are not the same.
    """
    from iwin_dit.data.codec import weights_sha256

    path = arguments.out / SETTINGS
    given = {name: getattr(arguments, name) for name in SETS}
    settings = json.loads(files.to_json(given | {"weights_sha256": weights_sha256(pipeline.transformer)}))
    try:
        before = files.read_object(path, limits.JSON_BYTES) if path.exists() else {}
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}); give another --out") from None
    has_samples = any((arguments.out / "samples").glob("*.safetensors"))
    changed = [name for name in settings if before.get(name) != settings[name]]
    if changed and has_samples:
        name = changed[0]
        raise ConfigError(
            f"{arguments.out} was begun with another {name} ({before.get(name)!r}, now {settings[name]!r}); "
            "restore it, or give another --out"
        )
    if changed:
        files.replace(path, files.to_json(settings))
        if (first := arguments.out / "scale-0").exists():
            files.remove_tree(files.set_aside(first))


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
    return OwnSamples(latents, labels, pipeline, str(arguments.out / "scale-0" / "vae"))


def train_copy(recipe: Config, samples: OwnSamples) -> int:
    """Trains the copy, from the newest checkpoint on; returns the exit code. One that is there stays."""
    from iwin_dit.build import trainer
    from iwin_dit.build.generator import Generator, TrainingData

    done = Path(recipe.output_dir) / "pipeline" / "recipe.json"
    if done.exists() and files.read_json(done, limits.JSON_BYTES).get("step") == recipe.train.max_steps:
        return 0
    return trainer.train(recipe, lambda *_: TrainingData(samples, None), Generator)


def export(
    pipeline: ClassConditionalPipeline, config: Config, scale: float, arguments: argparse.Namespace
) -> None:
    """Writes the pipeline of a scale, once."""
    from iwin_dit.pipelines.base import export_pipeline

    folder = arguments.out / f"scale-{scale:g}"
    if not folder.exists():
        made = {"run": str(arguments.run), "scale": scale, "source": "arXiv 2510.03597"}
        export_pipeline(pipeline, folder, {"extrapolated": made, "config": config.to_dict()})


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """The figure of a pipeline; found once for the same options."""
    from iwin_dit.commands import measure

    path, asked = Path(options.out), json.loads(files.to_json(vars(options)))
    if path.exists():
        stored = rules.read_result(path)
        if all(value is None or stored["arguments"].get(name) == value for name, value in asked.items()):
            return stored["figures"]
    return measure.evaluate(options)["figures"]
