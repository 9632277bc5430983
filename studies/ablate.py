"""What each lever of a recipe is worth: ``python -m studies.ablate``, or ``make ablate``.

Trains the same network with one lever after the other from every seed, with the same steps, images and noise,
and judges samples after half of the steps and at the end: without guidance, and with each kind of it at its
best scale. It writes a table. Stopped, the same command goes on: what is trained and judged is kept.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from iwin_dit.build.budget import state_bytes
from iwin_dit.build.loading import load_pipeline
from iwin_dit.build.network import build_model
from iwin_dit.data.digits import IMAGE_SIZE
from iwin_dit.runtime import files
from iwin_dit.runtime.errors import ConfigError, run_script
from iwin_dit.runtime.processes import keep_freed_memory
from iwin_dit.runtime.progress import say
from studies.compare_report import STEP_ROUNDS, with_spread
from studies.costs import machine, train_in_turn
from studies.digits_report import CLASSIFIER
from studies.judge import Judge
from studies.runs import Run, check_once, hold_runs, kept, train_all

RECIPE = Path(__file__).parent.parent / "configs" / "compare" / "iwin.yaml"
LEVERS: dict[str, dict[str, Any]] = {  # changes of the recipe
    "baseline": {},
    "head inside": {"model.base_block": 2},
    "Muon": {"optimizer.name": "muon"},
    "Muon, head inside": {"optimizer.name": "muon", "model.base_block": 2},
    "self-alignment": {"alignment.teacher": "self"},
    "QK-norm": {"model.qk_norm": True},
    "shift 0.5": {"objective.shift": 0.5},
    "shift 2": {"objective.shift": 2.0},
    "data": {"objective.prediction": "data"},
}
SCALES = {"guidance_scale": (1.5, 2.0, 3.0), "internal_guidance": (1.25, 1.5, 2.0)}


class Row(NamedTuple):
    """A lever, its runs, one for each seed, and what was found of each: FD by :func:`column`."""

    name: str
    runs: list[Run]
    found: list[dict[str, float]]

    def over_seeds(self, key: str) -> list[float]:
        return [found[key] for found in self.found if key in found]

    def best(self, option: str) -> str:
        """At the scale of the least mean, with the scale."""
        by_scale = {scale: self.over_seeds(f"{option} {scale}") for scale in SCALES[option]}
        scale, values = min(by_scale.items(), key=lambda item: mean(item[1] or [float("inf")]))
        return f"{with_spread(values, 2)} (at {scale:g})" if values else ""


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
    """One run for each seed."""
    given = {key: str(value).lower() for key, value in LEVERS[lever].items()} | {"train.max_steps": steps}
    name = lever.replace(", ", "-").replace(" ", "_")
    return [Run(RECIPE, folder / f"{name}-seed-{seed}", {"seed": seed} | given) for seed in seeds]


def judge_run(run: Run, judge: Judge, scales: dict[str, Sequence[float]]) -> dict[str, float]:
    """FD of the run's newest weights without guidance, and with it at each scale; found once."""
    options = {f"{key} {scale}": {key: scale} for key in scales for scale in scales[key]}
    of = {"recipe": run.config.to_dict(), "columns": ["FD", *options]} | judge.identity

    def compute() -> dict[str, Any]:
        say(f"judging {run.path}")
        pipeline = load_pipeline(str(run.path))
        found = {"FD": judge.of_samples(pipeline, run.config, IMAGE_SIZE)}
        for name, option in options.items():
            found[name] = judge.of_samples(pipeline, run.config, IMAGE_SIZE, **option)
        return {name: scores["fd"] for name, scores in found.items()}

    return kept(result_of(run), of, compute)


def result_of(run: Run) -> Path:
    """Where the figures of a run after so many steps are kept."""
    return run.path / f"ablate-{run.config.train.max_steps}.json"


def ablate(levers: Sequence[str], seeds: Sequence[int], steps: int, folder: Path, judge: Judge) -> list[Row]:
    """Trains and judges each lever from each seed for so many steps.

    Raises:
        ConfigError: where one cannot be trained.
    """
    rows = [Row(lever, runs_of(lever, seeds, steps, folder), []) for lever in levers]
    todo = [run for row in rows for run in row.runs if not result_of(run).exists()]
    if failures := train_all(todo):  # half of the steps were trained further, once they are judged
        raise ConfigError(next(iter(failures.values())))
    return rows


def state_mib(run: Run) -> float:
    """MiB of the optimiser's state."""
    return state_bytes(build_model(run.config), run.config.optimizer) / 2**20


def table(half: Sequence[Row], rows: Sequence[Row]) -> str:
    """In the order of the final FD, Markdown."""
    seconds = train_in_turn({row.name: row.runs[0].config for row in rows}, STEP_ROUNDS)
    steps, early = rows[0].runs[0].config.train.max_steps, {row.name: row for row in half}
    columns = (
        *("lever", f"FD after {steps // 2} steps", f"FD after {steps}", "best with a guidance scale"),
        *("best with internal guidance", "ms a step", "state of the optimiser, MiB"),
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in sorted(rows, key=lambda row: mean(row.over_seeds("FD"))):
        cells = [
            row.name,
            with_spread(early[row.name].over_seeds("FD"), 2),
            with_spread(row.over_seeds("FD"), 2),
        ]
        cells += [row.best("guidance_scale"), row.best("internal_guidance")]
        cells += [f"{1e3 * seconds[row.name]:.0f}", f"{state_mib(row.runs[0]):.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page(half: Sequence[Row], rows: Sequence[Row], judge: Judge, command: str) -> str:
    """The table, and how it was made."""
    config = rows[0].runs[0].config
    changes = {row.name: [f"`{key} {value}`" for key, value in LEVERS[row.name].items()] for row in rows}
    return PAGE.format(
        depth=config.model.depth,
        width=config.model.width,
        steps=config.train.max_steps,
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
changes the recipe in what stands below the table. {seeds} seeds: mean ± standard deviation. Rows that \
differ by less than the spread are not told apart.

{table}

* FD (iwin): as in [the comparison of mixers](compare.md), of {images} samples in {sampling} steps; lower is \
better, the digits themselves have {real:.2f}.
* Each kind of guidance is at the best of a few scales, over all seeds. Internal guidance takes one forward \
pass a step, the other takes two.
* ms a step: the median of {rounds} steps, with the rows in turn in one process. {machine}.

What the rows change in `configs/compare/iwin.yaml`:

{changes}

Made by

```bash
{command}
```
"""


def main() -> None:
    arguments = parse_arguments()
    keep_freed_memory()
    held = hold_runs(arguments.runs)  # noqa: F841  to the end
    first = runs_of("baseline", [0], arguments.steps, arguments.runs)[0]
    judge = Judge(Path(first.config.data.path), arguments.classifier, arguments.num_images)
    stages = []
    for steps in (arguments.steps // 2, arguments.steps):
        rows = ablate(arguments.levers, arguments.seeds, steps, arguments.runs, judge)
        for row in rows:
            kinds = (
                SCALES
                if row.runs[0].config.model.base_block
                else {"guidance_scale": SCALES["guidance_scale"]}
            )
            scales = kinds if steps == arguments.steps else {}
            row.found.extend(judge_run(run, judge, scales) for run in row.runs)
        stages.append(rows)
    command = shlex.join(["python", "-m", "studies.ablate", *sys.argv[1:]])
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    files.replace(arguments.out, page(*stages, judge, command).encode())
    say(f"{arguments.out} has the table")


if __name__ == "__main__":
    run_script(main)
