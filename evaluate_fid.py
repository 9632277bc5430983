"""Figures of generated images against real ones, with everything that is needed to repeat them.

``python evaluate_fid.py --generated RUN --reference FOLDER``; on several GPUs, ``accelerate launch`` it. The
same command again goes on after an interruption.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from iwin_dit.runtime import files
from iwin_dit.runtime.errors import ConfigError, run_script

METRICS = ("fid", "sfid", "kid", "is", "pr")
SWEEPS = {"guidance_scale": float, "steps": int}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--generated", help="a run, a pipeline or a hub id that draws; or a folder or .npz of images")
    add("--reference", help="a folder or .npz of real images, or an .npz of their mu and sigma")
    add("--metrics", default="fid", help=f"some of {','.join(METRICS)} (fid)")
    add("--num-images", type=int, default=50_000, help="to draw (50,000)")
    add("--plan", choices=("equal", "uniform"), default="equal", help="classes in turn, or at random (equal)")
    add("--seed", type=int, default=0, help="image k of a class depends on seed, class and k alone (0)")
    add("--steps", type=int, default=50, help="steps of the sampler (50)")
    add("--guidance-scale", type=float, default=1.0, help="(1: without)")
    low_high = dict(nargs=2, type=float, default=[0.0, 1.0], metavar=("LOW", "HIGH"))
    add("--guidance-interval", **low_high, help="times in which guidance acts; 1 is noise (0 1)")
    add("--guidance-channels", type=int, help="guide the first so many latent channels only (all)")
    add("--batch-size", type=int, default=64, help="images of one forward pass (64)")
    add("--inception-weights", help="torch-fidelity's file, for machines without a network")
    add("--out", default="evaluation.json", help="the result (evaluation.json)")
    add("--repeat", metavar="RESULT", help="run a result's evaluation again, and compare")
    add("--sweep", metavar="KEY=V1,V2", help=f"one evaluation per value of {' or '.join(SWEEPS)}, and a plot")
    arguments = parser.parse_args()
    if arguments.repeat is not None:
        return arguments
    if arguments.generated is None:
        raise ConfigError("--generated is missing; see --help")
    names = [name for name in arguments.metrics.split(",") if name]
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        raise ConfigError(
            f"--metrics has {', '.join(unknown) or 'nothing'}, expected some of {', '.join(METRICS)}"
        )
    for name in ("num_images", "batch_size", "steps"):
        if (value := getattr(arguments, name)) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}, expected at least 1")
    if not files.can_write(Path(arguments.out)):
        raise ConfigError(f"--out {arguments.out} cannot be written; take a path in a folder that is yours")
    return arguments


def run(arguments: argparse.Namespace) -> dict[str, float]:
    """One evaluation, its result written to ``--out``. Returns its figures."""
    from iwin_dit.build_evaluation import evaluate

    return evaluate(arguments)["figures"]


def show(rows: dict[str, dict[str, float]]) -> None:
    """Figures as a table, a row for each evaluation; by the main process alone."""
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    names = list(next(iter(rows.values())))
    print(f"| | {' | '.join(names)} |\n|---{'|---' * len(names)}|")
    for title, figures in rows.items():
        print(f"| {title} | {' | '.join(f'{figures[name]:.6g}' for name in names)} |")


def main() -> None:
    arguments = parse_arguments()
    if arguments.repeat is not None:
        stored = json.loads(Path(arguments.repeat).read_bytes())
        again = argparse.Namespace(**stored["arguments"] | {"out": f"{arguments.repeat}.again.json"})
        show({"stored": stored["figures"], "again": run(again)})
        return
    if arguments.sweep is None:
        show({arguments.generated: run(arguments)})
        return
    from iwin_dit.evaluation.sweep import draw_sweep, values_of

    key, values = values_of(arguments.sweep, SWEEPS)
    rows = {}
    for value in values:
        out = Path(arguments.out).with_suffix(f".{key}-{value}.json")
        rows[f"{key} {value}"] = run(argparse.Namespace(**vars(arguments) | {key: value, "out": str(out)}))
    show(rows)
    draw_sweep(key, values, list(rows.values()), Path(arguments.out).with_suffix(".png"))


if __name__ == "__main__":
    run_script(main)
