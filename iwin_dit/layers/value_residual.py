"""Value residual: attention in later blocks reads the values of the first block, too.

Legend: B batch, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ValueResidual(nn.Module):
    """``V <- l V_1 + (1 - l) V`` with a learned share l, 0.5 at the start.

    V_1 are the values of the first block, of the same token: both are mixed where the tokens stand, before
    windows are cut. Source: Zhou et al. 2024 (arXiv 2410.17897), as SR-DiT has it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, qkv: Tensor, first: Tensor) -> Tensor:
        """Queries, keys and values ``(B, *grid, 3 C)``, first values ``(B, *grid, C)``: with mixed values."""
        queries_and_keys, values = qkv.split([qkv.shape[-1] - first.shape[-1], first.shape[-1]], dim=-1)
        mixed = torch.lerp(values, first, self.share.to(values.dtype))
        return torch.cat([queries_and_keys, mixed], dim=-1)
