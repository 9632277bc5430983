"""The stochastic sampler of flows, in the interface of diffusers' schedulers.

Legend: B images, C latent channels.
"""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

LAST_STEP = 0.04  # length of the last step, in t


class FlowMatchEulerMaruyamaScheduler(FlowMatchEulerDiscreteScheduler):
    """Steps of the reverse SDE of a flow by Euler and Maruyama (SiT, arXiv 2401.08740; REPA, 2410.06940).

    ``dx = (v - w s / 2) dt + sqrt(w) dW`` has at each time the distribution of the flow ``dx = v dt``. The
    score of the linear path is ``s = -(x + (1 - t) v) / t``, and ``w = 2 t`` is what both take (SiT's
    ``sigma``). The last step, of length 0.04, takes the mean alone: its noise would stay in the data. It is
    for many steps: the papers take 250.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """One step: ``(B, C, ...) -> (B, C, ...)``.

        Args:
            model_output: the velocity.
            timestep: one of ``timesteps``, each in its turn.
            sample: x_t.
            generator: of the noise: one, or one for each image.
        """
        if self.step_index is None:
            self._init_step_index(timestep)
        t, after = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        noise = sample + (1 - t) * model_output  # what the model takes for noise: -t s
        moved = sample - (t - after) * (model_output + noise)
        if after > 0:
            drawn = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            moved = moved + torch.sqrt(2 * t * (t - after)) * drawn
        self._step_index += 1
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)


FlowMatchEulerMaruyamaScheduler.__module__ = "iwin_dit"  # saved pipelines name the package, not this file
