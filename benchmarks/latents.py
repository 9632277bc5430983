"""Reading latents in random order: ours, a numpy memory map, and opening the file for each item.

    python benchmarks/latents.py [--images 50000]

Latents of 4 x 32 x 32 in float16, batches of 256, from the page cache, the three in turn in one process. The
third is what LightningDiT's dataset does.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from safetensors import safe_open

from iwin_dit.data.latents import LatentDataset, Shard, write_latents

SHAPE, BATCH, SHARD = (4, 32, 32), 256, 10_000


def make(folder: Path, images: int) -> None:
    """Random latents in shards of 10,000."""
    generator = torch.Generator().manual_seed(0)

    def shards():
        for start in range(0, images, SHARD):
            latents = torch.randn(min(SHARD, images - start), *SHAPE, generator=generator).half()
            yield Shard(latents, -latents, torch.zeros(len(latents), dtype=torch.int64))

    write_latents(folder, shards(), {"vae": "none", "class_names": ["0"]})


def resident_mib() -> float:
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")
    )
    return int(line.split()[1]) / 1024


def readers(folder: Path) -> dict:
    dataset = LatentDataset(folder)
    paths = [shard.path for shard in dataset.shards]
    maps = [
        np.memmap(path, np.float16, "r", shard.entries["latents"].start, shard.entries["latents"].shape)
        for path, shard in zip(paths, dataset.shards, strict=True)
    ]

    def memory_map(indices):
        out = np.empty((len(indices), *SHAPE), np.float16)
        for number in np.unique(indices // SHARD):
            chosen = indices // SHARD == number
            out[chosen] = maps[number][indices[chosen] % SHARD]
        return torch.from_numpy(out).float()

    def open_each(indices):
        rows = []
        for index in indices:
            with safe_open(paths[index // SHARD], "pt") as file:
                row = int(index % SHARD)
                rows.append(file.get_slice("latents")[row : row + 1].float())
                file.get_slice("labels")[row : row + 1]
        return torch.cat(rows)

    return {"ours": dataset.read_raw, "numpy memory map": memory_map, "open for each item": open_each}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=50_000)
    options = parser.parse_args()
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), options.images)
        read = readers(Path(folder))
        order = np.random.default_rng(0).permutation(options.images)
        batches = [order[start : start + BATCH] for start in range(0, options.images - BATCH + 1, BATCH)]
        reference = read["open for each item"](batches[0])
        assert all(torch.equal(reader(batches[0]), reference) for reader in read.values())
        rates = {name: [] for name in read}
        for number, batch in enumerate(batches[:190]):
            for name, reader in read.items():
                if name != "open for each item" or number % 10 == 0:
                    started = time.perf_counter()
                    reader(batch)
                    rates[name].append(len(batch) / (time.perf_counter() - started))
        del read
        ours = LatentDataset(folder)
        ours.read_raw(batches[0])
        before = peak = resident_mib()
        for batch in batches:
            ours.read_raw(batch)
            peak = max(peak, resident_mib())
        print("| reader | samples/s | ours is so many times as fast |\n|---|---|---|")
        for name, values in rates.items():
            print(f"| {name} | {median(values):,.0f} | {median(rates['ours']) / median(values):.2f} |")
        print(f"\n{options.images:,} images: a pass of ours adds at most {peak - before:.0f} MiB of memory")
        load.append(os.getloadavg()[0])
        cores = len(os.sched_getaffinity(0))
        print(
            f"load of the machine, over a minute: {load[0]:.1f} at the start, {load[1]:.1f} at the end, "
            f"on {cores} cores; alone it is at most 1 at the end"
        )


if __name__ == "__main__":
    main()
