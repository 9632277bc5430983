"""Trains UPerNet on an Iwin Transformer, or any encoder of timm, and reports the IoU of every class.

Run as ``python examples/segmentation/train.py [--config FILE] [--key value]``. The same command goes on where
an interrupted run stopped.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from iwin_dit.config.bounds import check_options
from iwin_dit.config.parse import parse_arguments
from iwin_dit.runtime import files
from iwin_dit.runtime.errors import ConfigError, run_script

SHAPES = Path(__file__).parent / "shapes.yaml"


@dataclass(frozen=True)
class Recipe:
    """Everything that a run depends on.

    Args:
        output_dir: where the weights, the figures and the picture go.
        seed: of initial weights, data order and augmentation.
        data: ``shapes`` are drawn; ``ade20k`` is read from ``data_path``.
        data_path: the folder ADEChallengeData2016.
        image_size: side of a training image; of a held-out one, its shorter side.
        held_out_images: of drawn shapes; ADE20K has 2000.
        encoder: any of timm's names.
        encoder_options: what else its constructor takes, such as ``{drop_path_rate: 0.2}``.
        init_from: a classifier to begin with: a run of train_classifier.py, or a file of timm or the authors.
        pretrained: begin with timm's weights for this name, from the hub.
        decoder_channels: width of the decoder.
        auxiliary_weight: of the second head's loss, which reads the encoder's last map but one.
        learning_rate: at its peak; AdamW.
        betas: of AdamW; a short run wants a shorter memory.
        weight_decay: of matrices and kernels.
        layer_decay: each of the encoder's layers learns at this times the next one's rate; 1 for the same.
        warmup_steps: of the learning rate, which then falls to zero in a straight line.
        max_steps: of the run.
        batch_images: of a step.
        precision: ``bf16`` by autocast.
        num_workers: processes that make images.
        evaluate_every_steps: also during training; 0 for only at the end.
        save_every_steps: what an interrupted run goes on from.
    """

    output_dir: str = "runs/segmentation"
    seed: int = 0
    data: Literal["shapes", "ade20k"] = "shapes"
    data_path: str | None = None
    image_size: int = 64
    held_out_images: int = 256
    encoder: str = "iwin_tiny_patch4_window7_224"
    encoder_options: dict[str, Any] = field(default_factory=dict)
    init_from: str | None = None
    pretrained: bool = False
    decoder_channels: int = 512
    auxiliary_weight: float = 0.4
    learning_rate: float = 6e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    layer_decay: float = 1.0
    warmup_steps: int = 1500
    max_steps: int = 160_000
    batch_images: int = 16
    precision: Literal["fp32", "bf16"] = "fp32"
    num_workers: int = 0
    evaluate_every_steps: int = 0
    save_every_steps: int = 1000

    def check(self) -> None:
        """All rules. Raises ConfigError."""
        for f in fields(self):
            value = getattr(self, f.name)
            low = 0 if f.name in ZERO_OR_MORE else None
            if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0 and value != low:
                raise ConfigError(f"{f.name} is {value}, expected {'0 or more' if low == 0 else 'above 0'}")
        check_options(self.encoder_options, "encoder_options")
        if self.layer_decay > 1:
            raise ConfigError(f"layer_decay is {self.layer_decay}, expected at most 1")
        if self.batch_images < 2:
            raise ConfigError("batch_images is 1, but batch norm over one image is unsound; take 2 or more")
        if (self.data == "ade20k") != (self.data_path is not None):
            raise ConfigError(
                f"data is {self.data} and data_path {self.data_path}: ade20k is read from a "
                "folder, shapes are drawn without one"
            )


ZERO_OR_MORE = (
    *("seed", "auxiliary_weight", "weight_decay", "warmup_steps", "num_workers"),
    "evaluate_every_steps",
)


def main() -> int:
    recipe, dry_run = parse_arguments(sys.argv[1:], default=SHAPES, kind=Recipe)
    output, content = Path(recipe.output_dir), files.to_json(asdict(recipe))
    files.check_writable(output, "output_dir")
    if (output / "recipe.json").is_file() and (output / "recipe.json").read_bytes() != content:
        raise ConfigError(f"output_dir {output} holds a run of another recipe; take another folder")

    try:
        import segmentation_models_pytorch  # noqa: F401
    except ImportError:
        raise ConfigError('segmentation-models-pytorch is missing; pip install -e ".[examples]"') from None
    from training import describe, run

    if dry_run:
        print(describe(recipe))
        return 0
    print(run(recipe, output))
    return 0


if __name__ == "__main__":
    run_script(main)
