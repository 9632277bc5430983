"""Official file in, safetensors out: ``iwin-dit convert dit DiT-XL-2.pt out --config dit.json``.

The folder that is written holds ``config.json`` and the weights: as diffusers' ``from_pretrained`` reads
them, or, for an Iwin Transformer of images, ``timm.create_model("local-dir:FOLDER", pretrained=True)``.
With ``--vae``, a generator becomes a pipeline.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from iwin_dit.runtime import files, scratch, strict_yaml
from iwin_dit.runtime.errors import ConfigError, DataError, Parser

GENERATORS = ("dit", "lightningdit", "flashdit")
KINDS = (*GENERATORS, "ldm_vae", "iwin_transformer")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("kind", choices=KINDS, help="the official model")
    add("file", type=Path, help="its .pt, .pth, .ckpt or .safetensors")
    add("folder", type=Path, help="the folder to write, which must not exist")
    add(
        "--config",
        required=True,
        metavar="FILE|NAME",
        help="JSON or YAML of the official constructor's arguments; or an Iwin Transformer's name in timm",
    )
    add(
        "--vae",
        metavar="NAME",
        help="write a pipeline for sample.py, with this autoencoder: a preset, a folder, a hub id or an "
        "original file (the model alone, for model.init_from)",
    )
    add(
        "--latents-stats",
        type=Path,
        metavar="FILE",
        help="how the latents are normalised, such as latents_stats.pt (as the autoencoder says)",
    )
    arguments = parser.parse_args()
    if arguments.vae is None and arguments.latents_stats is not None:
        raise ConfigError("--latents-stats belongs to a pipeline; give --vae, too")
    if arguments.vae is not None and arguments.kind not in GENERATORS:
        raise ConfigError(f"--vae is for a model that draws; a {arguments.kind} needs none")
    if arguments.vae is not None and arguments.kind != "dit" and arguments.latents_stats is None:
        raise ConfigError(
            f"a {arguments.kind} was trained on latents normalised by mean and standard deviation of each "
            "channel; give them by --latents-stats, such as LightningDiT's latents_stats.pt"
        )
    return arguments


def read_config(source: str, kind: str) -> dict[str, Any]:
    """The official constructor's arguments, from a file or by the name of a published model."""
    from iwin_dit.models.iwin_transformer import VARIANTS

    if kind == "iwin_transformer" and source in VARIANTS:
        return {name: VARIANTS[source][0][name] for name in ("img_size", "window_size", "num_heads")}
    path = Path(source)
    if not path.is_file():
        names = f", nor is it one of {', '.join(VARIANTS)}" if kind == "iwin_transformer" else ""
        raise ConfigError(f"--config {source} is not a file{names}")
    return strict_yaml.load(path)  # which reads JSON, too


def save(model: Any, folder: Path) -> None:
    """``config.json`` and safetensors, in a folder that is complete or absent."""
    from safetensors.torch import save_file

    with scratch.replacement(folder) as new:
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(new)
        else:
            weights = getattr(model, "model", model).state_dict()  # features_only wraps the weights' model
            weights = {name: tensor.contiguous() for name, tensor in weights.items()}
            save_file(weights, new / "model.safetensors")
            (new / "config.json").write_text(json.dumps(backbone_config(model), indent=2) + "\n")


def backbone_config(model: Any) -> dict[str, Any]:
    """What rebuilds a backbone: timm's ``config.json``, or that of a class that timm does not know."""
    from iwin_dit.models.backbone import IwinTransformer3D
    from iwin_dit.models.iwin_transformer import VARIANTS

    arguments = model._model_args
    if isinstance(model, IwinTransformer3D):
        return {"architecture": "IwinTransformer3D", "model_args": arguments}
    told = ("img_size", "depths", "num_heads", "embed_dim")  # a name sets defaults; the arguments decide

    def in_common(name: str) -> int:  # as JSON, where tuples are lists
        return sum(json.dumps(VARIANTS[name][0][key]) == json.dumps(arguments[key]) for key in told)

    name = max(VARIANTS, key=in_common)
    classes = arguments.get("num_classes", 1000)
    return {
        "architecture": name,
        "num_classes": classes,
        "model_args": arguments,
        "pretrained_cfg": VARIANTS[name][1] | {"num_classes": classes},
    }


def main() -> None:
    arguments = parse_arguments()
    if arguments.folder.exists():
        raise ConfigError(f"{arguments.folder} exists; name a new folder, or remove it")
    files.check_writable(arguments.folder, "the folder")
    config = read_config(arguments.config, arguments.kind)

    from iwin_dit import convert

    tensors = convert.load_official(arguments.file)
    try:
        model = getattr(convert, f"from_{arguments.kind}")(tensors, config)
    except ValueError as error:
        raise DataError(f"{arguments.file} with --config {arguments.config}: {error}") from None
    count = sum(parameter.numel() for parameter in model.parameters())
    told = f"{arguments.folder}: {type(model).__name__}, {count:,} parameters"
    if arguments.vae is None:
        save(model, arguments.folder)
        print(told)
        return
    from iwin_dit.build.pipeline import import_pipeline

    import_pipeline(model, arguments.vae, arguments.latents_stats, arguments.folder, arguments.file)
    print(f"{told}; try: python sample.py --checkpoint {arguments.folder} --class 0")
