"""The options of ``sample`` and ``evaluate`` that say how a model draws; its own recipe says the rest."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_args

from iwin_dit.config.schema import SampleConfig
from iwin_dit.diffusion.specs import GuidanceName

if TYPE_CHECKING:
    from iwin_dit.pipelines.base import ClassConditionalPipeline

ALL = "all"
FROM_RECIPE = {  # options of the command by their keys in a recipe, which are the arguments of the pipeline
    "num_inference_steps": "steps",
    "guidance_scale": "guidance_scale",
    "guidance_interval": "guidance_interval",
    "guidance_channels": "guidance_channels",
    "internal_guidance": "internal_guidance",
    "guidance": "guidance",
    "guidance_rescale": "guidance_rescale",
    "path_drop": "path_drop",
}


def add_drawing_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that both commands have; those that are not given stay None."""
    group = parser.add_argument_group(
        "how the model draws", "What is not given is as in the recipe of the run, or of the pipeline."
    )
    add: Callable[..., Any] = group.add_argument
    add("--sampler", help="euler, heun, dpm++, unipc, euler_maruyama; of DDPM ddim, ddpm, dpm++")
    add("--steps", type=int, help="steps of the sampler")
    add("--guidance-scale", type=float, help="1 is without guidance")
    low_high = dict(nargs=2, type=float, metavar=("LOW", "HIGH"))
    add("--guidance-interval", **low_high, help="times in which guidance acts, such as 0 1; 1 is noise")
    channels = dict(type=_channels, metavar="NUMBER|all")
    add("--guidance-channels", **channels, help="guide the first so many latent channels, or all")
    add("--internal-guidance", type=float, help="of a head inside the model (base_block); 1 is without")
    add("--guidance", choices=get_args(GuidanceName), help="how a prediction is pushed")
    add("--guidance-rescale", type=float, help="share that gets back the unguided deviation")
    path_drop = dict(action=argparse.BooleanOptionalAction, default=None)
    add("--path-drop", **path_drop, help="what guidance leaves behind skips the blocks between dense_blocks")
    add("--shift", type=float, help="of the times of flow matching: above 1 more steps where there is noise")
    add("--guide", metavar="CHECKPOINT", help="autoguidance: a smaller or less trained model guides")
    add("--ema", help="the average of this decay of a run; none: the weights themselves (the first average)")
    add("--ema-std", type=float, help="average the weights anew, to this relative standard deviation")


def _channels(text: str) -> int | str:
    return text if text == ALL else int(text)


def settle(arguments: argparse.Namespace, recipe: SampleConfig) -> dict[str, Any]:
    """Sets the options that are not given as the recipe has them.

    Returns:
        all of them, as arguments of the pipeline's call.
    """
    for key, option in FROM_RECIPE.items():
        if getattr(arguments, option) is None:
            value = getattr(recipe, key)
            setattr(arguments, option, ALL if value is None else value)
    settled = {key: getattr(arguments, option) for key, option in FROM_RECIPE.items()}
    channels = settled["guidance_channels"]
    return settled | {
        "guidance_interval": tuple(arguments.guidance_interval),
        "guidance_channels": None if channels == ALL else channels,
    }


def describe_scheduler(pipeline: ClassConditionalPipeline) -> dict[str, Any]:
    """The solver that draws, with its settings, such as the shift of its times."""
    settings = {name: value for name, value in pipeline.scheduler.config.items() if name[0] != "_"}
    return {"scheduler": type(pipeline.scheduler).__name__, "scheduler_settings": settings}
