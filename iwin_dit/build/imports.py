"""Where an imported model becomes a pipeline: ``python -m iwin_dit.convert ... --vae NAME``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from iwin_dit.build.data import load_autoencoder, read_statistics
from iwin_dit.data.codec import latent_channels
from iwin_dit.data.sources import IMAGENET_NAMES
from iwin_dit.diffusion.sampling import published_scheduler
from iwin_dit.models.transformer import IwinDiTTransformer2DModel
from iwin_dit.pipelines.base import export_pipeline
from iwin_dit.pipelines.image import IwinDiTPipeline
from iwin_dit.runtime import files
from iwin_dit.runtime.errors import DataError


def import_pipeline(
    model: IwinDiTTransformer2DModel, vae: str, statistics: Path | None, folder: Path, source: Path
) -> None:
    """Writes the pipeline of an imported model; a model of 1,000 classes gets ImageNet's names.

    Args:
        vae: the autoencoder of its latents: a preset, a folder, a hub id or an original file.
        statistics: mean and standard deviation of the latents that it was trained on, as LightningDiT's
            ``latents_stats.pt``. Default: those that the autoencoder's own config says.
        source: the official file, whose hash the recipe keeps.

    Raises:
        DataError: where the autoencoder or the statistics are not there, or of other latents.
    """
    autoencoder = load_autoencoder(vae)
    channels, found = model.config.in_channels, latent_channels(autoencoder)
    if found != channels:
        raise DataError(f"--vae {vae} has {found} latent channels, the model has {channels}; take its own")
    mean, std = (None, None) if statistics is None else read_statistics(statistics, channels)
    names = IMAGENET_NAMES if model.config.num_classes == len(IMAGENET_NAMES) else ()
    pipeline = IwinDiTPipeline(
        transformer=model,
        vae=autoencoder,
        scheduler=published_scheduler(model.config.prediction_type),
        id2label=dict(enumerate(names)),
        latents_mean=mean,
        latents_std=std,
    )
    recipe: dict[str, Any] = {"imported_from": source.name, **files.fingerprint(source), "vae": vae}
    export_pipeline(pipeline, folder, recipe)
