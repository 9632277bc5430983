"""Images or clips to latent shards, on any number of processes, resumable shard by shard.

Shard s holds the images ``[s n, (s + 1) n)`` of the source and is made by process ``s mod P``, in batches of
its own. So the bytes of a shard depend on source, VAE and settings alone, not on processes or interruption. A
finished shard leaves an entry in ``.entries``; together they make ``index.json``. The entry holds a hash of
its images' names, sizes and labels, so that latents of other images are not taken for theirs, and one of
their contents, for ``--verify``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from iwin_dit.data.codec import encode_posterior, is_of_videos, latent_frames, spatial_factor, usable_dtype
from iwin_dit.data.examples import whole
from iwin_dit.data.images import BadImage
from iwin_dit.data.latents import SHARD_NAME, Shard, content_sha256, write_index, write_shard
from iwin_dit.data.pixels import Reader
from iwin_dit.data.sources import identity_of
from iwin_dit.data.video import ClipSpec
from iwin_dit.runtime import files, limits, scratch
from iwin_dit.runtime.colours import background
from iwin_dit.runtime.errors import DataError, DiskError, listed
from iwin_dit.runtime.lock import hold
from iwin_dit.runtime.processes import cores, worker_errors
from iwin_dit.runtime.progress import progress, say
from iwin_dit.runtime.seeds import generator

LOCAL_VAE = "vae"  # a VAE from a local folder or file is taken along, beside the latents
ENTRIES = ".entries"  # what an extraction keeps beside its shards: its settings, and an entry for each shard


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
    """``examples.__getitems__(indices) -> Batch``; runs in worker processes."""

    def __init__(self, reader: Reader):
        self.reader = reader

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        good, bad, hashes = [], [], []
        for i in indices:
            try:
                good.append(self.reader.read(i, generator(0, "crop", i)))
                hashes.append(good[-1].sha256)
            except BadImage as error:
                bad.append(str(error))
                hashes.append("")
        images = torch.stack([x.pixels for x in good]) if good else torch.empty(0, dtype=torch.uint8)
        labels = torch.tensor([x.label for x in good], dtype=torch.int64)
        return Batch(images, labels, bad, sum(x.is_transparent for x in good), hashes)


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
    work = Work(out, source, settings)
    with contextlib.ExitStack() as held:
        if process == 0:
            work.check_is_ours()
            (out / ENTRIES).mkdir(parents=True, exist_ok=True)
            held.enter_context(hold(out / ENTRIES))
            work.begin({**description, "images": len(source) * (settings.clips_per_video or 1)})
        wait()
        work.go_on()
        if process == 0:
            work.check_images()
            if description["vae"] == LOCAL_VAE and not (out / LOCAL_VAE).exists():
                try:
                    with scratch.replacement(out / LOCAL_VAE) as new:
                        vae.save_pretrained(new)
                except SafetensorError as error:  # its own kind, where other writers raise OSError
                    raise DiskError(
                        f"{out / LOCAL_VAE} cannot be saved ({error}); make room on this disk and run the "
                        "same command again"
                    ) from error
        wait()
        if not is_of_videos(vae):
            vae.to(memory_format=torch.channels_last)
        if vae.dtype != (dtype := usable_dtype(vae, getattr(torch, settings.precision))):
            vae.to(dtype=dtype)
        workers = min(4, cores()) if num_workers is None else num_workers
        with worker_errors("lower --workers", ", or raise --worker-timeout"):
            work.make_shards(vae, work.numbers[process::num_processes], workers, max_bad_images, timeout)
        wait()
        bad = work.bad(work.numbers)
        work.check_bad(bad, max_bad_images)
        if process == 0:
            work.finish(description)
        wait()
    return bad


class Work:
    """What an extraction has made so far, and makes, in its folder."""

    def __init__(self, out: Path, source: Any, settings: Settings):
        self.out, self.source, self.settings = out, source, settings
        self.what = "images" if settings.clip is None else "clips"
        self.settings_path = out / ENTRIES / "settings.json"

    def check_is_ours(self) -> None:
        """Published latents, or those of the quickstart, have shards of the same names: they are kept.

        Raises:
            DataError: where the folder holds latents that were not begun there.
        """
        if self.settings_path.exists() or not self.out.is_dir():
            return
        names = [path.name for path in self.out.iterdir()]
        if found := [name for name in names if name == "index.json" or SHARD_NAME.fullmatch(name)]:
            raise DataError(
                f"{self.out} holds latents that were not begun here ({min(found)}); take another folder"
            )

    def begin(self, description: dict[str, Any]) -> None:
        """Writes down what is being made, or compares it with what was begun here before."""
        before, settings = None, self.settings
        if self.settings_path.exists():
            before = _read_record(self.settings_path)
            if "background" not in before and settings.background is not None:
                settings = replace(settings, background=None)
                say(
                    f"{self.out} was begun by an earlier version: transparent pixels keep their hidden "
                    "colours, as there"
                )
        begun = json.loads(files.to_json({**asdict(settings), **description}))
        if before is None:
            files.replace(self.settings_path, files.to_json(begun))
        elif changed := [
            f"{key}: {before.get(key)!r} -> {begun[key]!r}" for key in begun if before.get(key) != begun[key]
        ]:
            raise DataError(
                f"{self.out} was begun with other settings ({changed[0][:200]}); restore them, or take "
                "another folder"
            )

    def go_on(self) -> None:
        """Takes the background of what was begun, which decides what is read."""
        ground = _read_record(self.settings_path).get("background")
        self.settings = settings = replace(self.settings, background=ground)
        clips = settings.clips_per_video or 1
        self.reader = Reader(
            self.source, settings.size, settings.crop, settings.clip, clips, background(ground), hashed=True
        )
        self.numbers = range(-(-len(self.reader) // settings.shard_images))

    def indices(self, number: int) -> range:
        """The images of a shard."""
        start = number * self.settings.shard_images
        return range(start, min(len(self.reader), start + self.settings.shard_images))

    def stamps(self, number: int) -> dict[str, str]:
        """Of the images of a shard, without reading them: a hash of names, labels and sizes, one of times."""
        shard, clips = self.indices(number), self.reader.clips_per_video
        found = [self.source.stamp(i) for i in range(shard[0] // clips, shard[-1] // clips + 1)]
        names = "\0".join(fingerprint for fingerprint, _ in found)
        times = "\0".join(str(modified) for _, modified in found)
        return {
            "images_sha256": hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest(),
            "times_sha256": hashlib.sha256(times.encode()).hexdigest(),
        }

    def entry_path(self, number: int) -> Path:
        return self.out / ENTRIES / f"shard{number:03d}.json"

    def entry(self, number: int) -> dict[str, Any] | None:
        """Of a finished shard whose file is still there.

        Raises:
            DataError: where it is damaged.
        """
        path = self.entry_path(number)
        if not path.exists():
            return None
        entry = _read_record(path)
        count, file, bad = entry.get("count"), entry.get("file", ""), entry.get("bad")
        if type(count) is not int or not isinstance(file, str) or not isinstance(bad, list):
            raise DataError(f"{path} is not the entry of a shard; remove it, and the shard is made again")
        path = self.out / file
        is_whole = not count or (path.is_file() and path.stat().st_size == entry.get("bytes"))
        return entry if is_whole else None

    def check_images(self) -> None:
        """That finished shards are of the images as they are now. One that lacks bad images is made again."""
        touched = 0
        for number in self.numbers:
            entry = self.entry(number) or {}
            if "images_sha256" not in entry:  # not finished, or made by an older version, which did not ask
                continue
            now = self.stamps(number)
            if entry["images_sha256"] == now["images_sha256"]:
                touched += entry.get("times_sha256", now["times_sha256"]) != now["times_sha256"]
            elif entry["bad"]:
                self.entry_path(number).unlink()
            else:
                raise DataError(
                    f"{self.out / entry['file']} was made of other {self.what} than are there now, by name, "
                    "size or label; restore them, or extract into a new folder"
                )
        if touched:
            say(
                f"the {self.what} of {touched} finished shards were written or copied since; names, labels "
                f"and sizes are the same; --verify {self.out} with --images compares their contents"
            )

    def make_shards(self, vae: Any, mine: range, workers: int, max_bad_images: int, timeout: float) -> None:
        """Those of this process that are missing, with their entries, from one stream of batches."""
        missing = [number for number in mine if self.entry(number) is None]
        stamps = {number: self.stamps(number) for number in missing}  # before they are read
        size, device = self.settings.batch_images, vae.device
        batches = {}  # none crosses shards
        for number in missing:
            indices = list(self.indices(number))
            batches[number] = [indices[start : start + size] for start in range(0, len(indices), size)]
        loader = DataLoader(
            Examples(self.reader),
            batch_sampler=[indices for shard in batches.values() for indices in shard],
            num_workers=workers,
            collate_fn=whole,
            pin_memory=device.type == "cuda",
            timeout=timeout if workers else 0,
        )
        stream, total = iter(loader), sum(len(self.indices(number)) for number in missing)
        with progress(total=total, unit=self.what[:-1], desc="extract", disable=mine.start != 0) as bar:
            for number, shard in batches.items():
                parts: list[Shard] = []
                entry: dict[str, Any] = {"bad": [], "transparent": 0, **stamps[number]}
                hashes: list[str] = []
                for indices, batch in zip(shard, stream, strict=False):
                    if len(batch.labels):
                        parts.append(self._encode(vae, batch, device))
                    entry["bad"] += batch.bad
                    entry["transparent"] += batch.transparent
                    hashes += batch.hashes
                    bar.update(len(indices))
                self.check_bad([*entry["bad"], *self.bad(mine)], max_bad_images)
                entry["content_sha256"] = content_sha256(hashes)
                written: dict[str, Any] = {"count": 0}
                if parts:
                    columns = zip(*parts, strict=True)  # the last ones, of deviations, may be None
                    joined = [torch.cat(column) for column in columns if column[0] is not None]
                    with_checksums = self.settings.background is not None
                    written = write_shard(self.out, number, Shard(*joined), with_checksums)
                files.replace(self.entry_path(number), files.to_json(written | entry))

    def _encode(self, vae: Any, batch: Batch, device: torch.device) -> Shard:
        images = batch.images.to(device, non_blocking=True).float() / 127.5 - 1
        dtype, posterior = getattr(torch, self.settings.store), self.settings.posterior
        pairs = encode_posterior(vae, images), encode_posterior(vae, images.flip(-1))
        latents, flipped, *stds = [pair[k].to("cpu", dtype) for k in range(1 + posterior) for pair in pairs]
        return Shard(latents, flipped, batch.labels, *stds)

    def bad(self, numbers: Iterable[int]) -> list[str]:
        """What was wrong with the images that these shards lack."""
        return [bad for number in numbers if (entry := self.entry(number)) for bad in entry["bad"]]

    def check_bad(self, bad: list[str], most: int) -> None:
        """Raises DataError where more images are bad than may be."""
        if len(bad) > most:
            more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
            raise DataError(
                f"{len(bad)} bad {self.what}, allowed are {most}: {'; '.join(bad[:5])}{more}; "
                "mend them or raise --max-bad-images; after a removal, extract into a new folder"
            )

    def finish(self, description: dict[str, Any]) -> None:
        """Merges the entries into the index."""
        entries = [entry for number in self.numbers if (entry := self.entry(number))]
        if len(entries) < len(self.numbers):
            raise DataError(f"shards of {self.out} went away meanwhile; run the same command again")
        if count := sum(entry.get("transparent", 0) for entry in entries):
            say(
                f"{count:,} {self.what} have transparent pixels, through which {self.settings.background} "
                "shows; another --background takes another folder"
            )
        if self.settings.background is not None:
            description["background"] = self.settings.background
        # the identity by which training knows these images too, and how they were divided
        identity = {key: value for key, value in identity_of(self.source).items() if key != "classes"}
        description["source"] = {**identity, "shard_images": self.settings.shard_images}
        if ignored := self.source.ignored:  # no setting: what lies beside the images may change
            description["ignored"] = f"{len(ignored):,}: {listed(ignored, 5)}"
        write_index(self.out, [entry for entry in entries if entry["count"]], description)


def _read_record(path: Path) -> dict[str, Any]:
    try:
        return files.read_object(path, limits.INDEX_BYTES)
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); remove it, or extract into another folder") from None
