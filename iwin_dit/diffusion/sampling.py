"""What diffusers' schedulers need to know of a model: which of them fit it, and their timesteps."""

from __future__ import annotations

import inspect
from typing import Any, TypeAlias

import diffusers
import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from iwin_dit.diffusion.specs import FLOW, NOISE, SAMPLERS

DDIM_AND_DDPM = (DDIMScheduler, DDPMScheduler)
# Settings of a noise schedule: those that every scheduler of noise prediction has, those of which steps are
# taken, which two have alike, and those that not every scheduler has.
BETAS = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
SPACING = ("timestep_spacing", "steps_offset")
OF_ONE_SCHEDULER = (
    *("use_dynamic_shifting", "invert_sigmas", "shift_terminal", "use_karras_sigmas"),
    *("use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "sigma_min", "sigma_max"),
)


Scheduler: TypeAlias = Any  # one of diffusers', whose common class promises no method


def make_scheduler(prediction_type: str, sampler: str | None = None, **changes: Any) -> Scheduler:
    """The scheduler of a sampler, for models that predict this.

    Args:
        prediction_type: a key of :data:`~iwin_dit.diffusion.specs.SAMPLERS`.
        sampler: one of its names; the first where None is given.
        changes: of the scheduler's arguments.

    Raises:
        ValueError: where there is no such sampler, with those that there are.
    """
    samplers = SAMPLERS.get(prediction_type, {})
    chosen = samplers.get(sampler) if sampler else next(iter(samplers.values()), None)
    if chosen is None:
        raise ValueError(
            f"{prediction_type} has no sampler {sampler!r}; it has {', '.join(samplers) or 'none'}"
        )
    return getattr(diffusers, chosen.scheduler)(**{**chosen.options, **changes})


def published_scheduler(prediction_type: str) -> Scheduler:
    """That of published models, and of pipelines that version 0.1 saved: DDPM's begins at 1000 - 1000 / N."""
    changes = {"timestep_spacing": "leading"} if prediction_type == NOISE else {}
    return make_scheduler(prediction_type, **changes)


def prediction_type(scheduler: Scheduler) -> str:
    """What the scheduler takes a model's output for: ``flow_prediction``, ``epsilon``, ..."""
    if type(scheduler).__name__.startswith("FlowMatch"):  # made for nothing else, as its config does not say
        return FLOW
    return scheduler.config.get("prediction_type", "epsilon")


def check_scheduler(scheduler: Scheduler, trained_for: str | None) -> None:
    """Refuses a scheduler that takes the output for something else than the model was trained to predict."""
    expected = prediction_type(scheduler)
    if trained_for is not None and expected != trained_for:
        raise ValueError(
            f"{type(scheduler).__name__} expects {expected!r}, the model predicts {trained_for!r}: "
            "take a scheduler of the model's objective"
        )


def with_schedule_of(scheduler: Scheduler, before: Scheduler) -> Scheduler:
    """A scheduler with the noise schedule of another one, which it replaces.

    Carried over are the shift of flow matching, or the betas; between DDPM and DDIM also which timesteps are
    taken. A scheduler of the same class is left as it is.

    Raises:
        ValueError: where the other one's schedule has a setting that this one does not have.
    """
    if type(scheduler) is type(before):
        return before
    old, name = before.config, type(before).__name__
    odd = [key for key in OF_ONE_SCHEDULER if old.get(key)]
    if odd:
        raise ValueError(
            f"the pipeline's {name} has {odd[0]} {old[odd[0]]}, which {type(scheduler).__name__} cannot take "
            "over; keep the pipeline's own sampler"
        )
    kept = {"num_train_timesteps": old["num_train_timesteps"]}
    if prediction_type(before) == FLOW:
        shift = old.get("flow_shift", old.get("shift", 1.0))
        kept["flow_shift" if "flow_shift" in scheduler.config else "shift"] = shift
    else:
        alike = isinstance(scheduler, DDIM_AND_DDPM) and isinstance(before, DDIM_AND_DDPM)
        kept |= {key: old[key] for key in (*BETAS, *(SPACING if alike else ())) if key in old}
    return type(scheduler).from_config(scheduler.config, **kept)


def set_timesteps(scheduler: Scheduler, num_inference_steps: int, device: torch.device | str) -> Tensor:
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


def model_timesteps(scheduler: Scheduler) -> Tensor:
    """The timesteps that the model is asked about: ``1000 t`` in flow matching, integers of DDPM.

    On flows DPM++ and UniPC round the timesteps by which they count their steps to integers, but compute with
    the exact times, their sigmas.
    """
    if scheduler.config.get("use_flow_sigmas"):
        return scheduler.sigmas[: len(scheduler.timesteps)] * scheduler.config.num_train_timesteps
    return scheduler.timesteps


def times(scheduler: Scheduler) -> list[float]:
    """The times t in [0, 1] of the steps, with t = 1 noise.

    Where DDPM's integers end each stride, as with ``trailing`` spacing, 999 is pure noise and so t = 1.
    """
    discrete = prediction_type(scheduler) != FLOW
    first = 1 if discrete and scheduler.config.get("timestep_spacing") == "trailing" else 0
    return ((model_timesteps(scheduler).double() + first) / scheduler.config.num_train_timesteps).tolist()


def step_arguments(scheduler: Scheduler, generator: object) -> dict[str, Any]:
    """The generator, where this scheduler's steps draw noise."""
    return {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}


def split_sigma(prediction: Tensor, channels: int, scheduler: Scheduler) -> Tensor:
    """Keeps the learned sigma only for the schedulers that use it: ``(B, C or 2 C, ...)``."""
    if scheduler.config.get("variance_type") in ("learned", "learned_range"):
        return prediction
    return prediction[:, :channels]
