"""Training speed alone and beside busy processes, by how long waiting threads spin before they sleep.

    python benchmarks/contention.py [--steps 100] [--rounds 3] [--neighbours 2]

Trains the quickstart in processes of its own, on as many cores as there are neighbours, all cells in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SPINS = 300_000  # libgomp's own number where nobody says another: about 3 ms
WAITING = {
    f"spin {SPINS:,} times, as libgomp does by itself": {"GOMP_SPINCOUNT": str(SPINS)},
    "spin 10,000 times, as the scripts make them": {},
    "sleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
}
WARM_UP, LOG_EVERY = 2, 10  # lines of the log that are left out, and steps of each
# Keeps a core busy, and ends with this process, however that ends.
NEIGHBOUR = """
import os
parent = os.getppid()
while os.getppid() == parent:
    sum(range(1_000_000))
"""


def images_per_second(steps: int, waiting: dict[str, str], cores: set[int]) -> float:
    """Of a run of the quickstart, without its first lines of the log."""
    ours = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in ours} | waiting
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [
                *(sys.executable, "train_dit.py", "--output_dir", f"{folder}/run"),
                *("--train.max_steps", str(steps), "--train.sample_every_steps", "0"),
                *("--train.log_every_steps", str(LOG_EVERY)),
                *("--data.path", str(ROOT / "data" / "digits"), "--train.save_every_steps", str(steps)),
            ],
            cwd=ROOT,
            env=environment,
            check=True,
            capture_output=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        lines = (Path(folder) / "run" / "log.jsonl").read_text().splitlines()
    speeds = [json.loads(line)["images_per_second"] for line in lines[WARM_UP:]]
    return statistics.harmonic_mean(speeds)  # lines are of equally many images


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--neighbours", type=int, default=2)
    options = parser.parse_args()
    if options.steps <= LOG_EVERY * WARM_UP:
        parser.error(f"--steps {options.steps} is all warm-up; give more than {LOG_EVERY * WARM_UP}")
    cores = set(sorted(os.sched_getaffinity(0))[: options.neighbours])
    found: dict[tuple[str, bool], list[float]] = {}
    for number in range(options.rounds):
        for crowded in (False, True):
            neighbours = [
                subprocess.Popen(
                    [sys.executable, "-c", NEIGHBOUR],
                    preexec_fn=lambda: os.sched_setaffinity(0, cores),
                )
                for _ in range(options.neighbours * crowded)
            ]
            try:
                for name, waiting in WAITING.items():
                    speed = images_per_second(options.steps, waiting, cores)
                    found.setdefault((name, crowded), []).append(speed)
                    print(f"round {number + 1}, {name}, {crowded=}: {speed:.1f}", file=sys.stderr, flush=True)
            finally:
                for neighbour in neighbours:
                    neighbour.kill()
                    neighbour.wait()
    print(
        f"\nmedian of {options.rounds} rounds, {len(cores)} cores, load {os.getloadavg()[0]:.1f} at the end\n"
    )
    print(f"| threads that wait | alone, images/s | beside {options.neighbours} busy processes | slower |")
    print("|---|---|---|---|")
    for name in WAITING:
        alone, beside = (statistics.median(found[name, crowded]) for crowded in (False, True))
        print(f"| {name} | {alone:.0f} | {beside:.0f} | **{alone / beside:.1f}** times |")


if __name__ == "__main__":
    main()
