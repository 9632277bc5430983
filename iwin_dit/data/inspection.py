"""Looking at latents of images or clips: their hashes, what they hold, and a few of them as pictures."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torchvision.utils import save_image

from iwin_dit.data.codec import decode, load_vae
from iwin_dit.data.latents import LatentDataset, channel_statistics, channel_sums, content_sha256
from iwin_dit.data.sources import identity_of
from iwin_dit.runtime import files
from iwin_dit.runtime.errors import DataError
from iwin_dit.runtime.progress import progress

FEWEST_VALUES = 64  # of a channel in a shard, before it is suspicious that all are one

SAID = ("frames", "frame_stride", "background", "ignored")  # of an index, where it has them


def verify(folder: Path) -> str:
    """Reads every shard again and compares it with the index: size, hash, finiteness, and over all shards the
    statistics. Returns how many images or clips there are, such as "1,500 images".

    Raises:
        DataError: naming the shards that are damaged or have a constant channel, and how to make them again.
    """
    dataset = LatentDataset(folder)
    damaged, sums = [], []
    for entry, shard in zip(
        progress(dataset.index["shards"], unit="shard", desc="verify"), dataset.shards, strict=True
    ):
        found = files.retry(partial(files.fingerprint, shard.path))["sha256"]
        latents = shard.all("latents").float()
        if found != entry.get("sha256", found) or not torch.isfinite(latents).all():
            damaged.append(entry["file"])
            continue
        values = latents.movedim(1, 0).flatten(1)  # (C, N h w)
        flat = (values.amin(1) == values.amax(1)) & (values.shape[1] >= FEWEST_VALUES)
        if flat.any() and "teacher" not in dataset.index:
            channel = int(flat.nonzero()[0])
            raise DataError(
                f"{shard.path}: all values of channel {channel} are {values[channel, 0]:.6g}; remove this "
                "file and run the extraction again; if they still are, take another autoencoder"
            )
        sums.append({"count": len(latents), "shape": latents.shape[1:], **channel_sums(latents)})
    if damaged:
        raise DataError(
            f"{len(damaged)} shards of {folder} are not what the index says: {', '.join(damaged[:10])}; "
            "remove these files and run the extraction again: it makes the missing shards only"
        )
    mean, std = channel_statistics(sums)
    for key, found in (("mean", mean), ("std", std)):
        for channel, (told, value) in enumerate(zip(dataset.index[key], found, strict=True)):
            if abs(told - value) > 1e-4 * std[channel] + 1e-12:
                raise DataError(
                    f"{folder / 'index.json'}: {key} of channel {channel} is {told:.6g}, that of the latents "
                    f"{value:.6g}; restore the index, or run the extraction again"
                )
    torch.bincount(dataset.labels)  # which are looked at when they are read
    return f"{len(dataset):,} {_what(dataset)}"


def verify_content(folder: Path, source: Any, location: str) -> int:
    """Reads every image of the source again and compares it with what the latents were made of.

    Args:
        location: what to call the source in an error.

    Returns:
        How many shards were compared by content; others, of clips or with broken images, by name, label and
        size alone.

    Raises:
        DataError: naming the shards that were made of other images.
    """
    index = LatentDataset(folder).index
    made_of = index.get("source") or {}
    size = made_of.get("shard_images")
    if type(size) is not int or size < 1:
        raise DataError(f"{folder} was extracted by an earlier version, which did not write down of what")
    now = identity_of(source)
    if any(now[key] != made_of.get(key) for key in ("images", "files_sha256")):
        raise DataError(
            f"{location} holds other images, by name, label or size, than {folder} was made of; "
            "restore them, or extract"
        )
    other, compared = [], 0
    for shard in progress(index["shards"], unit="shard", desc="contents"):
        if shard.get("content_sha256") is None:
            continue
        start = int(shard["file"].rpartition("shard")[2].partition(".")[0]) * size
        chosen = range(start, min(start + size, len(source)))
        found = content_sha256(hashlib.sha256(source.read(i)[0]).hexdigest() for i in chosen)
        compared += 1
        if found != shard["content_sha256"]:
            other.append(shard["file"])
    if other:
        raise DataError(
            f"{len(other)} shards of {folder} were made of images whose content has changed: "
            f"{', '.join(other[:10])}; remove these files and run the extraction again"
        )
    return compared


def _what(dataset: LatentDataset) -> str:
    return "images" if len(dataset.latent_shape) == 3 else "clips"


def describe(folder: Path) -> str:
    """What a set of latents holds."""
    dataset = LatentDataset(folder)
    counts = torch.bincount(dataset.labels, minlength=len(dataset.class_names))
    shape = " x ".join(map(str, dataset.latent_shape))
    what = _what(dataset)
    lines = {
        what: f"{len(dataset):,} in {len(dataset.shards)} shards",
        "classes": f"{len(dataset.class_names):,}: {', '.join(dataset.class_names[:5])}"
        + (", ..." if len(dataset.class_names) > 5 else ""),
        f"{what} per class": f"{int(counts.min())} to {int(counts.max())}",
        "latents": f"{shape}, {dataset.shards[0].entries['latents'].dtype}".replace("torch.", "")
        + (", with the posterior's std" if dataset.has_posterior else ""),
        "image size": " x ".join(map(str, dataset.index.get("image_size", ["unknown"]))),
        **{key: str(dataset.index[key]) for key in SAID if dataset.index.get(key)},
        "VAE": dataset.index["vae"],
        "mean per channel": ", ".join(f"{m:.3f}" for m in dataset.mean[:8]),
        "std per channel": ", ".join(f"{s:.3f}" for s in dataset.std[:8]),
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def contact_sheet(folder: Path, path: Path) -> None:
    """Decodes 16 latents, evenly spread over the set, their mirror images below them.

    Of clips half as many, each a film strip, without mirror images.
    """
    dataset = LatentDataset(folder)
    is_clip = _what(dataset) == "clips"
    count = min(8 if is_clip else 16, len(dataset))
    chosen = torch.linspace(0, len(dataset) - 1, count).long().tolist()
    vae = load_vae(dataset.vae_path)
    shown = decode(vae, dataset.read_raw(chosen)).float()  # (N, 3, [T,] H, W)
    if is_clip:
        rows = shown.transpose(1, 2)  # (N, T, 3, H, W)
    else:
        rows = torch.stack([shown, decode(vae, dataset.read_raw(chosen, mirrored=True)).float()])
    save_image(rows.flatten(0, 1), path, nrow=rows.shape[1], normalize=True, value_range=(-1, 1))
