"""Multi-head self-attention over rows of tokens.

Legend: B rows, N tokens of a row, C channels, K heads, d = C / K.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from iwin_dit.layers.embeddings import apply_rope
from iwin_dit.layers.norm import QK_NORMS
from iwin_dit.layers.specs import BlockSpec


class Attention(nn.Module):
    """The projections of scaled dot-product attention, and what happens between them."""

    def __init__(self, spec: BlockSpec):
        super().__init__()
        self.heads = spec.heads
        self.qkv = nn.Linear(spec.width, 3 * spec.width)
        self.proj = nn.Linear(spec.width, spec.width)
        self.has_qk_norm = spec.qk_norm
        head_width = spec.width // spec.heads
        self.q_norm = QK_NORMS[spec.norm](head_width) if spec.qk_norm else nn.Identity()
        self.k_norm = QK_NORMS[spec.norm](head_width) if spec.qk_norm else nn.Identity()

    def attend(self, qkv: Tensor, rope: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """``(B, N, 3 C) -> (B, N, C)``.

        Args:
            rope: angles ``(B, 1, N, d/2)`` or broadcastable.
            mask: broadcastable to ``(B, K, N, N)``: True for visible keys, or what is added to the scores.
        """
        q, k, v = rearrange(
            qkv, "b n (three k d) -> three b k n d", three=3, k=self.heads
        )  # (B, K, N, d) each
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rope(rope, q, k)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return rearrange(x, "b k n d -> b n (k d)")


class SelfAttention(Attention):
    """Attention of each row: ``(B, N, C) -> (B, N, C)``."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, mask: Tensor | None = None, qkv: Tensor | None = None
    ) -> Tensor:
        """Tokens in, tokens out; rope and mask as :meth:`Attention.attend` takes them.

        qkv are queries, keys and values ``(B, N, 3 C)``, by default x projected.
        """
        return self.proj(self.attend(self.qkv(x) if qkv is None else qkv, rope, mask))


class CosineAttention(nn.Module):
    """Attention by the cosine of queries and keys over a temperature per head: ``(B, N, C) -> (B, N, C)``.

    Source: Swin V2 (Liu et al. 2022, section 3.2). Keys have no bias.
    """

    def __init__(self, spec: BlockSpec):
        super().__init__()
        self.heads = spec.heads
        self.qkv = nn.Linear(spec.width, 3 * spec.width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(spec.width))
        self.v_bias = nn.Parameter(torch.zeros(spec.width))
        self.logit_scale = nn.Parameter(torch.full((spec.heads, 1, 1), math.log(10)))
        self.proj = nn.Linear(spec.width, spec.width)

    def forward(self, x: Tensor, rope: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """As :meth:`SelfAttention.forward`."""
        qkv = self.qkv(x)
        qkv = qkv + torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]).to(qkv.dtype)
        q, k, v = rearrange(qkv, "b n (three k d) -> three b k n d", three=3, k=self.heads)
        if rope is not None:
            q, k = apply_rope(rope, q, k)
        scale = self.logit_scale.clamp(max=math.log(100)).exp()
        q, k = F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1)
        x = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask, scale=1.0)
        return self.proj(rearrange(x, "b k n d -> b n (k d)"))
