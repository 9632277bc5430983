"""Looking at latents: their hashes, what they hold, and a few of them as pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from torchvision.utils import save_image

from iwin_dit.data.codec import decode, load_vae
from iwin_dit.data.latents import LatentDataset
from iwin_dit.runtime import files
from iwin_dit.runtime.errors import DataError
from iwin_dit.runtime.progress import progress


def verify(folder: Path) -> int:
    """Reads every shard again and compares sizes, hashes and finiteness with the index. Returns the images.

    Raises:
        DataError: naming the shards that are damaged, and how to make them again.
    """
    dataset = LatentDataset(folder)
    damaged = []
    for entry, shard in zip(
        progress(dataset.index["shards"], unit="shard", desc="verify"), dataset.shards, strict=True
    ):
        found = files.fingerprint(folder / entry["file"])["sha256"]
        if found != entry["sha256"] or not torch.isfinite(shard.all("latents")).all():
            damaged.append(entry["file"])
    if damaged:
        raise DataError(
            f"{len(damaged)} shards of {folder} are not what the index says: {', '.join(damaged[:10])}; "
            "remove these files and run the extraction again: it makes the missing shards only"
        )
    return len(dataset)


def describe(folder: Path) -> str:
    """What a set of latents holds."""
    dataset = LatentDataset(folder)
    counts = torch.bincount(dataset.labels, minlength=len(dataset.class_names))
    shape = " x ".join(map(str, dataset.latent_shape))
    lines = {
        "images": f"{len(dataset):,} in {len(dataset.shards)} shards",
        "classes": f"{len(dataset.class_names):,}: {', '.join(dataset.class_names[:5])}"
        + (", ..." if len(dataset.class_names) > 5 else ""),
        "images per class": f"{int(counts.min())} to {int(counts.max())}",
        "latents": f"{shape}, {dataset.shards[0].entries['latents'].dtype}".replace("torch.", "")
        + (", with the posterior's std" if dataset.has_posterior else ""),
        "image size": " x ".join(map(str, dataset.index.get("image_size", ["unknown"]))),
        "VAE": dataset.index["vae"],
        "mean per channel": ", ".join(f"{m:.3f}" for m in dataset.mean[:8]),
        "std per channel": ", ".join(f"{s:.3f}" for s in dataset.std[:8]),
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def contact_sheet(folder: Path, path: Path, count: int = 16) -> None:
    """Decodes a few latents, evenly spread over the set, their mirror images below them."""
    dataset = LatentDataset(folder)
    chosen = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().tolist()
    vae = load_vae(dataset.vae_path)
    images = [decode(vae, dataset.read_raw(chosen, mirrored)).float() for mirrored in (False, True)]
    save_image(torch.cat(images), path, nrow=len(chosen), normalize=True, value_range=(-1, 1))
