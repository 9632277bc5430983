"""Where the alignment of a recipe becomes a teacher, a projector and a term of the loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from iwin_dit.config.schema import Config
from iwin_dit.data.latents import LatentDataset
from iwin_dit.diffusion.alignment import aligned_loss, on_grid, second_uniform, spatial_normalization
from iwin_dit.diffusion.objective import Objective
from iwin_dit.layers.projector import Projector
from iwin_dit.models.transformer import IwinDiTTransformer2DModel
from iwin_dit.runtime.errors import ConfigError
from iwin_dit.runtime.seeds import derive_seed
from iwin_dit.training.ema import ask_ema


class Alignment:
    """The loss of a generator whose tokens are drawn towards those of a teacher.

    Args:
        model: gets a projector, which is trained with it.
        objective: what it learns.
        teacher: an :class:`~iwin_dit.build.teachers.ImageTeacher`, or the features of one. Default: the run's
            first average.
    """

    def __init__(
        self,
        config: Config,
        model: IwinDiTTransformer2DModel,
        objective: Objective,
        accelerator: Accelerator,
        teacher: Any = None,
    ):
        self.options, self.objective, self.accelerator = config.alignment, objective, accelerator
        if self.options.teacher == "self" and type(objective).earlier is Objective.earlier:
            raise ConfigError(
                "alignment.teacher self needs an objective that says what is earlier; "
                f"{config.objective.name} does not: set alignment.teacher null"
            )
        self.teacher = teacher
        if isinstance(teacher, LatentDataset):
            outputs, self.teacher = teacher.latent_shape[0], partial(on_grid, grid=config.model.grid)
        elif teacher is not None:
            outputs, self.teacher = teacher.width, teacher.to(accelerator.device)
        else:
            outputs = config.model.shape[1]
        depth, width, *_ = config.model.shape
        student_block, self.teacher_block = self.options.blocks(depth)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "projector"))
            model.align(Projector(self.options.projector, width, outputs, model.rank), student_block)

    def begin_step(self, ema: nn.Module, step: int) -> None:
        """The average as it is now, and the step, on which alone it depends whether there is a teacher."""
        self.ema, self.stopped = ema, step >= (self.options.stop_step or step + 1)

    def loss(
        self, model: Callable, shown: Tensor, x0: Tensor, labels: Tensor, noise: Tensor, u: Tensor
    ) -> Tensor:
        """The objective and the misalignment of each example, ``(B,)``.

        Args:
            shown: to the teacher: images, uint8 ``(B, 3, H, W)``, or the features that it made of them,
                ``(B, Z, h, w)``. Others are as the objective's.
        """
        features = None if self.stopped else self._features(shown, x0, labels, noise, u)
        return aligned_loss(self.objective, model, (x0, labels, noise, u), features, self.options.weight)

    def _features(self, shown: Tensor, x0: Tensor, labels: Tensor, noise: Tensor, u: Tensor) -> Tensor:
        """The teacher's tokens; the average sees less noise: ``t' = max(0, t - time_gap u')`` (SRA)."""
        with self.accelerator.autocast():
            if self.teacher is not None:
                features = self.teacher(shown)
            else:
                gap = self.options.time_gap * second_uniform(u)
                xt, timestep = self.objective.earlier(x0, noise, u, gap)
                (features,) = ask_ema(self.ema, xt, timestep, labels, num_blocks=self.teacher_block)
        share = self.options.spatial_norm
        return spatial_normalization(features, share) if share else features
