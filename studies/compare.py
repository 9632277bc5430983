"""The comparison of token mixers: ``python -m studies.compare``, or ``make compare``.

Trains every config of ``configs/compare`` from every seed with the same steps, images and learning rate,
judges samples of each, and writes a table, a plot and a grid of samples. Stopped, the same command goes on:
what is trained and judged is kept.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iwin_dit.build.loading import load_pipeline
from iwin_dit.config.schema import Config
from iwin_dit.data.digits import IMAGE_SIZE
from iwin_dit.runtime import files
from iwin_dit.runtime.errors import ConfigError, run_script
from iwin_dit.runtime.processes import keep_freed_memory
from iwin_dit.runtime.progress import say
from studies.compare_report import ROUNDS, STEP_ROUNDS, Row, draw_plot, draw_samples, table, text
from studies.costs import costs, draw_in_turn, train_in_turn
from studies.digits_report import CLASSIFIER
from studies.judge import Judge, unguided
from studies.runs import Run, check_once, hold_runs, kept, runs_of, train_all

CONFIGS = Path(__file__).parent.parent / "configs" / "compare"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--configs", type=Path, nargs="+", default=sorted(CONFIGS.glob("*.yaml")), help="(configs/compare)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    add("--steps", type=int, help="of training (the configs' train.max_steps)")
    add("--num-images", type=int, default=300, help="samples of each run that are judged (300)")
    add("--classifier", default=CLASSIFIER, help=f"the run that FD (iwin) takes features of ({CLASSIFIER})")
    add(
        "--out",
        type=Path,
        default=Path("docs/compare.md"),
        help="the pictures lie beside it (docs/compare.md)",
    )
    add("--runs", type=Path, default=Path("runs/compare"), help="folder of the runs (runs/compare)")
    arguments = parser.parse_args()
    missing = [path for path in arguments.configs if not path.is_file()]
    if missing:
        raise ConfigError(
            f"--configs {missing[0]} does not exist; expected recipes such as {CONFIGS}/iwin.yaml"
        )
    check_once("--seeds", arguments.seeds)
    check_once("--configs", [path.stem for path in arguments.configs])
    files.check_writable(arguments.out, "--out", is_file=True)
    return arguments


def valid_configs(rows: Sequence[Row]) -> dict[Path, Config]:
    """By file, of those that can be trained here.

    Raises:
        ConfigError: where none can; the last one's.
    """
    configs, last = {}, None
    for row in rows:
        try:
            configs[row.recipe] = row.runs[0].config
        except ConfigError as error:
            last = error
    if not configs:
        raise last
    return configs


def check_budgets(configs: dict[Path, Config]) -> None:
    """Rows may differ in how the model mixes tokens, and tells their positions, alone.

    Raises:
        ConfigError: naming two files that differ elsewhere.
    """
    (first, expected), *others = configs.items()
    for path, config in others:
        sizes = [(c.model.shape, c.model.grid, c.model.in_channels) for c in (config, expected)]
        if sizes[0] != sizes[1]:
            raise ConfigError(
                f"{path} and {first} differ in the model's size: the comparison would not be equal"
            )
        for section in ("data", "objective", "optimizer", "ema", "train", "sample"):
            if getattr(config, section) != getattr(expected, section):
                raise ConfigError(
                    f"{path} and {first} differ in {section}: the comparison would not be equal"
                )


def scores(run: Run, judge: Judge) -> dict[str, float]:
    """``fd`` and ``recognised``; judged once for these weights."""
    steps = run.config.sample.num_inference_steps
    of = {"weights": files.fingerprint(run.weights)["sha256"], "steps": steps} | judge.identity

    def compute() -> dict[str, Any]:
        say(f"judging {run.path}")
        return judge.of_samples(load_pipeline(str(run.path)), run.config, IMAGE_SIZE)

    return kept(run.path / "compare.json", of, compute)


def command_line() -> str:
    """What makes the page, as one types it."""
    return shlex.join(["python", "-m", "studies.compare", *sys.argv[1:]])


def main() -> None:
    arguments = parse_arguments()
    keep_freed_memory()
    rows = [
        Row(path, runs_of(path, arguments.seeds, arguments.steps, arguments.runs))
        for path in arguments.configs
    ]
    runs = [run for row in rows for run in row.runs]
    configs = valid_configs(rows)
    check_budgets(configs)
    config = next(iter(configs.values()))
    judge = Judge(Path(config.data.path), arguments.classifier, arguments.num_images)

    held = hold_runs(arguments.runs)  # noqa: F841  to the end
    failures = train_all(runs)
    pipelines = {}
    for row in rows:
        row.failures = [failures[run.path] for run in row.runs if run.path in failures]
        trained = [run for run in row.runs if run.path not in failures]
        row.scores = [scores(run, judge) for run in trained]
        if trained:
            row.costs = costs(row.runs[0].config)
            pipelines[row.name] = load_pipeline(str(trained[0].path))
    trained = {row.name: row.runs[0].config for row in rows if row.scores}
    stepped = train_in_turn(trained, STEP_ROUNDS)
    drawn = draw_in_turn(pipelines, ROUNDS, **unguided(config, IMAGE_SIZE))
    for row in rows:
        row.step_seconds = stepped.get(row.name)
        row.sampling_seconds, row.images = drawn.get(row.name, (None, []))
    if not pipelines:
        raise ConfigError(f"nothing could be trained: {rows[0].failures[0]}")

    rows.sort(key=lambda row: row.mean("fd"))
    out = arguments.out
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_plot(rows, out.with_suffix(".png"))
    draw_samples(rows, out.with_name(f"{out.stem}_samples.png"))
    vae = next(iter(pipelines.values())).vae
    files.replace(out, text(rows, config, judge, vae, command_line(), out).encode())
    say(f"{table(rows)}\n\nwritten to {out}")


if __name__ == "__main__":
    run_script(main)
