"""The objectives and the samplers by their names.

Imports no torch, so that a config can use it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

NUM_TRAIN_TIMESTEPS = 1000  # of DDPM; flow matching tells the model 1000 t
GUIDANCE_SCALE, NUM_INFERENCE_STEPS = 4.0, 50  # of sampling, where neither a recipe nor a call says more
GuidanceName = Literal["cfg", "cfg_zero_star", "apg"]
FLOW, NOISE, DATA = "flow_prediction", "epsilon", "sample"  # what models predict, in diffusers' words
MIN_TIME = 0.05  # of models of flows that predict the data: velocities are (x_t - x_0) / max(t, MIN_TIME)


@dataclass(frozen=True)
class Sampler:
    """A scheduler: the name of its class, of diffusers or of this package, and its arguments."""

    scheduler: str
    options: Mapping[str, Any] = field(default_factory=dict)


# Trailing timesteps begin at pure noise, from which sampling begins (Lin et al. 2024, section 3.3).
BETA_START, BETA_END = 1e-4, 0.02
BETAS = dict(
    beta_start=BETA_START,
    beta_end=BETA_END,
    beta_schedule="linear",
    num_train_timesteps=NUM_TRAIN_TIMESTEPS,
)
TRAILING = BETAS | dict(clip_sample=False, timestep_spacing="trailing")
ON_FLOWS = dict(prediction_type=FLOW, use_flow_sigmas=True)

SAMPLERS: dict[str, dict[str, Sampler]] = {  # by what the model predicts; the first is the default
    FLOW: {
        "euler": Sampler("FlowMatchEulerDiscreteScheduler", dict(num_train_timesteps=NUM_TRAIN_TIMESTEPS)),
        "heun": Sampler("FlowMatchHeunDiscreteScheduler", dict(num_train_timesteps=NUM_TRAIN_TIMESTEPS)),
        "euler_maruyama": Sampler(
            "FlowMatchEulerMaruyamaScheduler", dict(num_train_timesteps=NUM_TRAIN_TIMESTEPS)
        ),
        "dpm++": Sampler("DPMSolverMultistepScheduler", ON_FLOWS),
        "unipc": Sampler("UniPCMultistepScheduler", ON_FLOWS),
    },
    NOISE: {
        "ddpm": Sampler("DDPMScheduler", TRAILING | dict(variance_type="learned_range")),
        "ddim": Sampler("DDIMScheduler", TRAILING | dict(set_alpha_to_one=True)),
        "dpm++": Sampler("DPMSolverMultistepScheduler", BETAS),
    },
}
SAMPLERS[DATA] = SAMPLERS[FLOW]  # which are given the velocity


@dataclass(frozen=True)
class ObjectiveKind:
    """What a config knows of an objective.

    Args:
        implementation: its class, an :class:`~iwin_dit.diffusion.objective.Objective`: module, colon and
            name.
        prediction_type: what the model predicts, a key of :data:`SAMPLERS`.
        fields: of :class:`ObjectiveConfig` that it takes.
        outputs: channels of the prediction for each channel of the latent; 2 where it learns sigma.
    """

    implementation: str
    prediction_type: str
    fields: tuple[str, ...] = ()
    outputs: int = 1


OBJECTIVES: dict[str, ObjectiveKind] = {
    "flow_matching": ObjectiveKind(
        "iwin_dit.diffusion.flow_matching:FlowMatching",
        FLOW,
        fields=(
            "prediction",
            "time_sampling",
            "logit_mean",
            "logit_std",
            "shift",
            "cosine_weight",
            "base_weight",
        ),
    ),
    "ddpm": ObjectiveKind("iwin_dit.diffusion.ddpm:DDPM", NOISE, fields=("base_weight",), outputs=2),
}


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the model learns to predict.

    Args:
        name: of :data:`OBJECTIVES`: ``flow_matching`` (velocity), or ``ddpm`` (noise and learned sigma).
        prediction: what the network of flow matching returns: the ``velocity``; or the ``data``, from which
            the velocity follows, whose error is the loss all the same (JiT, arXiv 2511.13720). It is for
            pixels, and for latents of many channels.
        time_sampling: density of the times in flow matching.
        logit_mean: of the logit-normal density; above 0 favours noise.
        logit_std: of the logit-normal density.
        shift: moves the times of training towards noise, ``t -> a t / (1 + (a - 1) t)``: the more numbers
            a latent has, the more noise hides it (Esser et al. 2024, section 5.3.2). ``auto`` is
            sqrt(C H W / 4096) of the latents (RAE, arXiv 2510.11690). LightningDiT's 0.3 is 1 / 0.3 here.
        cosine_weight: weight of ``1 - cosine similarity`` over the channels of prediction and target, which
            LightningDiT adds with weight 1 (Yao et al. 2025, section 4).
        base_weight: weight of the error of the head inside the model, of ``model.base_block``.
    """

    name: str = "flow_matching"
    prediction: Literal["velocity", "data"] = "velocity"
    time_sampling: Literal["uniform", "logit_normal"] = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float | Literal["auto"] = 1.0
    cosine_weight: float = 0.0
    base_weight: float = 0.5

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            raise ValueError(f"objective.name is {self.name!r}, expected one of {', '.join(OBJECTIVES)}")

    def shift_of(self, channels: int, height: int, width: int) -> float:
        """The shift for latents ``(channels, height, width)``: what ``auto`` comes to."""
        return math.sqrt(channels * height * width / 4096) if self.shift == "auto" else self.shift

    @property
    def prediction_type(self) -> str:
        """What the network returns, a key of :data:`SAMPLERS`."""
        return DATA if self.prediction == "data" else self.kind.prediction_type

    @property
    def kind(self) -> ObjectiveKind:
        """The objective's row."""
        return OBJECTIVES[self.name]
