"""Checkpoints: directories that are complete or invisible.

``step-00010000/`` holds safetensors and JSON only, so that reading it runs no code, and a manifest with each
file's size and SHA-256. It is written under another name on the same file system, fsynced and renamed.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from iwin_dit.runtime import files
from iwin_dit.runtime.errors import CheckpointError

SCHEMA = 1
STEP = re.compile(r"step-(\d{8})")


def step_directories(root: Path) -> list[Path]:
    """The visible checkpoints below ``root``, oldest first."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if STEP.fullmatch(path.name) and path.is_dir())


def step_of(directory: Path) -> int:
    """The step in a checkpoint's name."""
    return int(STEP.fullmatch(directory.name).group(1))


def save_checkpoint(
    root: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any], keep: int
) -> Path:
    """Writes ``tensors[name]`` to ``name.safetensors``, ``state`` to ``state.json``; prunes all but ``keep``.

    The previous checkpoint is touched only after the new one is safely on disk.
    """
    final = root / f"step-{step:08d}"
    if not final.exists():
        temporary = root / f".tmp-{final.name}"
        if temporary.exists():  # left by a process that was killed
            files.remove_tree(temporary)
        temporary.mkdir(parents=True)
        written = {}
        for name, group in tensors.items():
            data = save({key: tensor.detach().cpu().contiguous() for key, tensor in group.items()})
            written[f"{name}.safetensors"] = files.write(temporary / f"{name}.safetensors", data)
        written["state.json"] = files.write(temporary / "state.json", files.to_json({"step": step, **state}))
        manifest = {"schema": SCHEMA, "step": step, "torch": torch.__version__, "files": written}
        files.write(temporary / "manifest.json", files.to_json(manifest))
        files.publish(temporary, final)
    prune(root, keep)
    return final


def prune(root: Path, keep: int) -> None:
    """Removes the oldest checkpoints; a failure is a warning, and the next save tries again."""
    for old in step_directories(root)[:-keep]:
        try:
            files.remove_tree(old)
        except OSError as error:
            warnings.warn(f"could not remove the old checkpoint {old}: {error}", stacklevel=2)


def verify(directory: Path) -> dict[str, Any]:
    """The manifest, after every size and hash in it has been compared with the disk.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    path = directory / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        schema, listed = manifest["schema"], dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not the manifest of a checkpoint: {error!r}") from error
    if schema != SCHEMA:
        raise CheckpointError(f"{path} has schema {schema}, this version reads {SCHEMA}")
    for name, expected in listed.items():
        file = directory / name
        if Path(name).name != name or not file.is_file():
            raise CheckpointError(f"{file}, which the manifest lists, does not exist")
        found = file.stat().st_size
        if found != expected["bytes"]:
            raise CheckpointError(f"{file} has {found} bytes, the manifest says {expected['bytes']}")
        if files.fingerprint(file)["sha256"] != expected["sha256"]:
            raise CheckpointError(
                f"{file} does not have the SHA-256 of the manifest: its content has changed"
            )
    return manifest


def newest(root: Path) -> Path | None:
    """The newest checkpoint, verified; None where there is none.

    Raises:
        CheckpointError: where the newest is damaged, naming the next good one. Nothing is skipped silently.
    """
    candidates = step_directories(root)[::-1]
    if not candidates:
        return None
    try:
        verify(candidates[0])
    except CheckpointError as error:
        good = next((older for older in candidates[1:] if _is_good(older)), None)
        advice = (
            f"to go on from {good.name}, remove or rename {candidates[0]}"
            if good
            else "no older one is intact"
        )
        raise CheckpointError(f"{error}; {advice}") from error
    return candidates[0]


def _is_good(directory: Path) -> bool:
    try:
        verify(directory)
    except CheckpointError:
        return False
    return True


def read_state(directory: Path) -> dict[str, Any]:
    """``state.json`` of a verified checkpoint."""
    return json.loads((directory / "state.json").read_bytes())


def read_tensors(directory: Path, name: str, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """``name.safetensors`` of a verified checkpoint, on the CPU.

    Args:
        like: names and shapes that it must have.

    Raises:
        CheckpointError: listing names that are missing or unexpected, other shapes, or non-finite values.
    """
    path = directory / f"{name}.safetensors"
    tensors = load_file(path)
    if like is not None:
        wrong = sorted(set(like) ^ set(tensors))
        wrong += [key for key in like if key in tensors and like[key].shape != tensors[key].shape]
        if wrong:
            raise CheckpointError(
                f"{path} does not fit the model at {_first(wrong)}; was it made by another config?"
            )
    not_finite = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if not_finite:
        raise CheckpointError(f"{path} has values that are not finite at {_first(not_finite)}")
    return tensors


def _first(names: list[str], count: int = 10) -> str:
    more = len(names) - count
    return ", ".join(names[:count]) + (f" and {more} more" if more > 0 else "")
