"""What training asks of an objective, and sampling of the scheduler that fits it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from iwin_dit.diffusion.sampling import Scheduler, make_scheduler
from iwin_dit.diffusion.specs import DATA, SAMPLERS, ObjectiveConfig, ObjectiveKind


class Objective(ABC):
    """What a model learns to predict.

    kind: the objective's row in :data:`iwin_dit.diffusion.specs.OBJECTIVES`.

    Args:
        config: its options, those of a recipe.
    """

    kind: ClassVar[ObjectiveKind]

    def __init__(self, config: ObjectiveConfig | None = None):
        self.config = config or ObjectiveConfig()

    @abstractmethod
    def loss(self, model: Callable, x0: Tensor, labels: Tensor, noise: Tensor, u: Tensor) -> Tensor:
        """Loss per image.

        Args:
            model: ``model(hidden_states, timestep, class_labels)`` with a ``sample`` ``(B, C, ...)``, or of
                more channels where the row says so.
            x0: latents ``(B, C, ...)``.
            labels: ``(B,)``.
            noise: standard normal, of the shape of ``x0``.
            u: ``(B,)``, uniform in [0, 1).

        Returns:
            ``(B,)``.
        """

    def earlier(self, x0: Tensor, noise: Tensor, u: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
        """What the model sees of a time before that of ``u``: noisy latents, and ``timestep`` ``(B,)``.

        Args:
            x0, noise, u: as :meth:`loss`.
            gap: ``(B,)``, in shares of all times from data to noise; the earliest time is that of data.

        Self-alignment alone asks for it: with an objective that does not say it, it is refused at the start.
        """
        raise NotImplementedError

    def of_heads(self, output: Any, error: Callable[[Tensor], Tensor]) -> Tensor:
        """The error of the model's prediction, plus that of the head inside it by ``base_weight``: ``(B,)``.

        The weight is that of deep supervision in internal guidance (arXiv 2512.24176).

        Args:
            output: of the model: ``sample``, and perhaps ``base``.
            error: from a prediction in float32 to ``(B,)``.
        """
        loss, base = error(output.sample.float()), getattr(output, "base", None)
        return loss if base is None else loss + self.config.base_weight * error(base.float())

    @property
    def prediction_type(self) -> str:
        """What the model predicts, in the words of diffusers' schedulers."""
        return DATA if self.config.prediction == "data" else self.kind.prediction_type

    @property
    def shift(self) -> float:
        """That of the times. What ``auto`` comes to depends on the latents: an objective has a number."""
        assert self.config.shift != "auto"
        return self.config.shift

    @property
    def samplers(self) -> tuple[str, ...]:
        """Names of the samplers that fit."""
        return tuple(SAMPLERS[self.prediction_type])

    def scheduler(self, sampler: str | None = None, shift: float | None = None) -> Scheduler:
        """What :func:`make_scheduler` makes, by default with the shift of training."""
        return make_scheduler(self.prediction_type, sampler, self.shift if shift is None else shift)
