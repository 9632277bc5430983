"""What diffusers' schedulers need to know of a model: which of them fit it, and their timesteps."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, SchedulerMixin
from torch import Tensor

FLOW_SCHEDULERS = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)


def prediction_type(scheduler: SchedulerMixin) -> str:
    """What the scheduler takes a model's output for: ``flow_prediction``, ``epsilon``, ..."""
    if isinstance(scheduler, FLOW_SCHEDULERS):
        return "flow_prediction"
    return scheduler.config.get("prediction_type", "epsilon")


def check_scheduler(scheduler: SchedulerMixin, trained_for: str | None) -> None:
    """Refuses a scheduler that takes the output for something else than the model was trained to predict."""
    expected = prediction_type(scheduler)
    if trained_for is not None and expected != trained_for:
        raise ValueError(
            f"{type(scheduler).__name__} expects {expected!r}, the model predicts {trained_for!r}: "
            "take a scheduler of the model's objective"
        )


def set_timesteps(scheduler: SchedulerMixin, num_inference_steps: int, device: Any) -> Tensor:
    """Prepares the scheduler; the timesteps, descending.

    Flow matching by Euler takes the sigmas 1, 1 - 1/N, ..., 1/N: left alone, diffusers ends the list at sigma
    0.001 and so wastes one step of N.
    """
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        scheduler.set_timesteps(sigmas=sigmas.tolist(), device=device)
    else:
        scheduler.set_timesteps(num_inference_steps, device=device)
    return scheduler.timesteps


def model_input(scheduler: SchedulerMixin, latents: Tensor, timestep: Tensor) -> Tensor:
    """The latents as the scheduler wants the model to see them."""
    scale = getattr(scheduler, "scale_model_input", None)  # flow matching has none
    return latents if scale is None else scale(latents, timestep)


def step_arguments(scheduler: SchedulerMixin, generator: Any) -> dict[str, Any]:
    """The generator, where this scheduler's steps draw noise."""
    return {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}


def split_sigma(prediction: Tensor, channels: int, scheduler: SchedulerMixin) -> Tensor:
    """Keeps the learned sigma only for the schedulers that use it: ``(B, C or 2 C, ...)``."""
    if scheduler.config.get("variance_type") in ("learned", "learned_range"):
        return prediction
    return prediction[:, :channels]
