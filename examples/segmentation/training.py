"""The run of a recipe: batches that are a function of the step, checkpoints, held-out IoU, the picture."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from ade20k import ADE20K, pad_to_multiple
from picture import draw_predictions
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from shapes import Shapes
from torch import Tensor
from torch.utils.data import DataLoader
from upernet import build_model, confusion, iou_per_class, parameter_groups, poly_rate, segmentation_loss

from iwin_dit.config.common import OptimizerConfig
from iwin_dit.runtime import files
from iwin_dit.runtime.errors import CheckpointError, NonFiniteError
from iwin_dit.runtime.progress import progress, say
from iwin_dit.runtime.seeds import derive_seed
from iwin_dit.training.optimizer import build_optimizer, named_state

PICTURES = 8
MULTIPLE = 32  # what a held-out image's sides are padded to
MAX_GRAD_NORM = 5.0
REMEDY = "lower learning_rate in another output_dir, or go on from the last checkpoint by the same command"


def build_images(recipe: Any) -> tuple[Any, Any]:
    """Images to train on, as many as the run takes, and held-out ones."""
    count = recipe.max_steps * recipe.batch_images
    if recipe.data == "shapes":
        return tuple(
            Shapes(recipe.seed, split, number, recipe.image_size)
            for split, number in (("train", count), ("held-out", recipe.held_out_images))
        )
    return tuple(
        ADE20K(recipe.data_path, split, recipe.image_size, recipe.seed, number)
        for split, number in (("training", count), ("validation", None))
    )


def describe(recipe: Any) -> str:
    """What the run would take."""
    train, held_out = build_images(recipe)
    model = build_model(recipe, len(train.class_names))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{recipe.encoder} with UPerNet, {parameters:,} parameters, {len(train.class_names)} classes; "
        f"{recipe.max_steps} steps of {recipe.batch_images} images, {len(held_out)} held-out images"
    )


def run(recipe: Any, output: Path) -> str:
    """Trains to the last step, from the last checkpoint where there is one; returns the table of IoU."""
    weights, checkpoint = output / "model.safetensors", output / "checkpoint.safetensors"
    if weights.is_file():
        found = files.read_json(output / "results.json", max_bytes=1 << 20)
        return f"{output} is finished: step {recipe.max_steps}\n{table(found)}"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, held_out = build_images(recipe)
    model = build_model(recipe, len(images.class_names)).to(device)
    groups = parameter_groups(model, recipe.weight_decay, recipe.layer_decay)
    options = OptimizerConfig(learning_rate=recipe.learning_rate, betas=tuple(recipe.betas))
    optimizer = build_optimizer(model, groups, options)
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"optimizer/{name}": tensor for name, tensor in named_state(optimizer, model).items()}
    start = read_checkpoint(checkpoint, tensors) if checkpoint.is_file() else 0
    output.mkdir(parents=True, exist_ok=True)
    files.replace(output / "recipe.json", files.to_json(asdict(recipe)))
    if start:
        say(f"going on from step {start}")

    began = time.perf_counter()
    positions = range(start * recipe.batch_images, recipe.max_steps * recipe.batch_images)
    loader = DataLoader(
        images,
        recipe.batch_images,
        sampler=positions,
        num_workers=recipe.num_workers,
        pin_memory=device.type == "cuda",
    )
    bar = progress(loader, desc="train", unit="step", initial=start, total=recipe.max_steps)
    for step, (pixels, masks) in enumerate(bar, start=start):
        torch.manual_seed(derive_seed(recipe.seed, "dropout", step))
        rate = poly_rate(step, recipe.learning_rate, recipe.warmup_steps, recipe.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            logits = model.train()(pixels.to(device))
        loss = segmentation_loss(logits, masks.to(device), recipe.auxiliary_weight)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        if not torch.isfinite(norm):  # of a loss that is not finite, too; nothing was changed by it
            raise NonFiniteError(f"training diverged at step {step}: the gradient is not finite; {REMEDY}")
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        done = step + 1
        if done < recipe.max_steps and done % recipe.save_every_steps == 0:
            store(checkpoint, tensors, {"step": str(done)})
        if (
            recipe.evaluate_every_steps
            and done < recipe.max_steps
            and done % recipe.evaluate_every_steps == 0
        ):
            say(f"step {done}: mIoU {evaluate(model, held_out, device)['miou']:.4f}")
    seconds = time.perf_counter() - began

    found = evaluate(model, held_out, device) | {"steps": recipe.max_steps, "seconds": round(seconds, 1)}
    draw(model, held_out, device).save(output / "predictions.png", optimize=True)
    files.replace(output / "results.json", files.to_json(found))
    store(weights, model.state_dict(), {"encoder": recipe.encoder})
    checkpoint.unlink(missing_ok=True)
    return f"{table(found)}\ntrained {recipe.max_steps - start} steps in {seconds:.0f} s; all in {output}"


def store(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Replaces a safetensors file in one step, by finite values alone.

    Raises:
        NonFiniteError: where one is not; the file stays as it was.
    """
    found = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if found:
        raise NonFiniteError(
            f"training diverged: {len(found)} tensors are not finite, such as {found[0]}; {path} was not "
            f"replaced; {REMEDY}"
        )
    content = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    files.replace(path, save(content, header))


def read_checkpoint(path: Path, tensors: dict[str, Tensor]) -> int:
    """Copies what it holds into the tensors; returns its step.

    Raises:
        CheckpointError: where it is damaged, or of another network.
    """
    try:
        with safe_open(path, "pt") as stored:
            found = {name: stored.get_tensor(name) for name in tensors}
            step = int(stored.metadata()["step"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; remove it, or take another output_dir") from None
    for name, tensor in tensors.items():
        if found[name].shape != tensor.shape or not torch.isfinite(found[name]).all():
            raise CheckpointError(
                f"{path} has {name} of another shape, or not finite; remove it, or take another output_dir"
            )
        with torch.no_grad():
            tensor.copy_(found[name])
    return step


@torch.no_grad()
def predict(model: torch.nn.Module, held_out: Any, device: torch.device, numbers: Any) -> Iterator[Any]:
    """Image ``(3, h, w)``, truth and prediction ``(H, W)``, one held-out image at a time."""
    model.eval()
    for number in numbers:
        pixels, mask = held_out[number]
        logits = model(pad_to_multiple(pixels[None], MULTIPLE).to(device))[0]
        logits = logits[..., : pixels.shape[1], : pixels.shape[2]].float()
        if logits.shape[-2:] != mask.shape:
            logits = F.interpolate(logits, mask.shape, mode="bilinear")
        yield pixels, mask, logits[0].argmax(0).cpu()


def evaluate(model: torch.nn.Module, held_out: Any, device: torch.device) -> dict[str, Any]:
    """IoU of each class over all pixels of all held-out images, and the mean over classes that occur."""
    names = held_out.class_names
    counts = torch.zeros(len(names), len(names), dtype=torch.long)
    numbers = progress(range(len(held_out)), desc="held-out", unit="image", leave=False)
    for _, mask, found in predict(model, held_out, device, numbers):
        counts += confusion(found, mask, len(names))
    values = iou_per_class(counts)
    iou = {
        name: None if value != value else round(value, 4)
        for name, value in zip(names, values.tolist(), strict=True)
    }
    return {"miou": round(values.nanmean().item(), 4), "iou": iou, "held_out_images": len(held_out)}


def draw(model: torch.nn.Module, held_out: Any, device: torch.device) -> Any:
    """The first held-out images with truth and prediction."""
    std, mean = (torch.tensor(values)[:, None, None] for values in (held_out.std, held_out.mean))
    rows = []
    for pixels, mask, found in predict(model, held_out, device, range(min(PICTURES, len(held_out)))):
        shown = (255 * (pixels * std + mean)).round().clamp(0, 255).byte().permute(1, 2, 0)
        rows.append(tuple(np.asarray(panel) for panel in (shown, mask.byte(), found.byte())))
    return draw_predictions(rows, held_out.class_names)


def table(found: dict[str, Any]) -> str:
    """IoU per class, and the mean."""
    rows = [(name, "-" if value is None else f"{value:.4f}") for name, value in found["iou"].items()]
    rows += [("mean", f"{found['miou']:.4f}")]
    width = max(len(name) for name, _ in rows)
    title = f"IoU on {found['held_out_images']} held-out images"
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)])
