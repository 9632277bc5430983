"""What each lever of a recipe is worth: ``python -m studies.ablate``, or ``make ablate``.

Trains the same network with one lever after the other from every seed, with the same steps, images and noise,
and judges samples after half of the steps and at the end: without guidance, and with each kind of it at its
best scale. It writes a page, and beside it a JSON file of all figures, to which other levers are added later.
Stopped, the same command goes on: what is trained and judged is kept.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from iwin_dit.build.budget import state_bytes
from iwin_dit.build.loading import load_guide, load_pipeline
from iwin_dit.build.network import build_model
from iwin_dit.config.parse import load_config
from iwin_dit.data.digits import IMAGE_SIZE
from iwin_dit.runtime import files, limits
from iwin_dit.runtime.errors import ConfigError, run_script
from iwin_dit.runtime.processes import keep_freed_memory
from iwin_dit.runtime.progress import say
from studies.compare_report import ROUNDS, STEP_ROUNDS, with_spread
from studies.costs import draw_in_turn, machine, train_in_turn
from studies.digits_report import CLASSIFIER
from studies.judge import Judge, unguided
from studies.runs import Run, check_once, hold_runs, train_all

RECIPE = Path(__file__).parent.parent / "configs" / "compare" / "iwin.yaml"
LEVERS: dict[str, dict[str, Any]] = {  # changes of the recipe
    "baseline": {},
    "head inside": {"model.base_block": 2},
    "Muon": {"optimizer.name": "muon"},
    "value residual": {"model.value_residual": True},
    "wider labels": {"model.label_embedding_std": 0.5},
    "self-alignment": {"alignment.teacher": "self"},
    "EfficientNet-Lite0": {"alignment.teacher": "features:data/digits_features"},
    "QK-norm": {"model.qk_norm": True},
    "data": {"objective.prediction": "data"},
    "shift 2": {"objective.shift": 2.0},
    "dropped tokens": {"model.dense_blocks": [1, 1]},
    "linear decay": {"optimizer.schedule": "linear"},
    "together": {
        **{"model.value_residual": True, "model.base_block": 2, "model.label_embedding_std": 0.5},
        **{"optimizer.name": "muon", "optimizer.learning_rate": 6e-3},
    },
}
BASELINE = "baseline"
COMPARED = "head inside"  # the row whose samples are drawn with every kind of guidance
SCALES = 1.5, 2.5
KINDS: dict[str, list[dict[str, Any]]] = {  # of guidance, each with the scales that are tried
    "classifier-free guidance": [{"guidance_scale": scale} for scale in SCALES],
    "internal guidance": [{"internal_guidance": scale} for scale in (1.25, 1.5, 2.0)],
    "CFG-Zero*": [{"guidance": "cfg_zero_star", "guidance_scale": scale} for scale in SCALES],
    "adaptive projected guidance": [{"guidance": "apg", "guidance_scale": scale} for scale in SCALES],
    "internal and classifier-free": [
        {"internal_guidance": 1.25, "guidance_scale": scale} for scale in SCALES
    ],
    "autoguidance": [{"guide": "a sixth of the steps", "guidance_scale": scale} for scale in SCALES],
}
CLASSIFIER_FREE, INTERNAL = list(KINDS)[:2]
FD, GUIDE = "FD", "guide"


class Row(NamedTuple):
    """A lever, its runs, one for each seed, and the FD of each by :func:`called` options."""

    name: str
    runs: list[Run]
    found: list[dict[str, float]]

    @property
    def kinds(self) -> list[str]:
        """The kinds of guidance that its samples are drawn with."""
        if self.name == COMPARED:
            return list(KINDS)
        return [CLASSIFIER_FREE, INTERNAL] if self.runs[0].config.model.base_block else [CLASSIFIER_FREE]

    def over_seeds(self, key: str = FD) -> list[float]:
        return [found[key] for found in self.found if key in found]

    def best(self, kind: str) -> dict[str, Any]:
        """The options of a kind that have the least mean FD."""
        return min(KINDS[kind], key=lambda options: mean(self.over_seeds(called(options))))

    def at_best(self, kind: str) -> str:
        """The least mean FD, with its scale; nothing where it was not asked for."""
        if kind not in self.kinds:
            return ""
        options = self.best(kind)
        return f"{with_spread(self.over_seeds(called(options)), 2)} (at {list(options.values())[-1]:g})"


def called(options: dict[str, Any]) -> str:
    """How figures name these options: ``guidance_scale 1.5``, or ``FD`` for none."""
    return ", ".join(f"{key} {value}" for key, value in options.items()) or FD


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--levers", nargs="+", choices=LEVERS, default=list(LEVERS), help="(all)", metavar="NAME")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    add("--steps", type=int, default=600, help="of training, an even number (600)")
    add("--num-images", type=int, default=300, help="samples of each run that are judged (300)")
    add("--classifier", default=CLASSIFIER, help=f"the run that FD (iwin) takes features of ({CLASSIFIER})")
    add("--out", type=Path, default=Path("docs/ablate.md"), help="(docs/ablate.md)")
    add("--runs", type=Path, default=Path("runs/ablate"), help="folder of the runs (runs/ablate)")
    arguments = parser.parse_args()
    check_once("--seeds", arguments.seeds)
    check_once("--levers", arguments.levers)
    if arguments.steps < 2 or arguments.steps % 2:
        raise ConfigError(f"--steps is {arguments.steps}, expected an even number from 2 on")
    files.check_writable(arguments.out, "--out", is_file=True)
    return arguments


def runs_of(lever: str, seeds: Sequence[int], steps: int, folder: Path) -> list[Run]:
    """One run for each seed. Where the rate comes down, those of fewer steps are runs of their own."""
    given = {key: str(value).lower() for key, value in LEVERS[lever].items()} | {"train.max_steps": steps}
    name = lever.replace(" ", "_") + (f"-{steps}" if "optimizer.schedule" in given else "")
    return [Run(RECIPE, folder / f"{name}-seed-{seed}", {"seed": seed} | given) for seed in seeds]


class Figures:
    """What was found of runs, kept in a JSON file beside the page."""

    def __init__(self, path: Path, judge: Judge):
        self.path, self.judge = path, judge
        self.entries: dict[str, Any] = files.read_json(path, limits.JSON_BYTES) if path.exists() else {}

    def of(self, run: Run, asked: Sequence[dict[str, Any]]) -> dict[str, float] | None:
        """The figures of a run after so many steps; None where they are not known, or of something else."""
        entry = self.entries.get(self._name(run), {})
        return entry["found"] if entry.get("sha256") == self._identity(run, asked) else None

    def add(self, run: Run, asked: Sequence[dict[str, Any]], found: dict[str, float]) -> None:
        """Keeps them."""
        self.entries[self._name(run)] = {"sha256": self._identity(run, asked), "found": found}
        files.replace(self.path, files.to_json(self.entries))

    def _name(self, run: Run) -> str:
        return f"{run.path.name}, {run.config.train.max_steps} steps"

    def _identity(self, run: Run, asked: Sequence[dict[str, Any]]) -> str:
        """A hash of all that the figures depend on."""
        recipe = {key: value for key, value in run.config.to_dict().items() if key != "output_dir"}
        columns = [called(options) for options in ({}, *asked)]
        content = {"recipe": recipe, "columns": columns} | self.judge.identity
        return str(files.digest(files.to_json(content))["sha256"])


def judge_run(run: Run, judge: Judge, asked: Sequence[dict[str, Any]], guide: Run | None) -> dict[str, float]:
    """FD of the run's newest weights without guidance, and with each of these options.

    Args:
        guide: a run of fewer steps of the same recipe, whose weights guide where the options say so.

    Raises:
        ConfigError: where these are not the weights after so many steps.
    """
    if not run.is_finished():
        raise ConfigError(f"{run.path} is not the run that is judged; remove it, or give another --runs")
    say(f"judging {run.path}")
    pipeline = load_pipeline(str(run.path))
    found = {}
    for options in ({}, *asked):
        given = dict(options)
        if GUIDE in options and guide is not None:
            given[GUIDE] = load_guide(str(guide.path), pipeline)
        found[called(options)] = judge.of_samples(pipeline, run.config, IMAGE_SIZE, **given)["fd"]
    return found


def ablate(arguments: argparse.Namespace, steps: int, judge: Judge, figures: Figures) -> list[Row]:
    """Trains and judges each lever from each seed for so many steps, but for what is known.

    Raises:
        ConfigError: where one cannot be trained, or was trained further.
    """
    rows = [Row(name, runs_of(name, arguments.seeds, steps, arguments.runs), []) for name in arguments.levers]
    guides = guides_of(arguments)
    for row in rows:
        asked = [options for kind in row.kinds for options in KINDS[kind]] if steps == arguments.steps else []
        todo = [run for run in row.runs if figures.of(run, asked) is None]
        leading = [guide for run, guide in zip(row.runs, guides, strict=True) if run in todo and asked]
        train([*todo, *(leading if row.name == COMPARED else [])])
        for run, guide in zip(row.runs, guides, strict=True):
            if run in todo:
                figures.add(run, asked, judge_run(run, judge, asked, guide))
            row.found.append(figures.of(run, asked) or {})
    return rows


def guides_of(arguments: argparse.Namespace) -> list[Run]:
    """For each seed the guide of autoguidance: the compared recipe after a sixth of the steps."""
    steps = max(1, arguments.steps // 6)
    return runs_of(COMPARED, arguments.seeds, steps, arguments.runs / "guides")


def train(runs: Sequence[Run]) -> None:
    """Raises ConfigError where one of the runs cannot be trained."""
    if failures := train_all(runs):
        raise ConfigError(next(iter(failures.values())))


def state_mib(run: Run) -> float:
    """MiB of the optimiser's state, without that of a projector."""
    return state_bytes(build_model(run.config), run.config.optimizer) / 2**20


def steps_to(wanted: float, early: Row, late: Row) -> str:
    """After how many steps the mean FD is as wanted: by a line through its logarithms at half and the end."""
    (first, before), (last, after) = (
        (row.runs[0].config.train.max_steps, mean(row.over_seeds())) for row in (early, late)
    )
    if before <= wanted:
        return f"at most {first}"
    if after > wanted:
        return f"more than {last}"
    share = math.log(before / wanted) / math.log(before / after)
    return f"about {round(first + share * (last - first), -1):.0f}"


def table(half: Sequence[Row], rows: Sequence[Row]) -> str:
    """In the order of the final FD, Markdown."""
    seconds = train_in_turn({row.name: row.runs[0].config for row in rows}, STEP_ROUNDS)
    steps, early = rows[0].runs[0].config.train.max_steps, {row.name: row for row in half}
    columns = (
        *("lever", f"FD after {steps // 2} steps", f"FD after {steps}", "steps to the baseline's FD"),
        *(f"best {CLASSIFIER_FREE}", f"best {INTERNAL}", "ms a step", "state of the optimiser, MiB"),
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    baseline = next((mean(row.over_seeds()) for row in rows if row.name == BASELINE), None)
    for row in sorted(rows, key=lambda row: mean(row.over_seeds())):
        cells = [
            row.name,
            with_spread(early[row.name].over_seeds(), 2),
            with_spread(row.over_seeds(), 2),
            "" if baseline is None else steps_to(baseline, early[row.name], row),
        ]
        cells += [row.at_best(CLASSIFIER_FREE), row.at_best(INTERNAL)]
        cells += [f"{1e3 * seconds[row.name]:.0f}", f"{state_mib(row.runs[0]):.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def guidance_section(rows: Sequence[Row], guides: Sequence[Run]) -> str:
    """Every kind of guidance at its best scale, on the runs of one row; nothing without that row."""
    compared = next((row for row in rows if row.name == COMPARED), None)
    if compared is None:
        return ""
    run, guide = compared.runs[0], guides[0]
    best: dict[str, dict[str, Any]] = {"none": {}} | {kind: compared.best(kind) for kind in compared.kinds}
    train([guide, run])  # where their figures are of an earlier call
    pipeline = load_pipeline(str(run.path))
    draws = {}
    for kind, options in best.items():
        loaded = {GUIDE: load_guide(str(guide.path), pipeline)} if GUIDE in options else {}
        draws[kind] = partial(pipeline, **unguided(run.config, IMAGE_SIZE) | options | loaded)
    drawn = draw_in_turn(draws, ROUNDS)
    lines = ["| guidance | FD | options | ms an image |", "|---|---|---|---|"]
    for kind, options in best.items():
        found = with_spread(compared.over_seeds(called(options)), 2)
        text = called(options) if options else ""
        lines.append(f"| {kind} | {found} | {text} | {1e3 * drawn[kind][0]:.0f} |")
    return GUIDANCE_SECTION.format(
        compared=COMPARED, steps=guide.config.train.max_steps, draws=ROUNDS, table="\n".join(lines)
    )


def page(half: Sequence[Row], rows: Sequence[Row], guides: Sequence[Run], judge: Judge, command: str) -> str:
    """The tables, and how they were made."""
    config = load_config(RECIPE)
    changes = {
        row.name: [f"`{key} {str(value).lower()}`" for key, value in LEVERS[row.name].items()] for row in rows
    }
    return PAGE.format(
        guidance=guidance_section(rows, guides),
        depth=config.model.depth,
        width=config.model.width,
        steps=rows[0].runs[0].config.train.max_steps,
        batch=config.train.batch_images,
        rate=config.optimizer.learning_rate,
        seeds=len(rows[0].runs),
        table=table(half, rows),
        images=judge.num_images,
        sampling=config.sample.num_inference_steps,
        real=judge.of_real(IMAGE_SIZE)["fd"],
        rounds=STEP_ROUNDS,
        machine=machine(),
        changes="\n".join(f"* {name}: {', '.join(keys) or 'nothing'}" for name, keys in changes.items()),
        command=command,
    )


PAGE = """# What each lever is worth

One network, one budget: an Iwin transformer of {depth} blocks and width {width} on the latents of \
handwritten digits, trained for {steps} steps of {batch} images at the learning rate {rate:g}. Each row \
changes the recipe in what stands below. {seeds} seeds: mean ± standard deviation. Rows that \
differ by less than the spread are not told apart.

{table}

* FD (iwin): as in [the comparison of mixers](compare.md), of {images} samples in {sampling} steps; lower is \
better, the digits themselves have {real:.2f}.
* Steps to the baseline's FD: by a line through the logarithms of the two columns before. Where the learning \
rate comes down, the runs of half of the steps are runs of their own.
* Each kind of guidance is at the best of a few scales, over all seeds. Internal guidance takes one forward \
pass a step, the other takes two.
* ms a step: the median of {rounds} steps, with the rows in turn in one process. {machine}.

{guidance}## What the rows change in `configs/compare/iwin.yaml`

{changes}

Made by

```bash
{command}
```
"""


GUIDANCE_SECTION = """## Kinds of guidance

All of them act on the runs of *{compared}*, each at its best scale. The guide of autoguidance is the same \
network after {steps} steps. ms an image: the median of {draws} draws of ten images, in turn in one process.

{table}

"""


def main() -> None:
    arguments = parse_arguments()
    keep_freed_memory()
    held = hold_runs(arguments.runs)  # noqa: F841  to the end
    first = runs_of("baseline", [0], arguments.steps, arguments.runs)[0]
    judge = Judge(Path(first.config.data.path), arguments.classifier, arguments.num_images)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figures = Figures(arguments.out.with_suffix(".json"), judge)
    half = ablate(arguments, arguments.steps // 2, judge, figures)
    rows = ablate(arguments, arguments.steps, judge, figures)
    command = shlex.join(["python", "-m", "studies.ablate", *sys.argv[1:]])
    files.replace(arguments.out, page(half, rows, guides_of(arguments), judge, command).encode())
    say(f"{arguments.out} has the table")


if __name__ == "__main__":
    run_script(main)
