"""Trains Mask R-CNN on an Iwin Transformer, or on any other hierarchical model of timm, and evaluates it.

``python examples/detection/train.py`` takes drawn shapes and some minutes on a CPU; ``--recipe coco_1x --coco
FOLDER`` is for COCO, on several GPUs with ``accelerate launch``.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mask_rcnn_recipes import RECIPES, Recipe

from iwin_dit.config.bounds import check_options
from iwin_dit.runtime import files
from iwin_dit.runtime.errors import ConfigError, NonFiniteError, Parser, run_script
from iwin_dit.runtime.progress import progress, say


def parse_arguments(command: Sequence[str] | None = None) -> tuple[argparse.Namespace, Recipe]:
    """The options, and the recipe with those that change it."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--recipe", choices=RECIPES, default="shapes", help="a row of mask_rcnn_recipes.py (shapes)")
    add("--coco", type=Path, help="folder with train2017/, val2017/ and annotations/ (drawn shapes)")
    add("--splits", nargs=2, default=("train2017", "val2017"), metavar=("TRAIN", "HELD_OUT"), help="of COCO")
    add("--images", type=int, default=3600, help="drawn images to train on (3600)")
    add("--test-images", type=int, default=200, help="drawn images that are held out (200)")
    add("--model", help="a name of timm's (iwin_tiny_patch4_window7_224)")
    add("--model-options", type=json.loads, help="its arguments as JSON: '{\"drop_path_rate\": 0.1}'")
    add("--pretrained", default="", metavar="FILE", help="safetensors of a classifier for the backbone")
    add("--weights", type=Path, metavar="FILE", help="begin with this detector; with --epochs 0, evaluate it")
    add("--epochs", type=int, help="(by recipe)")
    add("--batch-images", type=int, help="images of one step, over all processes (by recipe)")
    add("--accumulate", type=int, default=1, help="passes that share the images of one step (1)")
    add("--learning-rate", type=float, help="(by recipe)")
    add("--weight-decay", type=float, help="(by recipe)")
    add("--sizes", type=int, nargs="+", help="short sides in pixels, the last to evaluate (by recipe)")
    add("--max-size", type=int, help="of the long side (by recipe)")
    add("--seed", type=int, default=0, help="of weights, images and their order (0)")
    add("--workers", type=int, default=0, help="processes that read images (0)")
    add("--out", type=Path, default=Path("runs/detection"), help="folder for the results (runs/detection)")
    arguments = parser.parse_args(command)
    base, given = RECIPES[arguments.recipe], vars(arguments)
    own = {f.name: given[f.name] for f in dataclasses.fields(Recipe) if given.get(f.name) is not None}
    if "model" in own:
        own.setdefault("model_options", {})
    if "sizes" in own:
        own.setdefault("max_size", max(base.max_size, *own["sizes"]))
    recipe = dataclasses.replace(base, **own)
    check(arguments, recipe)
    return arguments, recipe


def check(arguments: argparse.Namespace, recipe: Recipe) -> None:
    """Raises ConfigError for what cannot work."""
    if recipe.epochs < 0:
        raise ConfigError(f"--epochs is {recipe.epochs}, expected at least 0")
    for name in ("images", "test_images", "batch_images", "accumulate", "max_size"):
        value = getattr(recipe if hasattr(recipe, name) else arguments, name)
        if value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}, expected at least 1")
    if (least := min(recipe.sizes)) < 32:
        raise ConfigError(f"--sizes has {least}, expected at least 32, the stride of the last map")
    if not isinstance(recipe.model_options, dict):
        raise ConfigError(f"--model-options is {recipe.model_options!r}, expected a JSON object")
    check_options(recipe.model_options, "--model-options")
    if arguments.recipe != "shapes" and arguments.coco is None:
        raise ConfigError(f"--recipe {arguments.recipe} needs --coco FOLDER")
    for path in filter(None, (arguments.weights, arguments.pretrained)):
        if not Path(path).is_file():
            raise ConfigError(f"{path} is no file")
        if Path(path).suffix != ".safetensors":  # timm takes other files, too, some of which can run code
            raise ConfigError(f"{path} is no .safetensors file, and no other is read here")
    files.check_writable(arguments.out, "--out")


def build_model(arguments: argparse.Namespace, recipe: Recipe, num_classes: int):
    """The detector, with the weights that the options name."""
    import timm
    from mask_rcnn import build_detector
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not timm.is_model(recipe.model):
        close = difflib.get_close_matches(recipe.model, timm.list_models(), 1)
        hint = f"; did you mean {close[0]}" if close else ""
        raise ConfigError(f"--model {recipe.model} is not known to timm{hint}")
    try:
        model = build_detector(recipe, num_classes, arguments.pretrained)
        if arguments.weights is not None:
            model.load_state_dict(load_file(arguments.weights))
    except (ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{recipe.model} with {dict(recipe.model_options)}: {error}") from None
    return model


def build_data(arguments: argparse.Namespace, recipe: Recipe):
    """The images to train on and the held-out ones."""
    if arguments.coco is not None:
        from coco_instances import CocoInstances

        train, held_out = arguments.splits
        return CocoInstances(arguments.coco, train, skip_empty=True), CocoInstances(arguments.coco, held_out)
    from drawn_instances import HELD_OUT, DrawnInstances

    size = recipe.sizes[-1]
    return (
        DrawnInstances(arguments.seed, 0, arguments.images, size),
        DrawnInstances(arguments.seed, HELD_OUT, arguments.test_images, size),
    )


def train(accelerator, model, dataset, recipe: Recipe, arguments: argparse.Namespace):
    """AdamW with warm-up and drops; the weights are written after each epoch. Returns the trained model."""
    import torch

    share = accelerator.num_processes * arguments.accumulate
    if recipe.batch_images % share:
        raise ConfigError(f"--batch-images is {recipe.batch_images}, expected a multiple of {share}, "
                          "processes times --accumulate")  # fmt: skip
    loader = build_loader(dataset, recipe.batch_images // share, arguments.workers, training=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        dict(params=[p for p in parameters if p.ndim > 1], weight_decay=recipe.weight_decay),
        dict(params=[p for p in parameters if p.ndim <= 1], weight_decay=0.0),
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps = max(1, recipe.epochs * -(-len(loader) // arguments.accumulate))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda n: recipe.rate(n, steps))
    bar = progress(total=steps, desc="training", unit="step", disable=not accelerator.is_main_process)
    wrapped.train()
    for _ in range(recipe.epochs):
        for images, targets in loader:
            with accelerator.accumulate(wrapped):
                losses = wrapped(images, targets)
                loss = sum(losses.values())
                if not loss.isfinite():
                    raise NonFiniteError(f"losses are {losses}; lower --learning-rate")
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
        if accelerator.is_main_process:
            save(model, recipe, dataset.class_names, arguments.out / "model.safetensors")
    bar.close()
    return model


def build_loader(dataset, batch_size: int, workers: int, training: bool):
    """Batches as lists of images and of targets; in training in random order, half of them mirrored."""
    import torch
    from mask_rcnn import collate, collate_mirrored

    return torch.utils.data.DataLoader(
        dataset,
        batch_size,
        shuffle=training,
        num_workers=workers,
        collate_fn=collate_mirrored if training else collate,
    )


def save(model, recipe: Recipe, class_names: Sequence[str], path: Path) -> None:
    """The weights as safetensors, with the recipe and the classes in its header.

    Raises:
        NonFiniteError: where they are not finite; the file stays as it was.
    """
    import torch
    from safetensors.torch import save as to_bytes

    wrong = [name for name, value in model.state_dict().items() if not torch.isfinite(value).all()]
    if wrong:
        raise NonFiniteError(
            f"training diverged: {len(wrong)} weights are not finite, such as {wrong[0]}; {path} was not "
            "replaced; lower --learning-rate"
        )
    header = dict(recipe=json.dumps(dataclasses.asdict(recipe)), classes=json.dumps(class_names))
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    files.replace(path, to_bytes(weights, header))


def main(command: Sequence[str] | None = None) -> None:
    arguments, recipe = parse_arguments(command)

    from accelerate import Accelerator
    from accelerate.utils import set_seed

    try:
        from detection_report import draw_predictions, find_all, table
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is missing; pip install 'iwin-dit[examples]'") from None

    begin = time.perf_counter()
    accelerator = Accelerator(gradient_accumulation_steps=arguments.accumulate)
    set_seed(arguments.seed)
    trained_on, held_out = build_data(arguments, recipe)
    model = build_model(arguments, recipe, len(held_out.class_names))
    arguments.out.mkdir(parents=True, exist_ok=True)
    model = train(accelerator, model, trained_on, recipe, arguments).to(accelerator.device)
    batch = max(1, recipe.batch_images // accelerator.num_processes)
    found = find_all(accelerator, model, build_loader(held_out, batch, arguments.workers, training=False))
    if accelerator.is_main_process:
        figures = table(held_out, found)
        report: dict[str, Any] = dict(recipe=dataclasses.asdict(recipe), seed=arguments.seed, **figures)
        report |= dict(held_out_images=len(held_out), minutes=(time.perf_counter() - begin) / 60)
        files.replace(arguments.out / "report.json", files.to_json(report))
        draw_predictions(model, held_out, arguments.out / "predictions.png")
        say(f"{report['minutes']:.1f} minutes; weights, report and predictions.png are in {arguments.out}")
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main)
