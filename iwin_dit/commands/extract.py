"""Turns images or videos into the latents that training reads, on any number of processes.

``iwin-dit extract --images FOLDER --vae sd-vae-ft-ema --out data/mine``; on several GPUs, ``accelerate launch
-m iwin_dit.commands extract``. Run the same command again to go on after an interruption.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from iwin_dit.runtime import files
from iwin_dit.runtime.colours import colour
from iwin_dit.runtime.errors import ConfigError, Parser

DTYPES = ("float32", "bfloat16", "float16")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--images", help="class folders, a flat folder with --labels, .tar or .parquet files, or hf:NAME")
    add("--labels", help="CSV with columns file,label for a flat folder")
    add("--follow-links", action="store_true", help="links in --images may lead out of it (refused)")
    add("--split", help="of Hugging Face data (train)")
    add("--image-column", help="of Hugging Face data with several columns of images")
    add("--label-column", help="of Hugging Face data: class labels, integers or texts")
    add("--allow-odd-classes", action="store_true", help="take classes without images, one class, or splits")
    add("--vae", help="a preset, a folder, a hub id, or an original .pt, .ckpt or .safetensors file")
    add("--vae-config", type=Path, help="YAML of an original file's ddconfig (that of VA-VAE f16d32)")
    add("--features", metavar="MODEL", help="not latents, but features for alignment.teacher: timm:NAME, ...")
    add("--features-weights", metavar="FILE", help="of a MODEL of timm's (fetched)")
    add("--features-block", type=int, help="after so many blocks or stages (the last)")
    add("--out", help="folder for the shards and index.json")
    add("--size", type=int, nargs="+", default=[256], metavar="PIXELS", help="a side, or height, width (256)")
    add("--frames", type=int, help="frames of a clip: --images then holds class folders of videos (images)")
    add("--frame-stride", type=int, default=1, help="take every n-th frame of a video (1)")
    add("--clips-per-video", type=int, help="from random places (1)")
    add("--crop", choices=("center", "random"), default="center", help="(center: ADM's)")
    add("--background", default="white", help="behind transparent pixels: white, black or R,G,B (white)")
    add("--batch-images", type=int, default=32, help="images of one pass through the VAE (32)")
    add("--shard-images", type=int, default=10_000, help="images of a shard (10,000)")
    add("--workers", type=int, help="processes that decode images (4, or as many as there are cores)")
    add(
        "--worker-timeout",
        type=float,
        default=600,
        metavar="SECONDS",
        help="without a batch, after which a worker hangs (600)",
    )
    add("--precision", choices=DTYPES, default="float32", help="of the VAE (float32)")
    add("--store", choices=DTYPES, default="float32", help="on disk (float32)")
    add("--posterior", action="store_true", help="keep the posterior's standard deviations too")
    add("--max-bad-images", type=int, default=0, help="leave out up to so many broken images (0)")
    add("--verify", type=Path, metavar="DIR", help="check a set, with --images also its origin")
    add("--info", type=Path, metavar="DIR", help="say what a set holds, and draw contact.png beside it")
    arguments = parser.parse_args()
    if not (arguments.verify or arguments.info):
        _check(arguments)
    return arguments


def _check(arguments: argparse.Namespace) -> None:
    """Refuses what cannot be extracted. Raises ConfigError."""
    if arguments.features and (arguments.vae or arguments.frames or arguments.crop == "random"):
        raise ConfigError("--features are of the middle of images: leave out --vae, --frames and --crop")
    if arguments.features and (arguments.posterior or arguments.precision != "float32"):
        raise ConfigError("--features are computed in float32: leave out --posterior and --precision")
    encoder = "features" if arguments.features else "vae"
    missing = [name for name in ("images", encoder, "out") if not getattr(arguments, name)]
    if missing:  # an empty --out would be the working directory
        raise ConfigError(f"--{missing[0]} is missing or empty; see --help")
    arguments.out = Path(arguments.out)
    numbers = [*arguments.size, arguments.batch_images, arguments.shard_images, arguments.frame_stride]
    optional = [number for number in (arguments.clips_per_video, arguments.frames) if number is not None]
    if min(numbers + optional) < 1 or len(arguments.size) > 2:
        raise ConfigError("--size takes one or two numbers, and all numbers are at least 1")
    colour(arguments.background)
    if not 1 <= arguments.worker_timeout <= 1e6:
        raise ConfigError(f"--worker-timeout {arguments.worker_timeout} is not 1 to 1,000,000 seconds")
    if min(arguments.workers or 0, arguments.max_bad_images) < 0:
        raise ConfigError("--workers and --max-bad-images are at least 0")
    if arguments.vae_config and not Path(arguments.vae).is_file():
        raise ConfigError(f"--vae-config is for an original file; --vae {arguments.vae} is none")
    if arguments.frames is None and (arguments.frame_stride, arguments.clips_per_video or 1) != (1, 1):
        raise ConfigError("--frame-stride and --clips-per-video are for clips; give --frames, such as 16")
    if arguments.frames is not None and arguments.labels is not None:
        raise ConfigError("--labels is for images; videos lie in a folder per class")
    files.check_writable(arguments.out, "--out")


def main() -> None:
    """Makes, checks or describes a set of latents."""
    arguments = parse_arguments()
    from iwin_dit.data import inspection
    from iwin_dit.data.latent_index import read_index

    if arguments.verify:
        print(f"{inspection.verify(arguments.verify)}, every shard is what the index says")
        if arguments.images:
            from iwin_dit.data.latent_index import read_index
            from iwin_dit.data.sources import open_images

            index = read_index(arguments.verify)
            source = open_images(arguments.images, arguments, "frames" in index, index["class_names"])
            compared = inspection.verify_content(arguments.verify, source, arguments.images)
            told = f"contents were compared of {compared} of {len(index['shards'])} shards"
            print(f"{arguments.images} is its origin; {told}")
    elif arguments.info:
        print(inspection.describe(arguments.info))
        if "teacher" not in read_index(arguments.info):  # features are nothing to look at
            inspection.contact_sheet(arguments.info, arguments.info / "contact.png")
    else:
        extract_latents(arguments)


def extract_latents(arguments: argparse.Namespace) -> None:
    """Writes the latents of ``--images``; each process does its part."""
    from accelerate import Accelerator

    from iwin_dit.build.data import load_autoencoder
    from iwin_dit.data import extraction
    from iwin_dit.data.classes import numbering_line
    from iwin_dit.data.codec import weights_sha256
    from iwin_dit.data.folders import ignored_line
    from iwin_dit.data.sources import classes_begun, open_images
    from iwin_dit.data.video import ClipSpec
    from iwin_dit.runtime.processes import group_timeout, keep_freed_memory, use_all_cores
    from iwin_dit.runtime.progress import say

    accelerator = Accelerator(kwargs_handlers=[group_timeout()])
    if accelerator.device.type == "cpu":
        use_all_cores(1)  # the same threads on any number of processes, since they decide the rounding
        keep_freed_memory()
    clip, clips = None, None
    if arguments.frames is not None:
        clip, clips = ClipSpec(arguments.frames, arguments.frame_stride), arguments.clips_per_video or 1
    begun = classes_begun(arguments.out / ".entries" / "settings.json", "class_names")
    source = open_images(arguments.images, arguments, clip is not None, begun)
    what = "images" if clip is None else "clips"
    if accelerator.is_main_process:
        lines = ignored_line(arguments.images, what, source.ignored), numbering_line(source.class_names)
        for line in filter(None, lines):
            say(line)
    names = "crop", "batch_images", "shard_images", "precision", "store", "posterior", "background"
    given = {name: getattr(arguments, name) for name in names}
    size = arguments.size[0], arguments.size[-1]
    if arguments.features:
        from iwin_dit.build.teachers import FeatureEncoder, load_teacher

        weights, block = arguments.features_weights, arguments.features_block
        vae: Any = FeatureEncoder(load_teacher(arguments.features, weights, block, size=size))
        description = {"vae": arguments.features, "teacher": arguments.features}
    else:
        vae = load_autoencoder(arguments.vae, arguments.vae_config)
        local = Path(arguments.vae).exists()
        description = {"vae": extraction.LOCAL_VAE if local else arguments.vae}
    bad = extraction.extract(
        source,
        vae.to(accelerator.device),
        arguments.out,
        extraction.Settings(size, clip=clip, clips_per_video=clips, **given),
        description | {"vae_sha256": weights_sha256(vae)},
        num_workers=arguments.workers,
        max_bad_images=arguments.max_bad_images,
        process=accelerator.process_index,
        num_processes=accelerator.num_processes,
        wait=accelerator.wait_for_everyone,
        timeout=arguments.worker_timeout,
    )
    if accelerator.is_main_process:
        for reason in bad:
            print(f"left out: {reason}")
        count = len(source) * (clips or 1) - len(bad)
        print(f"{count:,} {what} in {arguments.out}; look at them with --info {arguments.out}")
    accelerator.end_training()
