"""From tokens inside a network to the features of a teacher, for alignment.

Legend: B batch, D width, Z channels of the teacher; a grid is (H, W), of clips (T, H, W).
"""

from __future__ import annotations

from torch import Tensor, nn


class Projector(nn.Module):
    """Tokens ``(B, *grid, D)`` to ``(B, *grid, Z)``.

    ``mlp`` are three linear layers with SiLU between them (REPA, arXiv 2410.06940), whose hidden
    width is D + Z (SRA, arXiv 2505.02831); ``conv`` is one convolution with a kernel of 3 (iREPA, arXiv
    2512.10794).

    Args:
        kind: ``mlp`` or ``conv``.
        inputs, outputs: D and Z.
        rank: axes of the grid.
    """

    def __init__(self, kind: str, inputs: int, outputs: int, rank: int = 2):
        super().__init__()
        self.kind, hidden = kind, inputs + outputs
        layers: list[nn.Module] = [nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden)]
        layers += [nn.SiLU(), nn.Linear(hidden, outputs)]
        if kind == "conv":
            layers = [{2: nn.Conv2d, 3: nn.Conv3d}[rank](inputs, outputs, 3, padding=1)]
        self.layers = nn.Sequential(*layers)
        for name, parameter in self.named_parameters():  # as the transformer's
            (nn.init.zeros_ if name.endswith("bias") else nn.init.xavier_uniform_)(parameter)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "mlp":
            return self.layers(x)
        return self.layers(x.movedim(-1, 1)).movedim(1, -1)
