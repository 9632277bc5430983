"""Checkpoints: directories that are complete or invisible.

``step-00010000/`` holds safetensors and JSON only, so that reading it runs no code, and a manifest with each
file's size and SHA-256. It is written under another name on the same file system, fsynced and renamed.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from iwin_dit.runtime import files, limits
from iwin_dit.runtime.errors import FULL, CheckpointError, DiskError, StorageError, listed

SCHEMA = 1
MANIFEST = "manifest.json"
STEP = re.compile(r"step-\d{8,}", re.ASCII)
FILE = re.compile(r"\w[\w.-]*\.(safetensors|json)", re.ASCII)  # a plain name: no folder, nothing hidden
ROOM = 1 << 20  # bytes of a checkpoint beside its tensors: headers, JSON, directories
FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


def step_directories(root: Path) -> list[Path]:
    """The visible checkpoints below ``root``, oldest first; a directory without a manifest is none."""
    if not root.is_dir():
        return []
    found = (path for path in root.iterdir() if STEP.fullmatch(path.name) and (path / MANIFEST).is_file())
    return sorted(found, key=step_of)


def step_of(directory: Path) -> int:
    """The step in a checkpoint's name."""
    return int(directory.name.removeprefix("step-"))


def save_checkpoint(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: dict[str, Any],
    keep: int | None,
) -> Path:
    """Writes ``tensors[name]`` to ``name.safetensors``, ``state`` to ``state.json``; prunes all but ``keep``.

    The previous checkpoint is touched only after the new one is safely on disk.

    Args:
        root: where the checkpoints lie; made where it is missing.
        keep: how many of the newest stay; None keeps all.

    Raises:
        DiskError: where the disk has too little room, or takes no more; nothing stays of the new checkpoint.
        StorageError: where the storage refuses to write, or reads back something else; nothing stays, either.
        CheckpointError: where a tensor is on the meta device and so has no values.
    """
    final = root / f"step-{step:08d}"
    if not (final / MANIFEST).is_file():
        _remove_leftovers(root)  # first of all: they may be what fills the disk
        _write(final, step, tensors, state)
    prune(root, keep)
    return final


def _write(
    final: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]
) -> None:
    if empty := [f"{name}/{key}" for name, group in tensors.items() for key in group if group[key].is_meta]:
        raise CheckpointError(
            f"{final} cannot be saved: there are no values, only the meta device, at {listed(empty)}; "
            "load the weights first"
        )
    needed = ROOM + sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
    free = files.free_bytes(final.parent)
    figures = f"it needs {files.in_units(needed)}, {files.in_units(free)} were free"
    advice = "make room on this disk and run the same command again"
    if free < needed:
        raise DiskError(f"{final} cannot be saved: {figures}; {advice}")
    temporary = final.with_name(f".tmp-{final.name}")
    try:
        temporary.mkdir(parents=True)
        written = {}
        for name, group in tensors.items():
            data = save({key: tensor.detach().cpu().contiguous() for key, tensor in group.items()})
            written[f"{name}.safetensors"] = files.write(temporary / f"{name}.safetensors", data)
            del data  # before the next group is made
        written["state.json"] = files.write(temporary / "state.json", _json({"step": step, **state}))
        manifest = {"schema": SCHEMA, "step": step, "torch": torch.__version__, "files": written}
        files.write(temporary / MANIFEST, _json(manifest))
        for path in temporary.iterdir():
            files.forget(path)
        try:
            verify(temporary)
        except CheckpointError as error:  # the storage gives something else than what was written
            raise StorageError(
                f"{final} was written, but reads back as something else: {error}; the checkpoint before it "
                "is untouched; look at this disk and at this machine's memory, and run the same command again"
            ) from error
        if final.exists():  # without a manifest: what a deletion by hand has left
            files.set_aside(final)
        files.publish(temporary, final)
    except (OSError, StorageError) as error:
        with contextlib.suppress(OSError):
            files.remove_tree(temporary)
        if isinstance(error, StorageError):
            raise
        told = f"{final} cannot be saved ({error.strerror or error}): {figures}"
        if error.errno in FULL:
            raise DiskError(f"{told}; {advice}") from error
        raise StorageError(
            f"{told}; look at its storage and permissions, and run the same command again"
        ) from error


def _json(value: dict[str, Any]) -> bytes:
    data = files.to_json(value)
    if len(data) > limits.JSON_BYTES:
        raise ValueError(f"the JSON of a checkpoint has {len(data)} bytes, readers take {limits.JSON_BYTES}")
    return data


def prune(root: Path, keep: int | None) -> None:
    """Removes the oldest checkpoints, each at once; a failure is a warning, and the next save tries again."""
    for old in step_directories(root)[:-keep] if keep is not None else []:
        with _warned(f"the old checkpoint {old}"):
            files.remove_tree(files.set_aside(old))  # hidden first: a kill leaves no visible half


def _remove_leftovers(root: Path) -> None:
    """What a process that was killed left of saving and pruning."""
    for path in list(root.iterdir()) if root.is_dir() else []:
        if path.name.startswith((".tmp-step-", ".old-step-")):
            with _warned(f"{path}, which a killed run left"):
                files.remove_tree(path)


@contextlib.contextmanager
def _warned(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        warnings.warn(f"could not remove {what}: {error}", stacklevel=4)


def verify(directory: Path) -> dict[str, Any]:
    """The manifest, after every size and hash in it has been compared with the disk.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    path = directory / MANIFEST
    try:
        manifest = files.retry(lambda: files.read_json(path, limits.JSON_BYTES))
        schema, written = manifest["schema"], {}
        if schema == SCHEMA:
            written = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not the manifest of a checkpoint: {error!r}") from error
    if schema != SCHEMA:
        raise CheckpointError(f"{path} has schema {schema}, this version reads {SCHEMA}")
    for name, (size, sha256) in written.items():
        if not FILE.fullmatch(name):
            raise CheckpointError(
                f"{path} lists {name!r}, expected plain names such as model.safetensors or state.json; "
                "it was not made by this program"
            )
        file = directory / name
        if not file.is_file():
            raise CheckpointError(f"{file}, which the manifest lists, does not exist")
        found = file.stat().st_size
        if found != size:
            raise CheckpointError(f"{file} has {found} bytes, the manifest says {size!s:.100}")
        if files.retry(partial(files.fingerprint, file))["sha256"] != sha256:
            raise CheckpointError(
                f"{file} does not have the SHA-256 of the manifest: its content has changed"
            )
    unlisted = {path.name for path in directory.glob("*.safetensors")} - set(written)
    if unlisted or "state.json" not in written:
        name = min(unlisted, default="state.json")
        raise CheckpointError(f"{path} does not list {name}, whose content so cannot be checked")
    return manifest


def newest(root: Path) -> Path | None:
    """The newest checkpoint, verified; None where there is none.

    Raises:
        CheckpointError: where the newest is damaged, naming the next good one. Nothing is skipped silently.
    """
    first, damage = None, None
    for directory in step_directories(root)[::-1]:
        try:
            verify(directory)
        except CheckpointError as error:
            first, damage = first or directory, damage or error
            continue
        if damage is None:
            return directory
        raise CheckpointError(
            f"{damage}; to go on from {directory.name}, remove or rename {first}"
        ) from damage
    if damage is not None:
        raise CheckpointError(f"{damage}; no older one is intact") from damage
    return None


def read_state(directory: Path) -> dict[str, Any]:
    """``state.json`` of a verified checkpoint.

    Raises:
        CheckpointError: where it is missing, too large, or is not of the step in the checkpoint's name.
    """
    path = directory / "state.json"
    try:
        state = files.retry(lambda: files.read_json(path, limits.JSON_BYTES))
        if type(state["step"]) is not int or state["step"] != step_of(directory):
            raise ValueError(f"its step is {state['step']!r}, expected {step_of(directory)}")
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not the state of a checkpoint: {error!r}") from error
    return state


def read_tensors(
    directory: Path,
    name: str,
    like: Mapping[str, Tensor] | None = None,
    any_precision: bool = False,
    beside: str | None = None,
) -> dict[str, Tensor]:
    """``name.safetensors`` of a verified checkpoint, on the CPU.

    Args:
        like: names, shapes and dtypes that it must have.
        any_precision: other floating dtypes than those of ``like`` will do, as they do for sampling.
        beside: how the names begin of what else it may hold, and is left out.

    Raises:
        CheckpointError: listing names that are missing or unexpected, other shapes or dtypes, or values that
            are not finite; or where it is no safetensors file.
    """
    path = directory / f"{name}.safetensors"
    try:
        tensors = files.retry(lambda: load_file(path))
    except (FileNotFoundError, PermissionError, SafetensorError) as error:
        why = files.why_unreadable(path, error)
        raise CheckpointError(f"{path} cannot be read, and only safetensors are accepted: {why}") from error
    if beside is not None:
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(beside)}
    if like is not None:
        wrong = sorted(set(like) ^ set(tensors))
        wrong += [key for key in like if key in tensors and like[key].shape != tensors[key].shape]
        if wrong:
            raise CheckpointError(
                f"{path} does not fit the model at {listed(wrong)}; was it made by another config?"
            )
        dtypes = {key: (tensor.dtype, like[key].dtype) for key, tensor in tensors.items()}
        other = [
            key
            for key, (found, wanted) in dtypes.items()
            if found != wanted and not (any_precision and {found, wanted} <= FLOATS)
        ]
        if other:
            found, wanted = (str(dtype).removeprefix("torch.") for dtype in dtypes[other[0]])
            raise CheckpointError(
                f"{path} is {found} at {listed(other)}, training needs {wanted}; "
                "a half-precision export can be sampled but not trained"
            )
    not_finite = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if not_finite:
        raise CheckpointError(f"{path} has values that are not finite at {listed(not_finite)}")
    return tensors
