"""A trained classifier, written for use elsewhere."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save
from timm.models._hub import save_for_hf

from iwin_dit.build.classifier_network import model_options
from iwin_dit.config.classifier import ClassifierConfig
from iwin_dit.runtime import files, scratch
from iwin_dit.training.state import Run


def export(config: ClassifierConfig, run: Run) -> Path:
    """The EMA for use elsewhere: a folder for timm, or of a model of clips its weights; returns where."""
    return export_timm(config, run) if config.data.frames is None else export_clips(config, run)


def export_clips(config: ClassifierConfig, run: Run) -> Path:
    """``RUN/model.safetensors``, and ``RUN/model.json`` with the arguments of ``IwinTransformer3D``.

    Beside them stand the classes, in the order of the logits, and how clips are made.
    """
    data = config.data
    settings = {
        "arguments": {"num_classes": config.model.num_classes, **model_options(config)},
        "class_names": run.files.data["classes"],
        "frame_stride": data.frame_stride,
        "crop_share": data.crop_share,
        "mean": data.mean,
        "std": data.std,
    }
    path = run.files.path / "model.safetensors"
    tensors = {name: tensor.cpu().contiguous() for name, tensor in run.state.emas["ema"].state_dict().items()}
    files.replace(path.with_suffix(".json"), files.to_json(settings))
    files.replace(path, save(tensors))
    return path


def export_timm(config: ClassifierConfig, run: Run) -> Path:
    """``RUN/timm``, for ``timm.create_model("local-dir:RUN/timm")`` after ``import iwin_dit.models``."""
    model, data, folder = run.state.emas["ema"], config.data, run.files.path / "timm"
    preprocessing = {
        "input_size": (3, *data.size),
        "mean": data.mean,
        "std": data.std,
        "crop_pct": data.crop_share,
        "interpolation": "bicubic",
    }
    settings = {"pretrained_cfg": preprocessing, "label_names": run.files.data["classes"]}
    with scratch.replacement(folder) as new:
        save_for_hf(model, str(new), settings, model_options(config), safe_serialization=True)
    return folder
