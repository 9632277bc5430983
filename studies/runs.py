"""Runs of the trainer in processes of their own, one after the other, and results that are computed once."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from iwin_dit.config.parse import parse_arguments
from iwin_dit.config.schema import Config
from iwin_dit.runtime import files, limits
from iwin_dit.runtime.errors import ConfigError, UserError
from iwin_dit.runtime.lock import hold
from iwin_dit.runtime.progress import progress

TRAINER = Path(__file__).parent.parent / "train_dit.py"
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Run:
    """A run of ``train_dit.py``.

    Args:
        recipe: its config's file.
        path: its directory.
        overrides: values by dotted key, such as ``{"train.max_steps": 20}``.
    """

    recipe: Path
    path: Path
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> list[str]:
        """Of the trainer."""
        given = {"output_dir": self.path} | self.overrides
        options = [word for key, value in given.items() for word in (f"--{key}", str(value))]
        return ["--config", str(self.recipe), *options]

    @cached_property
    def config(self) -> Config:
        """Raises ConfigError where it cannot work."""
        return parse_arguments(self.arguments, self.recipe)[0]

    @property
    def weights(self) -> Path:
        """Of the exported pipeline."""
        return self.path / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors"

    @property
    def output(self) -> Path:
        """What the trainer writes to the terminal."""
        return self.path.with_name(f"{self.path.name}.log")

    def log(self) -> list[dict[str, Any]]:
        """The lines of ``log.jsonl`` about steps; one that is being written is left out."""
        path = self.path / "log.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("}\n")]
        return [record for record in records if "images_per_second" in record]

    def step(self) -> int:
        """The last that was logged."""
        log = self.log()
        return log[-1]["step"] if log else 0

    def is_finished(self) -> bool:
        """Whether it is exported after ``train.max_steps`` of this very config.

        Raises:
            ConfigError: where it was trained further: it would have had more than the others.
        """
        recipe = self.path / "pipeline" / "recipe.json"
        if not recipe.is_file():
            return False
        trained, wanted = files.read_json(recipe, limits.JSON_BYTES), self.config
        if trained["step"] > wanted.train.max_steps:
            raise ConfigError(
                f"{self.path} was trained to step {trained['step']}, more than {wanted.train.max_steps}; "
                "take as many steps, or another folder for the runs"
            )
        return trained["step"] == wanted.train.max_steps and trained["config"] == wanted.to_dict()


def check_once(option: str, values: Sequence[Any]) -> None:
    """Raises ConfigError where a value is given twice: it would be one run, counted twice."""
    twice = [value for value in values if list(values).count(value) > 1]
    if twice:
        raise ConfigError(f"{option} has {twice[0]} twice; give each once")


def hold_runs(folder: Path) -> Any:
    """Keeps the runs for this process: see :func:`iwin_dit.runtime.lock.hold`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return hold(folder)
    except OSError as error:
        raise ConfigError(f"--runs {folder} cannot be written: {error.strerror or error}") from None


def runs_of(recipe: Path, seeds: Sequence[int], steps: int | None, folder: Path) -> list[Run]:
    """One run for each seed."""
    overrides = {} if steps is None else {"train.max_steps": steps}
    return [Run(recipe, folder / f"{recipe.stem}-seed-{seed}", {"seed": seed} | overrides) for seed in seeds]


def train_all(runs: Sequence[Run]) -> dict[Path, str]:
    """Trains what is not trained yet, with one bar over the steps of all runs.

    Ctrl-C and SIGTERM let the trainer save a checkpoint, from which the next call goes on.

    Returns:
        by the directory of the run, why its config cannot be trained here; the others go on.

    Raises:
        ConfigError: where a trainer fails otherwise, or see :meth:`Run.is_finished`.
    """
    failures: dict[Path, str] = {}
    todo, done = [], 0
    for run in runs:
        try:
            steps = run.config.train.max_steps
        except ConfigError as error:
            failures[run.path] = str(error)
            continue
        if run.is_finished():
            done += steps
        else:
            todo.append(run)
    total = done + sum(run.config.train.max_steps for run in todo)
    with progress(total=total, initial=done, unit="step", desc="runs", disable=not todo) as bar:
        for run in todo:
            bar.set_description(run.path.name)
            reason = _train(run, lambda step, done=done: bar.update(done + step - bar.n))
            done += run.config.train.max_steps
            bar.update(done - bar.n)
            if reason is None and not run.is_finished():
                reason = f"it stopped at step {run.step()}"
            if reason is not None:
                failures[run.path] = reason
    return failures


def _train(run: Run, report: Callable[[int], None]) -> str | None:
    """One run to its end; why it failed, if it did."""
    run.path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(TRAINER), *run.arguments]
    with open(run.output, "wb") as output:
        # in a session of its own: a Ctrl-C reaches it once, from here
        trainer = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        handler = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
        try:
            while trainer.poll() is None:
                try:
                    trainer.wait(POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    report(run.step())
        except BaseException:
            trainer.terminate()
            trainer.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, handler)
    if trainer.returncode == 0:
        return None
    errors = re.findall(r"^error: (.*)$", run.output.read_text(), re.MULTILINE)
    reason = errors[-1] if errors else f"the trainer ended with {trainer.returncode}, see {run.output}"
    if trainer.returncode == UserError.exit_code:
        return reason
    raise ConfigError(f"{run.path} could not be trained: {reason}")


def kept(path: Path, of: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``compute`` finds, from ``path`` where it was found before.

    Args:
        path: a JSON file.
        of: all that the result depends on, in JSON's types.
    """
    if path.is_file():
        stored = files.read_json(path, limits.JSON_BYTES)
        if stored["of"] == of:
            return stored["found"]
    found = compute()
    files.replace(path, files.to_json({"of": of, "found": found}))
    return found
