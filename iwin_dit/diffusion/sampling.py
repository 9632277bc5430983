"""What diffusers' schedulers need to know of a model: which of them fit it, and their timesteps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from inspect import signature
from itertools import pairwise
from typing import Any, TypeAlias

import diffusers
import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from iwin_dit.diffusion.sde import LAST_STEP, FlowMatchEulerMaruyamaScheduler
from iwin_dit.diffusion.specs import DATA, FLOW, MIN_TIME, NOISE, NUM_TRAIN_TIMESTEPS, SAMPLERS

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


def make_scheduler(
    prediction_type: str, sampler: str | None = None, shift: float = 1.0, **changes: Any
) -> Scheduler:
    """The scheduler of a sampler, for models that predict this.

    Args:
        prediction_type: a key of :data:`~iwin_dit.diffusion.specs.SAMPLERS`.
        sampler: one of its names; the first where None is given.
        shift: of the times of a flow: above 1 more of the steps are taken where there is much noise.
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
    if shift != 1:
        changes[_shift_key(chosen.options)] = shift
    return scheduler_class(chosen.scheduler)(**{**chosen.options, **changes})


def scheduler_class(name: str) -> type[Scheduler]:
    """The class of this name: ours, or one of diffusers."""
    ours = FlowMatchEulerMaruyamaScheduler
    return ours if name == ours.__name__ else getattr(diffusers, name)


def _shift_key(options: Mapping[str, Any]) -> str:
    """What a scheduler of flows calls the shift."""
    return "flow_shift" if options.get("use_flow_sigmas") else "shift"


def with_shift(scheduler: Scheduler, shift: float) -> Scheduler:
    """The same scheduler with another shift of its times.

    Raises:
        ValueError: where it is not one of flows.
    """
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"the shift is {shift}, expected a number above 0; 1 is without")
    if prediction_type(scheduler) != FLOW:
        raise ValueError(f"{type(scheduler).__name__} has no shift, which flow matching alone has")
    return type(scheduler).from_config(scheduler.config, **{_shift_key(scheduler.config): shift})


def published_scheduler(prediction_type: str) -> Scheduler:
    """That of published models, and of pipelines that version 0.1 saved: DDPM's begins at 1000 - 1000 / N."""
    changes: dict[str, Any] = {"timestep_spacing": "leading"} if prediction_type == NOISE else {}
    return make_scheduler(prediction_type, **changes)


def prediction_type(scheduler: Scheduler) -> str:
    """What the scheduler takes a model's output for: ``flow_prediction``, ``epsilon``, ..."""
    if type(scheduler).__name__.startswith("FlowMatch"):  # made for nothing else, as its config does not say
        return FLOW
    return scheduler.config.get("prediction_type", "epsilon")


def check_scheduler(scheduler: Scheduler, trained_for: str | None) -> None:
    """Refuses a scheduler that takes the output for something else than the model was trained to predict."""
    expected = prediction_type(scheduler)
    if trained_for is not None and expected != (FLOW if trained_for == DATA else trained_for):
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
        kept[_shift_key(scheduler.config)] = shift
    else:
        alike = isinstance(scheduler, DDIM_AND_DDPM) and isinstance(before, DDIM_AND_DDPM)
        kept |= {key: old[key] for key in (*BETAS, *(SPACING if alike else ())) if key in old}
    return type(scheduler).from_config(scheduler.config, **kept)


def set_timesteps(
    scheduler: Scheduler,
    num_inference_steps: int,
    device: torch.device | str,
    sigmas: Sequence[float] | None = None,
    timesteps: Sequence[int] | None = None,
) -> Tensor:
    """Prepares the scheduler; the timesteps, descending.

    Sigmas or timesteps that are given are taken instead of so many steps, as diffusers' own pipelines do.

    Flow matching by Euler takes the sigmas 1, 1 - 1/N, ..., 1/N: left alone, diffusers ends the list at sigma
    0.001 and so wastes one step of N. By Euler and Maruyama the last one is that of their last step.

    Raises:
        ValueError: for sigmas or timesteps that the scheduler does not take, or that are no descending times.
    """
    if sigmas is not None or timesteps is not None:
        scheduler.set_timesteps(**_given(scheduler, sigmas, timesteps), device=device)
    elif isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        is_sde = isinstance(scheduler, FlowMatchEulerMaruyamaScheduler)
        evenly = np.linspace(1.0, LAST_STEP if is_sde else 1 / num_inference_steps, num_inference_steps)
        scheduler.set_timesteps(sigmas=evenly.tolist(), device=device)
    else:
        scheduler.set_timesteps(num_inference_steps, device=device)
    return scheduler.timesteps


def _given(
    scheduler: Scheduler, sigmas: Sequence[float] | None, timesteps: Sequence[int] | None
) -> dict[str, np.ndarray]:
    """The argument of the scheduler's ``set_timesteps``: sigmas of flows, timesteps of noise."""
    is_flow, most = prediction_type(scheduler) == FLOW, scheduler.config.num_train_timesteps
    key = "sigmas" if is_flow else "timesteps"
    values, others = (sigmas, timesteps) if is_flow else (timesteps, sigmas)
    if values is None or others is not None or key not in signature(scheduler.set_timesteps).parameters:
        found = " and ".join(["sigmas"] * (sigmas is not None) + ["timesteps"] * (timesteps is not None))
        raise ValueError(
            f"{type(scheduler).__name__} does not take {found}; flows take sigmas by euler, euler_maruyama "
            "and unipc, models of noise take timesteps by ddpm and dpm++"
        )
    values = list(values)
    in_range = all(0 < value <= 1 if is_flow else value in range(most) for value in values)
    if not values or not in_range or any(after >= before for before, after in pairwise(values)):
        expected = "in (0, 1]" if is_flow else f"whole, from {most - 1} to 0"
        raise ValueError(f"{key} are {values!r:.100}, expected descending numbers {expected}")
    return {key: np.array(values)}  # UniPC takes no list


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


def velocity(data: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
    """That of a flow at ``x_t``, from the data: ``(x_t - x_0) / max(t, MIN_TIME)``.

    Args:
        data: x_0, or what a model takes for it, ``(B, C, ...)``.
        noisy: x_t.
        t: times in [0, 1], which broadcast.
    """
    return (noisy - data) / t.clamp(min=MIN_TIME)


def of_velocity(model: Any) -> Any:
    """A model of flows that predicts data, called in the same way, as one that predicts the velocity."""

    def call(
        latents: Tensor, timestep: Tensor, *arguments: Any, return_dict: bool = True, **options: Any
    ) -> Any:
        output = model(latents, timestep, *arguments, **options)
        t = (timestep.float() / NUM_TRAIN_TIMESTEPS).view(-1, *[1] * (latents.ndim - 1))
        for name, data in list(output.items()):
            output[name] = velocity(data, latents, t).to(data.dtype)
        return output if return_dict else output.to_tuple()

    return call


def step_arguments(scheduler: Scheduler, generator: object) -> dict[str, Any]:
    """The generator, where this scheduler's steps draw noise."""
    return {"generator": generator} if "generator" in signature(scheduler.step).parameters else {}


def split_sigma(prediction: Tensor, channels: int, scheduler: Scheduler) -> Tensor:
    """Keeps the learned sigma only for the schedulers that use it: ``(B, C or 2 C, ...)``."""
    if scheduler.config.get("variance_type") in ("learned", "learned_range"):
        return prediction
    return prediction[:, :channels]
