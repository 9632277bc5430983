"""What a pipeline folder may hold, checked before diffusers reads it.

diffusers imports the classes that ``model_index.json`` names from any installed package, allocates what a
config asks for, reads pickles where there are no safetensors, and takes weights that are incomplete or NaN.
"""

from __future__ import annotations

import inspect
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from iwin_dit.data.codec import VAES
from iwin_dit.diffusion.sampling import scheduler_class
from iwin_dit.diffusion.specs import SAMPLERS
from iwin_dit.models.transformer import IwinDiTTransformer2DModel, IwinDiTTransformer3DModel
from iwin_dit.pipelines.base import ClassConditionalPipeline
from iwin_dit.pipelines.media import IwinDiTPipeline, IwinDiTVideoPipeline
from iwin_dit.runtime import files, limits
from iwin_dit.runtime.errors import CheckpointError, listed

PIPELINES: dict[str, tuple[type[ClassConditionalPipeline], type[IwinDiTTransformer2DModel]]] = {
    "IwinDiTPipeline": (IwinDiTPipeline, IwinDiTTransformer2DModel),
    "IwinDiTVideoPipeline": (IwinDiTVideoPipeline, IwinDiTTransformer3DModel),
}
SCHEDULERS = sorted({sampler.scheduler for samplers in SAMPLERS.values() for sampler in samplers.values()})
SETTINGS = ("_class_name", "_diffusers_version", "_name_or_path", "id2label", "latents_mean", "latents_std")

# The largest of every number that decides how much is built or allocated, all above 0.
SIZES: dict[str, float] = {
    "num_layers": 1_000,
    **dict.fromkeys(("num_attention_heads", "attention_head_dim", "in_channels"), limits.SIDE),
    **dict.fromkeys(("out_channels", "sample_size", "sample_frames", "window_size"), limits.SIDE),
    "patch_bottleneck": limits.SIDE,
    "num_classes": limits.LABELS,
    "patch_size": limits.PATCH,
    "kernel_size": limits.KERNEL,
    "mlp_ratio": limits.MLP_RATIO,
    "num_train_timesteps": 1_000_000,
}
OF_SEVERAL_AXES = ("sample_size", "window_size", "kernel_size")
MAX_NUMBER = 10**18  # of what else a model reads; 64 bits hold it, too
MAX_VAE_LAYERS, MAX_VAE_NUMBER = 64, 65_536
KINDS = {bool: (bool,), str: (str,), int: (int,), float: (int, float)}  # of a value, by that of its default

WEIGHTS = "diffusion_pytorch_model.safetensors"
WEIGHTS_NAME = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)
OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5", ".onnx")
FLOATS = ("F64", "F32", "F16", "BF16")
# Of the attention of autoencoders, and what diffusers calls it now: it renames when it loads, too.
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def check_pipeline_folder(path: Path) -> type[ClassConditionalPipeline]:
    """The class of a pipeline folder; one that is not ours, damaged, or builds more than it holds is refused.

    ``model_index.json`` may name our classes and a few of diffusers; sizes in configs are bounded before
    anything is built; weights are safetensors, fit their config and are finite. All weights are read once.

    Raises:
        CheckpointError: saying in which file what was found, and what is accepted.
    """
    index = path / "model_index.json"
    name, vae, scheduler = check_index(path)
    pipeline, model = PIPELINES[name]
    channels = _check_transformer(path / "transformer" / "config.json", model)
    for key in ("latents_mean", "latents_std"):
        values = _read_json(index).get(key)
        if values is not None and not (
            isinstance(values, list)
            and len(values) == channels
            and all(isinstance(value, int | float) and abs(value) <= MAX_NUMBER for value in values)
        ):
            raise _unexpected(index, key, values, f"a number for each of the {channels} latent channels")
    _check_vae(path / "vae" / "config.json", VAES[vae])
    scheduler_config = path / "scheduler" / "scheduler_config.json"
    _check_values(scheduler_config, scheduler_class(scheduler), _read_json(scheduler_config), math.inf)
    _check_weights(path / "transformer", model)
    _check_weights(path / "vae", VAES[vae])
    return pipeline


def check_model_folder(path: Path) -> type[IwinDiTTransformer2DModel]:
    """The class of a folder that holds a transformer alone, checked as :func:`check_pipeline_folder` does.

    Raises:
        CheckpointError: saying in which file what was found, and what is accepted.
    """
    config, kinds = path / "config.json", {kind.__name__: kind for _, kind in PIPELINES.values()}
    name = _read_json(config).get("_class_name")
    if not isinstance(name, str) or name not in kinds:
        raise _unexpected(config, "_class_name", name, " or ".join(kinds))
    _check_transformer(config, kinds[name])
    _check_weights(path, kinds[name])
    return kinds[name]


def check_index(path: Path) -> tuple[str, str, str]:
    """The first part of :func:`check_pipeline_folder`: the names of its classes: pipeline, VAE, scheduler."""
    index = path / "model_index.json"
    if not index.is_file():
        if (path / "config.json").is_file():
            raise CheckpointError(
                f"{path} holds a model without its autoencoder, which model.init_from takes; to draw, "
                "convert the official file with --vae, or give a pipeline"
            )
        raise CheckpointError(f"{path} is neither a run (config.yaml) nor a pipeline (model_index.json)")
    content = _read_json(index)
    name = content.get("_class_name")
    name = name[-1] if isinstance(name, list) and name else name  # our exports add the file beside it
    if not isinstance(name, str) or name not in PIPELINES:
        raise CheckpointError(f"{path} holds a {name!s:.100}, expected an {' or '.join(PIPELINES)}")
    components: dict[str, list[Any]] = {  # the classes that each may name
        "transformer": [PIPELINES[name][1]],
        "vae": list(VAES.values()),
        "scheduler": [scheduler_class(kind) for kind in SCHEDULERS],
    }
    unknown = sorted(set(content) - {*components, *SETTINGS})
    if unknown:
        raise CheckpointError(
            f"{index} names {listed(unknown)!r:.300}, expected the components {', '.join(components)} alone; "
            "take a pipeline that this package has exported"
        )
    for component, classes in components.items():
        found, libraries = content.get(component), defaultdict(list)
        for kind in classes:
            library = kind.__module__.partition(".")[0]  # which ours say of themselves
            libraries[library].append(kind.__name__)
        if found not in [[library, kind] for library, kinds in libraries.items() for kind in kinds]:
            expected = (f"{library}'s {' or '.join(kinds)}" for library, kinds in libraries.items())
            raise _unexpected(index, component, found, ", or ".join(expected))
    names = content.get("id2label")
    if names is not None and not (
        isinstance(names, dict)
        and all(re.fullmatch("[0-9]{1,9}", key) and isinstance(name, str) for key, name in names.items())
    ):
        raise _unexpected(index, "id2label", names, "names by the number of the class")
    return name, content["vae"][1], content["scheduler"][1]


def _check_transformer(path: Path, kind: type) -> int:
    """Returns the number of latent channels."""
    config, parameters = _read_json(path, kind), inspect.signature(kind).parameters
    unknown = sorted(key for key in config if key not in parameters and not key.startswith("_"))
    if unknown:
        raise CheckpointError(
            f"{path} has {listed(unknown)!r:.300}, which this version does not know; "
            "it was made by a newer version of iwin-dit, or by something else"
        )
    mixer = config.get("mixer") or {}
    if not isinstance(mixer, dict):
        raise _unexpected(path, "mixer", mixer, "keys and values")
    _check_values(path, kind, mixer | config, MAX_NUMBER)
    return config.get("in_channels", parameters["in_channels"].default)


def _check_vae(path: Path, kind: type) -> None:
    config = _read_json(path, kind)
    if "quantization_config" in config:
        raise _unexpected(path, "quantization_config", config["quantization_config"], "plain weights")
    layers = {key: value for key, value in config.items() if "layers" in key}
    _check_values(path, kind, layers, MAX_VAE_LAYERS)
    _check_values(path, kind, config, MAX_VAE_NUMBER)
    for key, value in config.items():
        if "block" in key and isinstance(value, list) and len(value) > MAX_VAE_LAYERS:
            raise _unexpected(path, key, value, f"at most {MAX_VAE_LAYERS}")


def _check_values(path: Path, kind: Any, config: dict[str, Any], most: float) -> None:
    """Sizes are in their bounds; other values are as the constructor's defaults, numbers up to ``most``."""
    parameters = inspect.signature(kind).parameters
    for key, value in config.items():
        default = parameters[key].default if key in parameters else None
        if key in SIZES and not (value is default is None):
            sizes = value if isinstance(value, list) and key in OF_SEVERAL_AXES else [value]
            if key == "window_size":  # the mixer knows its words
                sizes = [size for size in sizes if not isinstance(size, str)]
            whole = key != "mlp_ratio"
            if not all(type(n) in KINDS[int if whole else float] and 0 < n <= SIZES[key] for n in sizes):
                words = "a whole number from 1" if whole else "a number above 0"
                raise _unexpected(path, key, value, f"{words}, at most {SIZES[key]:,}")
        elif value is not None and type(value) not in KINDS.get(type(default), (type(value),)):
            raise _unexpected(path, key, value, f"a value such as {default!r}")
        elif not all(abs(number) <= most for number in _numbers(value)):
            raise _unexpected(path, key, value, f"numbers up to {most:,}")


def _check_weights(folder: Path, kind: Any) -> None:
    """Compares names and shapes with those of a model on the meta device, which takes no memory."""
    config = _read_json(folder / "config.json")
    try:
        with torch.device("meta"):
            expected = {name: list(t.shape) for name, t in kind.from_config(config).state_dict().items()}
    except Exception as error:  # whatever a stranger's numbers lead a constructor to
        raise _damaged(folder, f"{folder / 'config.json'} makes no model: {error!s:.300}") from error
    found, not_finite = {}, []
    for file in _weight_files(folder):
        try:
            with safe_open(file, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118  it is no dictionary
                    header, ours = weights.get_slice(name), name
                    for old, new in OLD_NAMES.items():
                        ours = ours.replace(old, new)
                    found[ours] = header.get_shape()
                    if header.get_dtype() not in FLOATS:
                        raise _damaged(folder, f"{file} is {header.get_dtype()} at {name}, expected floats")
                    if found[ours] == expected.get(ours):
                        values = weights.get_tensor(name)
                        not_finite += [] if torch.isfinite(values).all() else [name]
        except (OSError, SafetensorError) as error:
            raise _unreadable(file, error) from error
    wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    if wrong:
        raise _damaged(folder, f"the weights do not fit {folder / 'config.json'} at {listed(wrong)}")
    if not_finite:
        raise _damaged(folder, f"the weights in {folder} are not finite at {listed(not_finite)}")


def _weight_files(folder: Path) -> list[Path]:
    index = folder / f"{WEIGHTS}.index.json"
    if index.is_file():
        names = _read_json(index).get("weight_map")
        names = sorted(set(map(str, names.values()))) if isinstance(names, dict) else []
        if not names or not all(map(WEIGHTS_NAME.fullmatch, names)):
            raise _unexpected(index, "weight_map", names, "plain names of .safetensors files")
        return [folder / name for name in names]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    others = sorted(path.name for path in folder.iterdir() if path.suffix in OTHER_FORMATS)
    raise _damaged(
        folder,
        f"{folder} has {listed(others) or 'no weights'}, expected {WEIGHTS}: only .safetensors are accepted, "
        "since other formats can run code",
    )


def _read_json(path: Path, kind: type | None = None) -> dict[str, Any]:
    """Keys and values, those of a config of this class."""
    try:
        content = files.read_object(path, limits.INDEX_BYTES)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if kind is not None and content.get("_class_name") != kind.__name__:
        raise _unexpected(path, "_class_name", content.get("_class_name"), repr(kind.__name__))
    return content


def _numbers(value: Any) -> Iterator[int | float]:
    """Those in a value of a config, however deep."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, list | dict):
            left += value.values() if isinstance(value, dict) else value
        elif isinstance(value, int | float):
            yield value


def _unexpected(path: Path, key: str, found: Any, expected: str) -> CheckpointError:
    return CheckpointError(f"{path} has {key} {found!r:.200}, expected {expected}")


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    """A file that is not there or is not what it has to be is damage; one that may not be read is none."""
    told = f"{path} cannot be read: {files.why_unreadable(path, error)}"
    try:
        with open(path, "rb"):
            return _damaged(path.parent, told)
    except FileNotFoundError:
        return _damaged(path.parent, told)
    except OSError:
        return CheckpointError(told)


def _damaged(folder: Path, reason: str) -> CheckpointError:
    whole = folder.parent if (folder.parent / "model_index.json").exists() else folder
    what = "model" if (folder / "config.json").exists() and whole == folder else "pipeline"
    return CheckpointError(f"{whole} is a damaged {what}: {reason}")
