"""Images or clips to latent shards, on any number of processes, resumable shard by shard.

Shard s holds the images ``[s n, (s + 1) n)`` of the source and is made by process ``s mod P``, in batches of
its own. So the bytes of a shard depend on source, VAE and settings alone, not on processes or interruption. A
finished shard leaves an entry in ``.entries``; together they make ``index.json``. The entry holds a hash of
its images' names, sizes and labels, so that latents of other images are not taken for theirs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from iwin_dit.data.codec import (
    encode_posterior,
    is_of_videos,
    latent_frames,
    spatial_factor,
    usable_dtype,
)
from iwin_dit.data.images import BadImage
from iwin_dit.data.latents import SHARD_NAME, Shard, write_index, write_shard
from iwin_dit.data.reading import Reader
from iwin_dit.data.video import ClipSpec
from iwin_dit.runtime import files, scratch
from iwin_dit.runtime.cpu import cores
from iwin_dit.runtime.errors import DataError, DiskError
from iwin_dit.runtime.progress import progress
from iwin_dit.runtime.seeds import generator

LOCAL_VAE = "vae"  # a VAE from a local folder or file is taken along, beside the latents


@dataclass(frozen=True)
class Settings:
    """What the bytes of the shards depend on, beside the source and the VAE.

    Args:
        size: height and width of the images, in pixels.
        crop: ``center`` is the ADM centre crop of the published FIDs; ``random`` a random one.
        batch_images: images, or clips, of one pass through the VAE.
        shard_images: images of a shard.
        precision: of the VAE's computation.
        store: dtype of the latents on disk.
        posterior: keep the posterior's standard deviations too.
        clip: frames and stride of clips; None for images.
        clips_per_video: clips of each video, from random places.
    """

    size: tuple[int, int]
    crop: str = "center"
    batch_images: int = 32
    shard_images: int = 10_000
    precision: str = "float32"
    store: str = "float32"
    posterior: bool = False
    clip: ClipSpec | None = None
    clips_per_video: int | None = None


class Batch(NamedTuple):
    """Images or clips ``(B, 3, [T,] H, W)`` uint8, labels ``(B,)``, and why others are left out."""

    images: Tensor
    labels: Tensor
    bad: list[str]


class Examples(Dataset):
    """What the reader gives; a bad image is its error's text. Runs in worker processes."""

    def __init__(self, reader: Reader):
        self.reader = reader

    def __getitem__(self, i: int) -> tuple[Tensor, int] | str:
        try:
            return self.reader.read(i, generator(0, "crop", i))
        except BadImage as error:
            return str(error)


def collate(items: list[tuple[Tensor, int] | str]) -> Batch:
    """Joins images of one size to a batch, which may be empty."""
    good = [item for item in items if not isinstance(item, str)]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0, dtype=torch.uint8)
    labels = torch.tensor([label for _, label in good], dtype=torch.int64)
    return Batch(images, labels, [item for item in items if isinstance(item, str)])


def extract(
    source: Any,
    vae: Any,
    out: Path,
    settings: Settings,
    description: dict[str, Any],
    num_workers: int | None = 0,
    max_bad_images: int = 0,
    process: int = 0,
    num_processes: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> list[str]:
    """Makes the shards that are missing, then the index. Returns what was wrong with the images left out.

    Args:
        source: of encoded images or videos, see :class:`iwin_dit.data.reading.Reader`.
        vae: a diffusers autoencoder on its device.
        description: ``vae`` and ``vae_sha256``, for the index.
        num_workers: processes that decode images. None: 4, or as many as there are cores.
        max_bad_images: more broken images than this are an error.
        wait: a barrier for all processes.

    Raises:
        DataError: for too many bad images, values that are not finite, a folder begun otherwise or by
            something else, or shards that were made of other images.
        DiskError: where the VAE cannot be saved beside the latents.
    """
    factor = spatial_factor(vae)
    if any(side % factor for side in settings.size):
        nearest = [max(1, round(side / factor)) * factor for side in settings.size]
        raise DataError(
            f"the size {settings.size} is no multiple of the VAE's factor {factor}; nearest: {nearest}"
        )
    if settings.clip is not None:
        latent_frames(vae, settings.clip.frames)  # there are such clips
        description = description | {"frames": settings.clip.frames, "frame_stride": settings.clip.stride}
    reader = Reader(source, settings.size, settings.crop, settings.clip, settings.clips_per_video or 1)
    description = description | {"image_size": list(settings.size), "class_names": source.class_names}
    numbers = range(-(-len(reader) // settings.shard_images))
    if process == 0:
        _begin(out, {**asdict(settings), **description, "images": len(reader)})
        _check_images(out, reader, settings, numbers)
        if description["vae"] == LOCAL_VAE and not (out / LOCAL_VAE).exists():
            _take_along(vae, out)
    wait()
    mine = [number for number in numbers[process::num_processes] if _entry(out, number) is None]
    hashes = {number: _images_sha256(reader, settings, number) for number in mine}  # before they are read
    if not is_of_videos(vae):
        vae.to(memory_format=torch.channels_last)
    if vae.dtype != (dtype := usable_dtype(vae, getattr(torch, settings.precision))):
        vae.to(dtype=dtype)
    workers = min(4, cores()) if num_workers is None else num_workers
    for number, shard, bad in _encode_shards(reader, vae, settings, mine, workers, main=process == 0):
        _check_bad([*bad, *_bad_so_far(out, numbers[process::num_processes])], max_bad_images, settings)
        entry = {"count": 0} if shard is None else write_shard(out, number, shard)
        entry |= {"bad": bad, "images_sha256": hashes[number]}
        files.replace(_entry_path(out, number), files.to_json(entry))
    wait()
    bad = _bad_so_far(out, numbers)
    _check_bad(bad, max_bad_images, settings)
    if process == 0:
        entries = [_entry(out, number) for number in numbers]
        write_index(out, [entry for entry in entries if entry["count"]], description)
    wait()
    return bad


def _begin(out: Path, begun: dict[str, Any]) -> None:
    """Writes down what is being made, or compares it with what was begun here before."""
    begun = json.loads(files.to_json(begun))
    path = out / ".entries" / "settings.json"
    if path.exists():
        before = json.loads(path.read_bytes())
        changed = [
            f"{key}: {before.get(key)!r} -> {begun[key]!r}" for key in begun if before.get(key) != begun[key]
        ]
        if changed:
            raise DataError(
                f"{out} was begun with other settings ({changed[0][:200]}); restore them, or take another "
                "folder"
            )
    else:
        if out.is_dir():
            found = [p.name for p in out.iterdir() if p.name == "index.json" or SHARD_NAME.fullmatch(p.name)]
            if found:  # published latents, or those of the quickstart: their shards have the same names
                raise DataError(
                    f"{out} holds latents that were not begun here ({min(found)}); take another folder"
                )
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, files.to_json(begun))


def _check_images(out: Path, reader: Reader, settings: Settings, numbers: range) -> None:
    """That finished shards are of the images as they are now. One that lacks bad images is made again."""
    for number in numbers:
        entry = _entry(out, number) or {}
        if "images_sha256" not in entry:  # not finished, or made by an older version, which did not ask
            continue
        if entry["images_sha256"] == _images_sha256(reader, settings, number):
            continue
        if not entry["bad"]:
            raise DataError(
                f"{out / entry['file']} was made of other {_what(settings)} than are there now, by name, "
                "size or label; restore them, or extract into a new folder"
            )
        _entry_path(out, number).unlink()


def _images_sha256(reader: Reader, settings: Settings, number: int) -> str:
    """Of a shard's images, by name, size and label: to read them would take as long as to encode them."""
    shard = _indices(reader, settings, number)
    chosen = range(shard[0] // reader.clips_per_video, shard[-1] // reader.clips_per_video + 1)
    text = "\0".join(reader.source.fingerprint(i) for i in chosen)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()  # names need not be UTF-8


def _indices(reader: Reader, settings: Settings, number: int) -> range:
    start = number * settings.shard_images
    return range(start, min(len(reader), start + settings.shard_images))


def _take_along(vae: Any, out: Path) -> None:
    try:
        with scratch.replacement(out / LOCAL_VAE) as new:
            vae.save_pretrained(new)
    except SafetensorError as error:  # its own kind, where other writers raise OSError
        raise DiskError(
            f"{out / LOCAL_VAE} cannot be saved ({error}); make room on this disk and run the same command "
            "again"
        ) from error


def _encode_shards(
    reader: Reader, vae: Any, settings: Settings, numbers: list[int], num_workers: int, main: bool
) -> Iterator[tuple[int, Shard | None, list[str]]]:
    """Each shard (None without an image) with its number and its bad images.

    They come from one stream of batches that never cross shards.
    """
    device, dtype = next(vae.parameters()).device, getattr(torch, settings.store)
    batches = []
    for number in numbers:
        indices, size = list(_indices(reader, settings, number)), settings.batch_images
        batches += [(number, indices[start : start + size]) for start in range(0, len(indices), size)]
    loader = DataLoader(
        Examples(reader),
        batch_sampler=[indices for _, indices in batches],
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
    )
    parts: list[Shard] = []
    bad: list[str] = []
    unit = "image" if settings.clip is None else "clip"
    total = sum(len(indices) for _, indices in batches)
    with progress(total=total, unit=unit, desc="extract", disable=not main) as bar:
        for position, batch in enumerate(loader):
            if len(batch.labels):
                images = batch.images.to(device, non_blocking=True).float() / 127.5 - 1
                mean, std = encode_posterior(vae, images)
                mean_flip, std_flip = encode_posterior(vae, images.flip(-1))
                stored = [tensor.to("cpu", dtype) for tensor in (mean, mean_flip)]
                stds = [t.to("cpu", dtype) if settings.posterior else None for t in (std, std_flip)]
                parts.append(Shard(*stored, batch.labels, *stds))
            bad += batch.bad
            bar.update(len(batches[position][1]))
            number = batches[position][0]
            if position + 1 == len(batches) or batches[position + 1][0] != number:
                columns = zip(*parts, strict=True)
                joined = [None if column[0] is None else torch.cat(column) for column in columns]
                yield number, Shard(*joined) if parts else None, bad
                parts, bad = [], []


def _entry_path(out: Path, number: int) -> Path:
    return out / ".entries" / f"shard{number:03d}.json"


def _entry(out: Path, number: int) -> dict[str, Any] | None:
    """The entry of a finished shard whose file is still there."""
    path = _entry_path(out, number)
    if not path.exists():
        return None
    entry = json.loads(path.read_bytes())
    file = out / entry.get("file", "")
    return entry if not entry["count"] or (file.is_file() and file.stat().st_size == entry["bytes"]) else None


def _bad_so_far(out: Path, numbers: Any) -> list[str]:
    return [bad for number in numbers if (entry := _entry(out, number)) for bad in entry["bad"]]


def _check_bad(bad: list[str], most: int, settings: Settings) -> None:
    if len(bad) > most:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise DataError(
            f"{len(bad)} bad {_what(settings)}, allowed are {most}: {'; '.join(bad[:5])}{more}; "
            "mend them or raise --max-bad-images; after a removal, extract into a new folder"
        )


def _what(settings: Settings) -> str:
    return "images" if settings.clip is None else "clips"
