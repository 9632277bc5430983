"""Where names of data and autoencoders become objects."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub import hf_hub_download
from torch import Tensor

from iwin_dit.config.classifier import Recipe
from iwin_dit.config.parse import load_yaml
from iwin_dit.config.schema import Config, DataConfig
from iwin_dit.convert import from_ldm_vae, load_official
from iwin_dit.data import digits, moving_digits
from iwin_dit.data.codec import (
    VA_VAE_PRESET,
    encode,
    is_of_videos,
    load_vae,
    normalize,
    pixel_frames,
    spatial_factor,
    vae_statistics,
)
from iwin_dit.data.examples import Data, ImagesAsClips
from iwin_dit.data.folders import ignored_line
from iwin_dit.data.latents import LatentDataset, published_index
from iwin_dit.data.pixels import PixelDataset, Reader
from iwin_dit.data.sources import ClipFolderSource, Source, classes_begun, open_images
from iwin_dit.data.video import ClipSpec
from iwin_dit.runtime.colours import background
from iwin_dit.runtime.errors import DataError, reason

PREPARE_LATENTS = {"digits": digits.prepare, "moving_digits": moving_digits.prepare}
PREPARE_IMAGES = {"digits": digits.write_images, "moving_digits": moving_digits.write_clips}

VA_VAE_REPOSITORY = "hustvl/vavae-imagenet256-f16d32-dinov2"
VA_VAE_FILE = "vavae-imagenet256-f16d32-dinov2.pt"
VA_VAE = dict(
    ch=128, ch_mult=[1, 1, 2, 2, 4], num_res_blocks=2, resolution=256, attn_resolutions=[16], z_channels=32
)


def build_dataset(config: Config, accelerator: Accelerator | None = None) -> LatentDataset | PixelDataset:
    """The latents, or the images, made first where the config says how; checked against the model.

    Raises:
        DataError: where they are missing, or do not fit the model.
    """
    if accelerator is None or accelerator.is_main_process:
        _prepare(config.data)
    if accelerator is not None:
        accelerator.wait_for_everyone()
    dataset = _pixels(config) if config.data.kind == "images" else _latents(config)
    shape, model = tuple(dataset.latent_shape), config.model
    for key, name, have, want in (
        ("in_channels", "latent channels", shape[0], model.in_channels),
        ("sample_frames", "latent frames", shape[1] if len(shape) == 4 else None, model.sample_frames),
        ("sample_size", "latent size", shape[-2:], model.latent_size[-2:]),
        ("num_classes", "classes", len(dataset.class_names), model.num_classes),
    ):
        if have != want:
            shown = list(have) if isinstance(have, tuple) else have
            raise DataError(
                f"{config.data.path} has {name} {shown} (VAE {dataset.vae_path}), the config's model.{key} "
                f"is {getattr(model, key)}; set model.{key} to {shown}, or take other data"
            )
    return dataset


def build_images(config: Config, clips: LatentDataset | PixelDataset) -> ImagesAsClips | None:
    """The images that are mixed into training on clips; None where there are none.

    Raises:
        DataError: where they are missing, or not of the clips' classes and autoencoder.
    """
    if config.data.images is None:
        return None
    path = Path(config.data.images)
    images = LatentDataset(path, _published(config, path))
    expected = {
        "classes": (images.class_names, clips.class_names),
        "channels, height and width": (_image_shape(images), _image_shape(clips)),
        "the autoencoder of SHA-256": (images.identity["vae_sha256"], clips.identity["vae_sha256"]),
    }
    for name, (have, want) in expected.items():
        if have != want:
            raise DataError(
                f"data.images {path} has {name} {have!s:.200}, the clips of {config.data.path} have "
                f"{want!s:.200}; extract both from the same classes with the same autoencoder and size"
            )
    images.mean, images.std = clips.mean, clips.std
    return ImagesAsClips(images)


def open_features(folder: Path, latents: LatentDataset | PixelDataset) -> LatentDataset:
    """The features of a teacher that ``extract_latents.py --features`` has written of the latents' images.

    Raises:
        DataError: where they are missing, no features, or of other images.
    """
    features = LatentDataset(folder)
    if "teacher" not in features.index:
        raise DataError(f"{folder} holds latents; expected what extract_latents.py --features writes")
    assert isinstance(latents, LatentDataset)  # the rules ask for it
    sources = [data.index.get("source", {}).get("files_sha256") for data in (features, latents)]
    other = None not in sources and sources[0] != sources[1]
    if other or not torch.equal(features.labels, latents.labels):
        raise DataError(
            f"{folder} holds features of other images than {latents.directory} latents, by name, size, label "
            "or order; extract both from the same images"
        )
    return features


def _image_shape(data: LatentDataset | PixelDataset) -> tuple[int, ...]:
    return data.latent_shape[0], *data.latent_shape[-2:]


def build_encoder(dataset: Data, accelerator: Accelerator) -> Callable[[Tensor], Tensor]:
    """From what the dataset gives, on the device, to normalised latents; latents are that already."""
    if not isinstance(dataset, PixelDataset):
        return lambda latents: latents
    vae = load_autoencoder(dataset.vae_path).to(accelerator.device)
    if not is_of_videos(vae):
        vae.to(memory_format=torch.channels_last)

    def to_latents(pixels: Tensor) -> Tensor:
        with accelerator.autocast():
            latents = encode(vae, pixels.float() / 127.5 - 1)
        return normalize(latents, dataset.mean, dataset.std)

    return to_latents


def count_images(config: Config) -> tuple[int, str | None]:
    """Images of the data, without the autoencoder, and a line of what else lies there and is ignored.

    Raises:
        DataError: where they are missing.
    """
    path = Path(config.data.path)
    if config.data.kind == "images":
        source = open_training(config)
        return len(source), ignored_line(config.data.path, "images", source.ignored)
    return len(LatentDataset(path, _published(config, path))), None


def open_training(config: Recipe) -> Source | ClipFolderSource:
    """Where the images or clips to train on come from.

    Raises:
        DataError: where they are missing.
    """
    frames = config.model.sample_frames if isinstance(config, Config) else config.data.frames
    begun = classes_begun(Path(config.output_dir) / "data.json", "classes")
    return open_images(config.data.path, config.data, frames is not None, begun)


def _prepare(data: DataConfig) -> None:
    """Makes the latents in their folder, or the images in the folder around ``train``, where missing."""
    path = Path(data.path)
    if data.prepare is None:
        return
    if data.kind == "latents" and not (path / "index.json").exists():
        PREPARE_LATENTS[data.prepare](path)
    if data.kind == "images" and not path.is_dir():
        PREPARE_IMAGES[data.prepare](path.parent)


def _pixels(config: Config) -> PixelDataset:
    assert config.data.vae is not None  # the rules ask for it
    vae, frames = load_autoencoder(config.data.vae), config.model.sample_frames
    clip = None if frames is None else ClipSpec(pixel_frames(vae, frames), config.data.frame_stride)
    if clip is None and is_of_videos(vae):
        raise DataError(f"{config.data.vae} is an autoencoder of videos: set model.sample_frames")
    height, width = (side * spatial_factor(vae) for side in config.model.latent_size[-2:])
    ground = background(config.data.background)
    reader = Reader(open_training(config), (height, width), config.data.crop, clip, background=ground)
    return PixelDataset(reader, vae, config.data.vae, config.data.max_bad_images)


def _latents(config: Config) -> LatentDataset:
    path = Path(config.data.path)
    published = _published(config, path)
    latents = LatentDataset(path, published)
    given, own = config.data.vae, latents.index.get("vae")
    if published is None and given not in (None, own) and Path(given).resolve() != Path(latents.vae_path):
        warnings.warn(f"data.vae {given} is not used: {path} was made by {own}", stacklevel=1)
    if (teacher := latents.index.get("teacher")) is not None:
        raise DataError(
            f"{path} holds features of {teacher}, which no autoencoder decodes; give latents, and these by "
            f"alignment.teacher features:{path}"
        )
    if config.data.normalization == "vae":
        latents.mean, latents.std = vae_statistics(load_autoencoder(latents.vae_path))
    return latents


def _published(config: Config, path: Path) -> dict[str, Any] | None:
    """The index of a folder in LightningDiT's published layout; None where there is one of ours."""
    statistics = path / "latents_stats.pt"
    if (path / "index.json").exists() or not statistics.exists():
        return None
    if config.data.vae is None:
        raise DataError(f"{path} does not say what decodes it: set data.vae to a folder, preset or hub id")
    mean, std = read_statistics(statistics, config.model.in_channels)
    return published_index(path, mean, std, config.data.vae, config.model.num_classes)


def read_statistics(path: Path, channels: int) -> tuple[list[float], list[float]]:
    """``mean`` and ``std`` per channel of a ``latents_stats.pt``, where they are ``(1, C, 1, 1)``.

    Raises:
        DataError: where it does not hold so many finite numbers of each, with standard deviations above 0.
    """
    content, found = load_official(path), []
    for key in ("mean", "std"):
        tensor = content.get(key)
        values = tensor.float().flatten().tolist() if isinstance(tensor, torch.Tensor) else []
        low = 0.0 if key == "std" else -float("inf")
        if len(values) != channels or not all(low < value < float("inf") for value in values):
            raise DataError(
                f"{path} holds a {key} of {len(values)} numbers, expected {channels}, one for each latent "
                "channel, finite" + (" and above 0" if key == "std" else "")
            )
        found.append(values)
    return found[0], found[1]


def load_autoencoder(name: str, ldm_config: Path | None = None) -> Any:
    """A diffusers autoencoder by preset, folder or hub id, or from an original file.

    Args:
        ldm_config: YAML with the ``ddconfig`` of an original ``.pt``, ``.ckpt`` or ``.safetensors`` file.
            Default: that of VA-VAE f16d32.
    """
    if name == VA_VAE_PRESET:
        try:
            name = hf_hub_download(VA_VAE_REPOSITORY, VA_VAE_FILE)
        except (OSError, ValueError) as error:
            where = f"{VA_VAE_REPOSITORY}/{VA_VAE_FILE}"
            raise DataError(
                f"{where} cannot be downloaded: {reason(error)}; or give the file itself"
            ) from None
    if not Path(name).is_file():
        return load_vae(name)
    config = VA_VAE if ldm_config is None else load_yaml(ldm_config)
    try:
        return from_ldm_vae(load_official(Path(name)), config).eval().requires_grad_(False)
    except ValueError as error:
        raise DataError(f"{name} is not the LDM autoencoder of its config: {error}") from None
