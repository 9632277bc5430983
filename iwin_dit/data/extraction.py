"""Images or clips to latent shards, on any number of processes, resumable shard by shard.

Shard s holds the images ``[s n, (s + 1) n)`` of the source and is made by process ``s mod P``, in batches of
its own. So the bytes of a shard depend on source, VAE and settings alone, not on processes or interruption. A
finished shard leaves an entry in ``.entries``; together they make ``index.json``. The entry holds a hash of
its images' names, sizes and labels, so that latents of other images are not taken for theirs, and one of
their contents, for ``--verify``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
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
from iwin_dit.data.entries import ENTRIES, check_is_ours, entry_path, read_entry, read_record, settings_path
from iwin_dit.data.images import BadImage
from iwin_dit.data.latents import Shard, write_index, write_shard
from iwin_dit.data.pixels import Pixels, Reader
from iwin_dit.data.provenance import content_sha256, source_of, stamps
from iwin_dit.data.video import ClipSpec
from iwin_dit.runtime import files, scratch
from iwin_dit.runtime.colours import background
from iwin_dit.runtime.cpu import cores
from iwin_dit.runtime.errors import DataError, DiskError, listed
from iwin_dit.runtime.lock import hold
from iwin_dit.runtime.progress import progress, say
from iwin_dit.runtime.seeds import generator
from iwin_dit.runtime.workers import worker_errors

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
        background: what shows through transparent pixels; None drops the transparency and writes shards
            without checksums, as earlier versions did.
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
    background: str | None = "white"


class Batch(NamedTuple):
    """Images or clips ``(B, 3, [T,] H, W)`` uint8, labels ``(B,)``, and why others are left out.

    transparent: how many of them had transparent pixels.
    hashes: of the files of all, in order; empty where it is not known.
    """

    images: Tensor
    labels: Tensor
    bad: list[str]
    transparent: int
    hashes: list[str]


class Examples(Dataset):
    """What the reader gives; a bad image is its error's text. Runs in worker processes."""

    def __init__(self, reader: Reader):
        self.reader = reader

    def __getitem__(self, i: int) -> Pixels | str:
        try:
            return self.reader.read(i, generator(0, "crop", i))
        except BadImage as error:
            return str(error)


def collate(items: list[Pixels | str]) -> Batch:
    """Joins images of one size to a batch, which may be empty."""
    good = [item for item in items if not isinstance(item, str)]
    images = torch.stack([item.pixels for item in good]) if good else torch.empty(0, dtype=torch.uint8)
    labels = torch.tensor([item.label for item in good], dtype=torch.int64)
    bad = [item for item in items if isinstance(item, str)]
    hashes = ["" if isinstance(item, str) else item.sha256 for item in items]
    return Batch(images, labels, bad, sum(item.is_transparent for item in good), hashes)


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
    timeout: float = 600.0,
) -> list[str]:
    """Makes the shards that are missing, then the index. Returns what was wrong with the images left out.

    Args:
        source: of encoded images or videos, see :class:`iwin_dit.data.pixels.Reader`.
        vae: a diffusers autoencoder on its device.
        description: ``vae`` and ``vae_sha256``, for the index.
        num_workers: processes that decode images. None: 4, or as many as there are cores.
        max_bad_images: more broken images than this are an error.
        wait: a barrier for all processes.
        timeout: seconds without a batch, after which a process that decodes images hangs.

    Raises:
        ConfigError: where another extraction writes into this folder.
        DataError: for too many bad images, values that are not finite, a folder begun otherwise or by
            something else, or shards that were made of other images.
        DiskError: where the VAE cannot be saved beside the latents.
        WorkerError: where a process that decodes images dies or hangs.
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
    description = description | {"image_size": list(settings.size), "class_names": source.class_names}
    with contextlib.ExitStack() as held:
        if process == 0:
            check_is_ours(out)
            (out / ENTRIES).mkdir(parents=True, exist_ok=True)
            held.enter_context(hold(out / ENTRIES))
            images = len(source) * (settings.clips_per_video or 1)
            _begin(out, settings, {**description, "images": images})
        wait()
        settings = replace(settings, background=read_record(settings_path(out)).get("background"))
        ground, clips = background(settings.background), settings.clips_per_video or 1
        reader = Reader(source, settings.size, settings.crop, settings.clip, clips, ground, hashed=True)
        numbers = range(-(-len(reader) // settings.shard_images))
        if process == 0:
            _check_images(out, reader, settings, numbers)
            if description["vae"] == LOCAL_VAE and not (out / LOCAL_VAE).exists():
                _take_along(vae, out)
        wait()
        _make_ready(vae, settings.precision)
        workers = min(4, cores()) if num_workers is None else num_workers
        mine = numbers[process::num_processes]
        with worker_errors("lower --workers", ", or raise --worker-timeout"):
            _make_shards(out, reader, vae, settings, mine, workers, max_bad_images, process == 0, timeout)
        wait()
        bad = _bad_so_far(out, numbers)
        _check_bad(bad, max_bad_images, settings)
        if process == 0:
            entries = [entry for number in numbers if (entry := read_entry(out, number))]
            if len(entries) < len(numbers):
                raise DataError(f"shards of {out} went away meanwhile; run the same command again")
            _say_transparent(entries, settings)
            if settings.background is not None:
                description["background"] = settings.background
            description["source"] = source_of(source, settings.shard_images)
            if source.ignored:  # no setting: what lies beside the images may change
                description["ignored"] = f"{len(source.ignored):,}: {listed(source.ignored, 5)}"
            write_index(out, [entry for entry in entries if entry["count"]], description)
        wait()
    return bad


def _make_ready(vae: Any, precision: str) -> None:
    """Gives the VAE the layout and the precision that it computes in."""
    if not is_of_videos(vae):
        vae.to(memory_format=torch.channels_last)
    if vae.dtype != (dtype := usable_dtype(vae, getattr(torch, precision))):
        vae.to(dtype=dtype)


def _make_shards(
    out: Path,
    reader: Reader,
    vae: Any,
    settings: Settings,
    mine: range,
    workers: int,
    max_bad_images: int,
    main: bool,
    timeout: float,
) -> None:
    """Those of this process that are missing, with their entries."""
    missing = [number for number in mine if read_entry(out, number) is None]
    found = {number: _stamps(reader, settings, number) for number in missing}  # before they are read
    for made in _encode_shards(reader, vae, settings, missing, workers, main, timeout):
        _check_bad([*made.bad, *_bad_so_far(out, mine)], max_bad_images, settings)
        entry: dict[str, Any] = {"count": 0}
        if made.shard is not None:
            entry = write_shard(out, made.number, made.shard, settings.background is not None)
        entry |= {"bad": made.bad, "transparent": made.transparent, **found[made.number]}
        entry["content_sha256"] = made.content_sha256
        files.replace(entry_path(out, made.number), files.to_json(entry))


def _say_transparent(entries: list[dict[str, Any]], settings: Settings) -> None:
    count = sum(entry.get("transparent", 0) for entry in entries)
    if count:
        say(
            f"{count:,} {_what(settings)} have transparent pixels, through which {settings.background} "
            "shows; another --background takes another folder"
        )


def _begin(out: Path, settings: Settings, description: dict[str, Any]) -> None:
    """Writes down what is being made, or compares it with what was begun here before."""
    path = settings_path(out)
    before = read_record(path) if path.exists() else None
    if before is not None and "background" not in before and settings.background is not None:
        settings = replace(settings, background=None)
        say(f"{out} was begun by an earlier version: transparent pixels keep their hidden colours, as there")
    begun = json.loads(files.to_json({**asdict(settings), **description}))
    if before is None:
        files.replace(path, files.to_json(begun))
        return
    changed = [
        f"{key}: {before.get(key)!r} -> {begun[key]!r}" for key in begun if before.get(key) != begun[key]
    ]
    if changed:
        raise DataError(
            f"{out} was begun with other settings ({changed[0][:200]}); restore them, or take another folder"
        )


def _check_images(out: Path, reader: Reader, settings: Settings, numbers: range) -> None:
    """That finished shards are of the images as they are now. One that lacks bad images is made again."""
    touched = 0
    for number in numbers:
        entry = read_entry(out, number) or {}
        if "images_sha256" not in entry:  # not finished, or made by an older version, which did not ask
            continue
        now = _stamps(reader, settings, number)
        if entry["images_sha256"] == now["images_sha256"]:
            touched += entry.get("times_sha256", now["times_sha256"]) != now["times_sha256"]
            continue
        if not entry["bad"]:
            raise DataError(
                f"{out / entry['file']} was made of other {_what(settings)} than are there now, by name, "
                "size or label; restore them, or extract into a new folder"
            )
        entry_path(out, number).unlink()
    if touched:
        say(
            f"the {_what(settings)} of {touched} finished shards were written or copied since; names, labels "
            f"and sizes are the same; --verify {out} with --images compares their contents"
        )


def _stamps(reader: Reader, settings: Settings, number: int) -> dict[str, str]:
    shard = _indices(reader, settings, number)
    first, last = shard[0] // reader.clips_per_video, shard[-1] // reader.clips_per_video
    return stamps(reader.source, range(first, last + 1))


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


class Made(NamedTuple):
    """A shard, None without an image; its bad images, how many were transparent, and a hash of all files."""

    number: int
    shard: Shard | None
    bad: list[str]
    transparent: int
    content_sha256: str | None


def _encode_shards(
    reader: Reader,
    vae: Any,
    settings: Settings,
    numbers: list[int],
    num_workers: int,
    main: bool,
    timeout: float,
) -> Iterator[Made]:
    """They come from one stream of batches that never cross shards."""
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
        timeout=timeout if num_workers else 0,
    )
    parts: list[Shard] = []
    bad: list[str] = []
    hashes: list[str] = []
    transparent = 0
    unit = "image" if settings.clip is None else "clip"
    total = sum(len(indices) for _, indices in batches)
    with progress(total=total, unit=unit, desc="extract", disable=not main) as bar:
        for position, batch in enumerate(loader):
            if len(batch.labels):
                images = batch.images.to(device, non_blocking=True).float() / 127.5 - 1
                mean, std = encode_posterior(vae, images)
                mean_flip, std_flip = encode_posterior(vae, images.flip(-1))
                latents, flipped = mean.to("cpu", dtype), mean_flip.to("cpu", dtype)
                stds = [t.to("cpu", dtype) for t in (std, std_flip) if settings.posterior]
                parts.append(Shard(latents, flipped, batch.labels, *stds))
            bad += batch.bad
            hashes += batch.hashes
            transparent += batch.transparent
            bar.update(len(batches[position][1]))
            number = batches[position][0]
            if position + 1 == len(batches) or batches[position + 1][0] != number:
                columns = zip(*parts, strict=True)  # the last ones, of deviations, may be None
                joined = [torch.cat(column) for column in columns if column[0] is not None]
                shard = Shard(*joined) if parts else None
                yield Made(number, shard, bad, transparent, content_sha256(hashes))
                parts, bad, hashes, transparent = [], [], [], 0


def _bad_so_far(out: Path, numbers: Any) -> list[str]:
    return [bad for number in numbers if (entry := read_entry(out, number)) for bad in entry["bad"]]


def _check_bad(bad: list[str], most: int, settings: Settings) -> None:
    if len(bad) > most:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise DataError(
            f"{len(bad)} bad {_what(settings)}, allowed are {most}: {'; '.join(bad[:5])}{more}; "
            "mend them or raise --max-bad-images; after a removal, extract into a new folder"
        )


def _what(settings: Settings) -> str:
    return "images" if settings.clip is None else "clips"
