"""Sampling larger images than a model was trained on: ``python -m studies.transfer``.

Takes the runs of :mod:`studies.compare`, which are trained first where they are missing, and
draws at 1, 1.5 and 2 times the size that they were trained at, without any change; then trains each for a few
steps on digits of twice the size, and draws those again. Writes tables and a picture; what is trained and
judged is kept.

An Iwin window is a number of tokens per axis, so on a larger grid there are more groups; ``auto`` takes the
window that connects the larger grid, with the same weights.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from iwin_dit.build.loading import load_pipeline
from iwin_dit.config.schema import Config
from iwin_dit.data.digits import IMAGE_SIZE
from iwin_dit.layers.specs import MixerSpec
from iwin_dit.models.transformer import IwinDiTTransformer2DModel
from iwin_dit.pipelines.base import ClassConditionalPipeline
from iwin_dit.runtime import files
from iwin_dit.runtime.errors import ConfigError, DataError, run_script
from iwin_dit.runtime.processes import keep_freed_memory
from iwin_dit.runtime.progress import say
from iwin_dit.runtime.seeds import generator
from studies.compare import CONFIGS
from studies.compare_report import with_spread
from studies.digits_report import CLASSIFIER
from studies.judge import Judge, unguided
from studies.runs import TRAINER, Run, check_once, hold_runs, kept, runs_of, train_all

SIDES = IMAGE_SIZE, 3 * IMAGE_SIZE // 2, 2 * IMAGE_SIZE  # of the images, in pixels
PIXELS_PER_TOKEN = 4  # the autoencoder's factor, at a patch size of 1
SHOWN = (2, 3, 5, 8)  # digits of the picture
TUNED_EMA = 0.95  # the average forgets what it began with within the few steps


class Model(NamedTuple):
    """A row: a recipe of ``configs/compare``, and the window that it takes on larger grids, if another."""

    recipe: str
    window: str | None = None

    @property
    def name(self) -> str:
        return self.recipe if self.window is None else f"{self.recipe}, window {self.window}"


MODELS = (
    Model("iwin"),
    Model("iwin", "auto"),
    Model("global_no_positions"),
    Model("global_sincos"),
    Model("global_rope"),
    Model("swin"),
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    names = [model.recipe for model in MODELS]
    add("--models", nargs="+", default=list(dict.fromkeys(names)), help=f"({' '.join(dict.fromkeys(names))})")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    add("--steps", type=int, help="that the runs of the comparison were trained (the configs' max_steps)")
    add("--tuning-steps", type=int, default=80, help="at twice the size (80)")
    add("--num-images", type=int, default=300, help="samples of each model and size that are judged (300)")
    add("--classifier", default=CLASSIFIER, help=f"the run that FD (iwin) takes features of ({CLASSIFIER})")
    add("--out", type=Path, default=Path("docs/transfer.md"), help="the picture lies beside it")
    add("--compared", type=Path, default=Path("runs/compare"), help="the runs to begin with (runs/compare)")
    add(
        "--runs",
        type=Path,
        default=Path("runs/transfer"),
        help="folder of what is trained on (runs/transfer)",
    )
    arguments = parser.parse_args()
    unknown = [name for name in arguments.models if name not in names]
    if unknown:
        raise ConfigError(
            f"--models {unknown[0]} is unknown, expected some of {', '.join(dict.fromkeys(names))}"
        )
    check_once("--seeds", arguments.seeds)
    if arguments.tuning_steps < 1:
        raise ConfigError(f"--tuning-steps is {arguments.tuning_steps}, expected at least 1")
    files.check_writable(arguments.out, "--out", is_file=True)
    return arguments


def prepare_latents(data: Path, side: int) -> Path:
    """The training digits as latents of images of ``side x side``, beside ``data``; made where missing.

    Raises:
        DataError: where that fails.
    """
    out = data.with_name(f"{data.name}_{side}")
    if not (out / "index.json").is_file():
        command = [sys.executable, TRAINER.with_name("extract_latents.py"), "--images", data / "train"]
        command += ["--vae", data / "vae", "--size", side, "--workers", 0, "--out", out]
        ended = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        if ended.returncode:
            raise DataError(f"no latents of {side} px: {ended.stderr.strip().splitlines()[-1]}")
    return out


def tuned_run(model: Model, base: Run, data: Path, steps: int, folder: Path) -> Run:
    """That goes on from the trained ``base`` at twice the size, in a folder of these very weights."""
    name = base.path.name.replace(model.recipe, model.recipe + (f"-{model.window}" if model.window else ""))
    name += f"-from-{files.fingerprint(base.weights)['sha256'][:8]}"
    overrides: dict[str, Any] = {
        "seed": base.config.seed,
        "data.path": data,
        "data.prepare": "null",
        "model.init_from": base.path,
        "model.sample_size": 2 * base.config.model.sample_size,
        "ema.decays": f"[{TUNED_EMA}]",
        "train.max_steps": steps,
    }
    if model.window is not None:
        overrides["model.mixer.window_size"] = model.window
    return Run(base.recipe, folder / name, overrides)


def with_window(pipeline: ClassConditionalPipeline, window: str | None) -> ClassConditionalPipeline:
    """The same weights with another window; None for their own."""
    if window is not None:
        model = pipeline.transformer
        config = dict(model.config) | {"mixer": model.config.mixer | {"window_size": window}}
        other = IwinDiTTransformer2DModel.from_config(config)
        other.load_state_dict(model.state_dict())
        pipeline.register_modules(transformer=other.eval())
    return pipeline


def figures(run: Run, window: str | None, side: int, judge: Judge, folder: Path) -> dict[str, float]:
    """``fd`` and ``recognised`` of samples of ``side x side``; judged once for these weights and window."""
    tokens = window_tokens(run, window, side)
    of = {"weights": files.fingerprint(run.weights)["sha256"], "steps": run.config.sample.num_inference_steps}
    of |= judge.identity

    def compute() -> dict[str, float]:
        say(f"judging {run.path} at {side} px, windows of {tokens}")
        return judge.of_samples(with_window(load_pipeline(str(run.path)), window), run.config, side)

    folder.mkdir(parents=True, exist_ok=True)
    name = f"{run.path.parent.name}-{run.path.name}-{side}px-window-{tokens}.json"
    return kept(folder / name, of, compute)


def window_tokens(run: Run, window: str | None, side: int) -> int:
    """Tokens of a window along an axis, for images of ``side x side``; all of them where there are none."""
    spec, tokens = run.config.model.mixer, side // PIXELS_PER_TOKEN
    if not spec.reads("window_size"):
        return tokens
    return (spec if window is None else MixerSpec(spec.name, window)).window((tokens, tokens))[0]


def draw(run: Run, window: str | None, side: int) -> list[Image.Image]:
    """One image of each digit of the picture, without guidance."""
    pipeline = with_window(load_pipeline(str(run.path)), window)
    rng = [generator(0, "transfer", digit) for digit in SHOWN]
    return pipeline(list(SHOWN), generator=rng, **unguided(run.config, side)).images


def draw_picture(rows: dict[str, list[list[Image.Image]]], titles: Sequence[str], path: Path) -> None:
    """A row for each model: for each title its images, at one scale.

    Args:
        rows: by name, for each title images of one size.
    """
    scale, gap, font = 2, 4, ImageFont.load_default(size=16)
    widths = [sum(image.width * scale + gap for image in images) + 12 for images in next(iter(rows.values()))]
    height = max(image.height for row in rows.values() for images in row for image in images) * scale + gap
    margin, top = max(int(font.getlength(name)) for name in rows) + 20, 30
    picture = Image.new("RGB", (margin + sum(widths), top + height * len(rows)), "white")
    pen = ImageDraw.Draw(picture)
    for column, title in enumerate(titles):
        pen.text((margin + sum(widths[:column]), top // 2), title, fill="black", font=font, anchor="lm")
    for line, (name, row) in enumerate(rows.items()):
        y = top + line * height
        pen.text((8, y + height // 2), name, fill="black", font=font, anchor="lm")
        for column, images in enumerate(row):
            x = margin + sum(widths[:column])
            for image in images:
                size = (image.width * scale, image.height * scale)
                picture.paste(image.resize(size, Image.Resampling.NEAREST), (x, y + (height - size[1]) // 2))
                x += size[0] + gap
    picture.save(path)


PAGE = """# Larger images than a model was trained on

The models of [the comparison](compare.md), trained for {trained:,} steps on digits of {small} px, draw \
digits of {sides} px without any change; then each is trained for {steps} steps of {batch} images on digits \
of {large} px, and draws those again. {seeds}

FD (iwin) to {real} held-out digits of the same size, by halves of both with equally many of each digit, \
lower is better; the classifier `{classifier}` and the autoencoder are those of {small} px at every size:

{fd}

Recognised as their class by a support vector machine, %:

{recognised}

{images} samples of each, without guidance, from the same noise. Where a model has positions they go on \
beyond what training has seen. A window is a number of tokens, the same on every grid; *window auto*, of the \
same weights, is the smallest that divides the grid and, times the convolution's kernel, covers it.

![samples]({picture})

Made by

```bash
{command}
```
"""


def table(rows: dict[str, list[list[float]]], titles: Sequence[str], scale: float, digits: int) -> str:
    """Mean and standard deviation over seeds.

    Args:
        rows: by name, for each title one value per seed, or none.
    """
    lines = [f"| | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for name, cells in rows.items():
        shown = [with_spread(values, digits, scale) if values else "" for values in cells]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    arguments = parse_arguments()
    keep_freed_memory()
    models = [model for model in MODELS if model.recipe in arguments.models]
    bases = {
        model: runs_of(CONFIGS / f"{model.recipe}.yaml", arguments.seeds, arguments.steps, arguments.compared)
        for model in models
    }
    config = bases[models[0]][0].config
    data = Path(config.data.path)
    judge = Judge(data, arguments.classifier, arguments.num_images)
    held = [hold_runs(folder) for folder in {arguments.compared, arguments.runs}]  # noqa: F841  to the end
    begun = {run.path: run for runs in bases.values() for run in runs}  # rows may share them
    stop_at(train_all(list(begun.values())))
    larger = prepare_latents(data, SIDES[-1])
    tuned = {
        model: [tuned_run(model, run, larger, arguments.tuning_steps, arguments.runs) for run in runs]
        for model, runs in bases.items()
    }
    stop_at(train_all([run for runs in tuned.values() for run in runs]))

    titles = [f"{side} px" for side in SIDES]
    titles += [f"{SIDES[-1]} px after {arguments.tuning_steps} steps"]
    found = reference_rows(judge, load_pipeline(str(next(iter(begun)))).vae)
    pictures = {}
    for model in models:
        columns = [(bases[model], side) for side in SIDES] + [(tuned[model], SIDES[-1])]
        judged = partial(figures, window=model.window, judge=judge, folder=arguments.runs / "figures")
        found[model.name] = [[judged(run, side=side) for run in runs] for runs, side in columns]
        pictures[model.name] = [draw(runs[0], model.window, side) for runs, side in columns]

    out = arguments.out
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_picture(pictures, titles, out.with_suffix(".png"))
    page = text(found, titles, arguments, config, judge)
    files.replace(out, page.encode())
    say(f"{page}\nwritten to {out}")


def text(
    found: dict[str, list[list[dict[str, float]]]],
    titles: Sequence[str],
    arguments: argparse.Namespace,
    config: Config,
    judge: Judge,
) -> str:
    """The whole page.

    Args:
        found: by row, for each title the figures of each seed.
        config: of a model, for what all have in common.
    """
    tables = {}
    for key, scale, digits in (("fd", 1, 2), ("recognised", 100, 1)):
        rows = {name: [[f[key] for f in cell] for cell in cells] for name, cells in found.items()}
        tables[key] = table(rows, titles, scale, digits)
    count = len(arguments.seeds)
    return PAGE.format(
        small=SIDES[0],
        trained=config.train.max_steps,
        sides=", ".join(map(str, SIDES[:-1])) + f" and {SIDES[-1]}",
        large=SIDES[-1],
        steps=arguments.tuning_steps,
        batch=config.train.batch_images,
        seeds=f"{count} seeds: mean ± standard deviation." if count > 1 else "One seed: there is no spread.",
        real=len(judge.labels),
        classifier=judge.classifier,
        images=judge.num_images,
        picture=arguments.out.with_suffix(".png").name,
        command=shlex.join(["python", "-m", "studies.transfer", *sys.argv[1:]]),
        **tables,
    )


def reference_rows(judge: Judge, vae: Any) -> dict[str, list[list[dict[str, float]]]]:
    """Of real digits at each size, and of the same through the autoencoder."""
    return {
        "real digits": [[judge.of_real(side)] for side in SIDES] + [[]],
        "the same through the autoencoder": [[judge.of_reconstructions(vae, side)] for side in SIDES] + [[]],
    }


def stop_at(failures: dict[Path, str]) -> None:
    """Raises ConfigError for the first."""
    for path, reason in failures.items():
        raise ConfigError(f"{path} could not be trained: {reason}")


if __name__ == "__main__":
    run_script(main)
