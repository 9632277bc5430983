"""The objectives and the samplers by their names.

Imports no torch, so that a config can use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

NUM_TRAIN_TIMESTEPS = 1000  # of DDPM; flow matching tells the model 1000 t
GUIDANCE_SCALE, NUM_INFERENCE_STEPS = 4.0, 50  # of sampling, where neither a recipe nor a call says more
FLOW, NOISE = "flow_prediction", "epsilon"  # what a model predicts, in the words of diffusers' schedulers


@dataclass(frozen=True)
class Sampler:
    """A scheduler of diffusers: the name of its class, and its arguments."""

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
        "dpm++": Sampler("DPMSolverMultistepScheduler", ON_FLOWS),
        "unipc": Sampler("UniPCMultistepScheduler", ON_FLOWS),
    },
    NOISE: {
        "ddpm": Sampler("DDPMScheduler", TRAILING | dict(variance_type="learned_range")),
        "ddim": Sampler("DDIMScheduler", TRAILING | dict(set_alpha_to_one=True)),
        "dpm++": Sampler("DPMSolverMultistepScheduler", BETAS),
    },
}


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
        fields=("time_sampling", "logit_mean", "logit_std", "cosine_weight"),
    ),
    "ddpm": ObjectiveKind("iwin_dit.diffusion.ddpm:DDPM", NOISE, outputs=2),
}


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the model learns to predict.

    Args:
        name: of :data:`OBJECTIVES`: ``flow_matching`` (velocity), or ``ddpm`` (noise and learned sigma).
        time_sampling: density of the times in flow matching.
        logit_mean: of the logit-normal density; above 0 favours noise.
        logit_std: of the logit-normal density.
        cosine_weight: weight of ``1 - cosine similarity`` over the channels of prediction and target, which
            LightningDiT adds with weight 1 (Yao et al. 2025, section 4).
    """

    name: str = "flow_matching"
    time_sampling: Literal["uniform", "logit_normal"] = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    cosine_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            raise ValueError(f"objective.name is {self.name!r}, expected one of {', '.join(OBJECTIVES)}")

    @property
    def kind(self) -> ObjectiveKind:
        """The objective's row."""
        return OBJECTIVES[self.name]
