"""A run directory: its lock, its config and its log.

```
runs/name/
  lock            held for the life of the process
  number          its place in the order in which the runs beside it began
  config.yaml     the resolved config; a run keeps the one it began with
  data.json       what the run was trained on
  log.jsonl       one line per logged step; damaged ones go to log.damaged.jsonl
  checkpoints/    step-00010000/, ...
  snapshots/      step-00010000/, ...: power-function averages for post-hoc reconstruction
  samples/        grids that training drew
  pipeline/       the model for diffusers, written at the end
```
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from iwin_dit.runtime import files, limits, strict_yaml
from iwin_dit.runtime.checkpoint import step_directories, step_of
from iwin_dit.runtime.errors import ConfigError
from iwin_dit.runtime.lock import hold
from iwin_dit.runtime.progress import say

TIMES = (
    "times_sha256"  # of the identity of data: a copy elsewhere differs in this alone, and is the same data
)
DAMAGED = "log.damaged.jsonl"  # lines of the log that nobody could read


class RunDirectory:
    """Opens or makes a run directory and holds its lock until the process ends.

    Args:
        path: the directory.
        config: the resolved config as nested dictionaries.
        may_change: dotted keys that a resumed run may set anew; any other difference is refused.
        data: what identifies the data; any difference is refused.
        defaults: values of keys that the config of an older version does not have.

    Raises:
        ConfigError: where it cannot be written, is held by another process, or was begun with another config.
    """

    def __init__(
        self,
        path: str | Path,
        config: dict[str, Any],
        may_change: frozenset[str],
        data: dict[str, Any],
        defaults: dict[str, Any] | None = None,
    ):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.snapshots = self.path / "snapshots"
        self.samples = self.path / "samples"
        self.pipeline = self.path / "pipeline"
        self.log_path = self.path / "log.jsonl"
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.samples.mkdir(exist_ok=True)
            self._lock = hold(self.path)
        except OSError as error:
            raise ConfigError(
                f"output_dir {self.path} cannot be written: {error.strerror or error}"
            ) from error
        self.config, self.data = config, data
        self._check_config(may_change, flatten(defaults or {}))
        self._check_data()

    def _check_config(self, may_change: frozenset[str], defaults: dict[str, Any]) -> None:
        if (self.path / "config.yaml").exists():
            before, now = (defaults | flatten(config) for config in (read_config(self.path), self.config))
            changed = [
                f"{key}: {before.get(key)!r:.200} -> {now.get(key)!r:.200}"
                for key in sorted({*before, *now})
                if before.get(key) != now.get(key) and key not in may_change
            ]
            if changed:
                raise ConfigError(
                    f"{self.path} was begun with another config ({'; '.join(changed)}); "
                    "restore these values, or take another output_dir"
                )

    def _check_data(self) -> None:
        changed = changed_data(self.path, self.data)
        if [*changed] == [TIMES]:
            say(
                f"the files of the data were written or copied since {self.path} was begun; their names, "
                "labels and sizes are the same, so it goes on"
            )
        elif changed:
            raise ConfigError(
                f"{self.path} was begun on other data ({next(iter(changed.values()))}); restore it, or take "
                "another output_dir"
            )

    def begin(self, step: int) -> None:
        """Writes the config and drops what was logged and kept after ``step``, which will be made again."""
        text = strict_yaml.dump(self.config)
        if not (self.path / "config.yaml").exists():
            others = (path.parent for path in self.path.absolute().parent.glob("*/config.yaml"))
            number = 1 + max(map(number_of, others), default=0)
            files.replace(self.path / "number", f"{number}\n".encode())
        files.replace(self.path / "config.yaml", text.encode())
        files.replace(self.path / "data.json", files.to_json(self.data))
        if self.log_path.exists():
            damaged = [line for line, found in self._log_lines() if found is None and line.endswith(b"\n")]
            if damaged:
                with open(self.path / DAMAGED, "ab") as file:
                    file.writelines(damaged)
                say(f"damaged lines of {self.log_path} are left out, and kept in {DAMAGED}: {len(damaged)}")
            kept = [record for record in self.read_log() if record["step"] <= step]
            files.replace(self.log_path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        for snapshot in step_directories(self.snapshots):
            if step_of(snapshot) > step:
                files.remove_tree(files.set_aside(snapshot))

    def log(self, record: dict[str, Any]) -> None:
        """Appends one line to ``log.jsonl``."""
        with open(self.log_path, "a") as file:
            file.write(json.dumps(record) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """The records of ``log.jsonl``; a line that is damaged, or that a kill cut short, is left out."""
        return [record for _, record in self._log_lines() if record is not None]

    def _log_lines(self) -> list[tuple[bytes, dict[str, Any] | None]]:
        lines = files.read_bytes(self.log_path).splitlines(keepends=True) if self.log_path.exists() else []
        return [(line, _record(line)) for line in lines]


def number_of(run: Path) -> int:
    """The place of a run in the order in which the runs of its folder began; 0 where none was written."""
    try:
        return int((run / "number").read_bytes()[:20])
    except (OSError, ValueError):
        return 0


def has_begun(folder: str | Path) -> bool:
    """Whether the run of this directory has a checkpoint, from which it goes on."""
    return bool(step_directories(Path(folder) / "checkpoints"))


def changed_data(run: Path, now: dict[str, Any]) -> dict[str, str]:
    """In what an identity of data differs from that which a run was begun on, by the key, before and now.

    What an older version did not write down is not compared.

    Raises:
        ConfigError: where the file that says it is damaged.
    """
    path = run / "data.json"
    try:
        before = files.read_object(path, limits.INDEX_BYTES) if path.exists() else {}
    except ValueError as error:
        raise ConfigError(
            f"{path} does not say what the run was trained on ({error}); restore the file. Without it, the "
            "run goes on, and nothing compares its data with those that it was begun on"
        ) from error
    return {
        key: f"{key}: {before[key]!r:.200} -> {now[key]!r:.200}"
        for key in now
        if key in before and before[key] != now[key]
    }


def read_config(run: Path) -> dict[str, Any]:
    """The config that a run was begun with.

    Raises:
        ConfigError: where it is missing or damaged, or is not keys and values.
    """
    path = run / "config.yaml"
    try:
        return strict_yaml.load(path)
    except ConfigError as error:
        raise ConfigError(
            f"{error}; restore the file. Without it, the run goes on by the recipe that you give, which has "
            "to be that of its beginning"
        ) from None


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _record(line: bytes) -> dict[str, Any] | None:
    """A line of the log; None where it is none of ours."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int or record["step"] < 0:
        return None
    fits = type(record.get("loss")) in (int, float, type(None)) and type(record.get("evaluated", 0)) is int
    return record if fits else None
