"""The class-conditional diffusion transformer with Iwin attention, as a diffusers model of images or clips.

Legend: B batch, C latent channels, D width, p patch size; a grid is (H/p, W/p), of clips (T, H/p, W/p).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from iwin_dit.layers.blindness import blind_spots, of_earlier_version, resolve
from iwin_dit.layers.block import Block, Head, Modulation
from iwin_dit.layers.embeddings import (
    PatchEmbed,
    TimestepEmbedder,
    frame_positions,
    rope_angles,
    sincos_positions,
    unpatchify,
)
from iwin_dit.layers.norm import NORMS
from iwin_dit.layers.sparse import SparseMiddle, Tokens
from iwin_dit.layers.specs import (
    BlockSpec,
    MixerSpec,
    MlpName,
    NormName,
    middle_of,
    per_axis,
    shape_of,
)
from iwin_dit.models.official_names import inflate
from iwin_dit.models.output import DiTOutput

POSITIONS = {2: ("none", "sincos", "rope", "sincos+rope"), 3: ("none", "time", "sincos")}  # by rank


class IwinDiTTransformer2DModel(ModelMixin, ConfigMixin):
    """A DiT (Peebles & Xie 2023) with a choice of token mixer: Iwin (arXiv 2507.18405), global or others.

    The defaults are the Iwin authors' XL/1 on the 16 x 16 x 32 latents of a 256-pixel image.

    Args:
        sample_size: side of the latent, or (height, width), that the model is made for. Others are valid.
        patch_size: latents per side of a token.
        in_channels: channels of the latent, C.
        out_channels: channels of the prediction; 2 C where the model learns sigma. Default: C.
        num_layers: blocks.
        num_attention_heads: attention heads.
        attention_head_dim: channels of a head; the width D is heads times this.
        num_classes: classes; the label ``num_classes`` itself is the null label of classifier-free guidance.
        class_dropout_prob: share of labels that training replaces by the null label, which 0 leaves out.
        mixer: fields of :class:`~iwin_dit.layers.specs.MixerSpec`, such as
            ``{"name": "iwin", "window_size": 8}``. The config of the model, and what it saves, holds the
            convolution that ``auto`` came to.
        position_embedding: ``none``, ``sincos`` (adds to tokens), ``rope`` (turns queries and keys), or both.
        norm, mlp, mlp_ratio, qk_norm, modulation_shift, open_gates, post_norm, value_residual: see
            :class:`~iwin_dit.layers.specs.BlockSpec`.
        timestep_scale, timestep_shift: the model sees ``scale * timestep + shift``. They bring models that
            were trained in another time convention into ours.
        prediction_type: what the model was trained to predict, in the words of diffusers' schedulers:
            ``flow_prediction`` or ``epsilon``. The pipeline refuses a scheduler that expects the other.
        label_embedding_std: of the label embeddings at the start; 0.02 is DiT's. Short runs learn what labels
            say sooner from a larger one.
        sample_frames: frames of the latents, for :class:`IwinDiTTransformer3DModel` alone.
        base_block: a second head predicts the same after so many blocks: it is trained beside the first one,
            and sampling can push the prediction away from its own (internal guidance, arXiv 2512.24176).
        dense_blocks: so many first and last blocks see all tokens. Those between may see fewer in training,
            and be left out in sampling, see :class:`~iwin_dit.layers.sparse.SparseMiddle`.
        patch_bottleneck: channels that a patch passes through on its way to a token; 128 in JiT, for pixels.

    Raises:
        ValueError: where heads, patch size or window cannot be combined; the message says what would fit.

    A model that cannot tell where its tokens stand, or some of whose tokens never meet, warns.
    """

    rank = 2  # axes of the grid
    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _repeated_blocks = ["Block"]
    _skip_layerwise_casting_patterns = ["label_embedding", "norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 16,
        patch_size: int = 1,
        in_channels: int = 32,
        out_channels: int | None = None,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        mixer: dict[str, Any] | None = None,
        position_embedding: str = "none",
        norm: NormName = "rms_norm",
        mlp: MlpName = "swiglu",
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        modulation_shift: bool = True,
        open_gates: bool = True,
        timestep_scale: float = 1.0,
        timestep_shift: float = 0.0,
        prediction_type: str | None = None,
        label_embedding_std: float = 0.02,
        sample_frames: int | None = None,
        post_norm: bool = False,
        base_block: int | None = None,
        value_residual: bool = False,
        dense_blocks: tuple[int, int] | None = None,
        patch_bottleneck: int | None = None,
    ):
        super().__init__()
        self.middle = middle_of(num_layers, dense_blocks, base_block)
        if (self.rank == 3) != (sample_frames is not None):
            raise ValueError(
                f"sample_frames is {sample_frames}: IwinDiTTransformer3DModel needs a number of frames, "
                "IwinDiTTransformer2DModel has none"
            )
        if position_embedding not in POSITIONS[self.rank]:
            expected = ", ".join(POSITIONS[self.rank])
            raise ValueError(f"position_embedding is {position_embedding!r}, expected one of {expected}")
        width = num_attention_heads * attention_head_dim
        for name, channels in (("sincos", width), ("rope", attention_head_dim)):
            if name in position_embedding and channels % 4:
                whose = "a width" if name == "sincos" else "heads of a width"
                raise ValueError(f"{name} positions need {whose} that 4 divides, found {channels}")
        spec = BlockSpec(
            width=width,
            heads=num_attention_heads,
            mlp_ratio=mlp_ratio,
            mixer=MixerSpec(**(mixer or {})),
            norm=norm,
            mlp=mlp,
            qk_norm=qk_norm,
            modulation_shift=modulation_shift,
            open_gates=open_gates,
            post_norm=post_norm,
            value_residual=value_residual,
        )
        self.patch_size = patch_size
        self.out_channels = in_channels if out_channels is None else out_channels
        self.use_sincos, self.use_time = "sincos" in position_embedding, position_embedding == "time"
        self.use_rope = "rope" in position_embedding
        self.gradient_checkpointing = False
        self.checkpoint_every = 1  # of so many blocks one is computed twice
        self.projector: Any = None  # of training alone: see :meth:`align`
        grid = self.grid(*self.latent_size)
        spec = replace(spec, mixer=resolve(spec.mixer, grid, position_embedding))
        self.register_to_config(mixer=asdict(spec.mixer))
        if spots := blind_spots(spec.mixer, grid, position_embedding, num_layers):
            warnings.warn(
                f"on {' x '.join(map(str, grid))} tokens this model is blind: {spots}; give it a convolution "
                "or a position_embedding, and windows that connect",
                stacklevel=2,
            )

        self.patch_embed = PatchEmbed(in_channels, width, patch_size, patch_bottleneck)
        self.timestep_embedding = TimestepEmbedder(width, timestep_scale, timestep_shift)
        self.label_embedding = nn.Embedding(num_classes + (class_dropout_prob > 0), width)
        self.blocks = nn.ModuleList(Block(spec, grid, index) for index in range(num_layers))
        self.norm_out = NORMS[norm](width)
        self.modulation_out = Modulation(width, ["shift", "scale"])  # both, in every variant
        self.proj_out = nn.Linear(width, patch_size**2 * self.out_channels)
        self.base_head = None if base_block is None else Head(norm, width, patch_size**2 * self.out_channels)
        self.sparse = None if dense_blocks is None else SparseMiddle(width)
        self.initialize_weights()

    @classmethod
    def from_size(cls, size: str, **kwargs: Any) -> IwinDiTTransformer2DModel:
        """A model by its usual name: ``from_size("XL/1", num_classes=10)``; the number is the patch size."""
        depth, width, heads, patch_size = shape_of(size)
        return cls(
            num_layers=depth,
            num_attention_heads=heads,
            attention_head_dim=width // heads,
            patch_size=patch_size,
            **kwargs,
        )

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict[str, Any], ...]:
        """As diffusers, which loads saved models by it: in theirs ``auto`` means what it did back then.

        Of the mixers that this version saves, none has an ``auto`` that could mean two things.
        """
        arguments, *others = super().extract_init_dict(config_dict, **kwargs)
        mixer = arguments.get("mixer")
        if mixer and {"convolution", "window_size"} <= set(mixer) and "sample_size" in arguments:
            *frames, height, width = _latent_size(arguments["sample_size"], arguments.get("sample_frames"))
            patch = arguments.get("patch_size", 1)
            grid = (*frames, height // patch, width // patch)
            arguments["mixer"] = asdict(of_earlier_version(MixerSpec(**mixer), grid))
        return arguments, *others

    def initialize_weights(self) -> None:
        """DiT's initialisation: Xavier for every projection, zeros for all that modulates and the output."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.label_embedding.weight, std=self.config.label_embedding_std)
        nn.init.normal_(self.timestep_embedding.linear_1.weight, std=0.02)
        nn.init.normal_(self.timestep_embedding.linear_2.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.linear.weight)
        for head in (self, self.base_head):
            if head is not None:
                nn.init.zeros_(head.proj_out.weight)

    def align(self, projector: nn.Module, block: int) -> None:
        """In training the output gets ``tokens``: those after so many blocks, through the projector.

        The projector is trained with the model; no config knows it, and no pipeline holds it.
        """
        self.projector, self.projected_block = projector, block

    @property
    def latent_size(self) -> tuple[int, ...]:
        """Height and width of the latents that the model is made for; of clips, frames first."""
        return _latent_size(self.config.sample_size, self.config.sample_frames)

    @property
    def null_label(self) -> int | None:
        """The label of classifier-free guidance, or None where the model was built without one."""
        return self.config.num_classes if self.config.class_dropout_prob > 0 else None

    def grid(self, *size: int) -> tuple[int, ...]:
        """Tokens per axis of a latent of this size: height and width, of clips frames first."""
        if len(size) != self.rank:
            axes = {2: "height and width", 3: "frames, height and width"}[self.rank]
            raise ValueError(f"the latent has the axes {size}, this model takes {axes}")
        *frames, height, width = size
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"the patch size {self.patch_size} does not divide the latent size {height} x {width}; "
                f"sides must be multiples of {self.patch_size}"
            )
        return *frames, height // self.patch_size, width // self.patch_size

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor,
        return_dict: bool = True,
        with_base: bool = False,
        num_blocks: int | None = None,
        kept: Tensor | None = None,
        skip_middle: Tensor | bool = False,
    ) -> DiTOutput | tuple[Tensor]:
        """Predicts velocity (flow matching) or noise (DDPM).

        Args:
            hidden_states: noisy latents ``(B, C, [T,] H, W)``; the patch size divides H and W.
            timestep: ``(B,)`` or a scalar, integer or float; ``1000 t`` for flow matching, with t = 1 noise.
            class_labels: ``(B,)`` integers in ``[0, num_classes]``; the last is the null label.
            return_dict: return a :class:`DiTOutput` rather than a tuple.
            with_base: compute the prediction of the head inside, too, as training always does.
            num_blocks: return a tuple of the tokens ``(B, *grid, D)`` after so many blocks, and stop there.
            kept: blocks between the ``dense_blocks`` see one token of each group, which these numbers in
                [0, 1), ``(B,)``, choose. Default: all tokens.
            skip_middle: leave these blocks out: for the images of a mask ``(B,)``, or, to save time, for all.

        Returns:
            the prediction ``(B, out_channels, [T,] H, W)`` in the dtype of ``hidden_states``.
        """
        dtype, device = hidden_states.dtype, hidden_states.device
        grid = self.grid(*hidden_states.shape[2:])
        timestep = torch.as_tensor(timestep, device=device).expand(len(hidden_states))

        of_class = self.label_embedding(class_labels).to(dtype)
        condition = self.timestep_embedding(timestep, dtype) + of_class  # (B, D)
        x = self.patch_embed(hidden_states).float()  # (B, *grid, D): the residual stream stays in float32
        if self.use_sincos:
            x = x + sincos_positions(grid, x.shape[-1], device)
        if self.use_time:
            x = x + frame_positions(grid[0], x.shape[-1], device)
        rope = rope_angles(grid, self.config.attention_head_dim, device) if self.use_rope else None

        inside: dict[str, Tensor] = {}  # predictions and tokens that are taken out on the way
        run = partial(self._run, condition=condition, inside=inside, reads_base=self.training or with_base)
        if num_blocks is not None:
            return (run(Tokens(x, rope), range(num_blocks)).x,)
        tokens = run(Tokens(x, rope), range(self.middle.start if self.sparse else len(self.blocks)))
        if self.sparse is not None:
            middle = partial(run, numbers=self.middle)
            tokens = self.sparse(tokens, middle, kept, skip_middle, condition.dtype)
            tokens = run(tokens, range(self.middle.stop, len(self.blocks)))
        elif kept is not None or skip_middle is not False:
            raise ValueError("kept and skip_middle are for models with dense_blocks, which this one has not")
        sample = self._predict(self, tokens.x, condition).to(dtype)
        inside = {name: tensor.to(dtype) for name, tensor in inside.items()}
        return DiTOutput(sample=sample, **inside) if return_dict else (sample,)

    def _run(
        self, tokens: Tokens, numbers: range, condition: Tensor, inside: dict[str, Tensor], reads_base: bool
    ) -> Tokens:
        """Tokens after these blocks; what is read on the way goes into ``inside``."""
        x, rope, values = tokens
        checkpointing = torch.is_grad_enabled() and self.gradient_checkpointing
        for i in numbers:
            arguments = x, condition, rope, values
            if checkpointing and i % self.checkpoint_every == 0:
                output = self._gradient_checkpointing_func(self.blocks[i], *arguments)
            else:
                output = self.blocks[i](*arguments)
            x, values = output if isinstance(output, tuple) else (output, values)
            if self.base_head is not None and reads_base and i + 1 == self.config.base_block:
                inside["base"] = self._predict(self.base_head, x, condition)
            if self.projector is not None and self.training and i + 1 == self.projected_block:
                inside["tokens"] = self.projector(x)
        return Tokens(x, rope, values)

    def _predict(self, head: Any, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens ``(B, *grid, D)`` by a head to a prediction ``(B, out_channels, [T,] H, W)``."""
        x = head.norm_out(x, **head.modulation_out(condition, self.rank))
        return unpatchify(head.proj_out(x), self.patch_size)


class IwinDiTTransformer3DModel(IwinDiTTransformer2DModel):
    """The same of clips: latents ``(B, C, T, H, W)``, of any number of frames.

    Args:
        sample_frames: frames of the latents that the model is made for.
        mixer: windows and kernels have a number for each of (time, height, width), or one for all:
            ``{"window_size": ["all", 8, 8], "kernel_size": [1, 3, 3]}`` attends over all frames, and
            convolves each by itself; the order of frames then comes from ``position_embedding`` alone.
        position_embedding: ``none``: the order of frames, as of rows, then comes from the zeros that the
            convolution sees beyond the first and the last; ``time``, sines and cosines of the frame's number,
            with which a short training learns it sooner; or ``sincos`` for place and time.
        options: those of :class:`IwinDiTTransformer2DModel`.

    With one frame it is the model of images with the same weights, which :meth:`from_2d` brings in.
    """

    rank = 3

    @classmethod
    def from_2d(
        cls, model: IwinDiTTransformer2DModel, sample_frames: int, **changes: Any
    ) -> IwinDiTTransformer3DModel:
        """A model of clips that does to each frame what a model of images does.

        Kernels get an axis of time, zero but in the middle; windows take the automatic number of frames,
        which is all of them where there is no convolution.

        Args:
            model: of images; its weights are copied.
            sample_frames: frames of the latents.
            changes: of the config, such as ``mixer={"window_size": ["all", 8, 8]}``.

        Raises:
            ValueError: where the weights do not fit the changes.
        """
        spec = MixerSpec(**model.config.mixer)
        mixer = dict(model.config.mixer)
        if spec.reads("window_size"):
            mixer["window_size"] = ["auto", *per_axis(mixer["window_size"], 2)]
        if spec.reads("kernel_size"):
            sides = per_axis(mixer["kernel_size"], 2)
            mixer["kernel_size"] = [sides[0], *sides]
        names = inspect.signature(IwinDiTTransformer2DModel).parameters
        config = {name: value for name, value in model.config.items() if name in names}
        config |= {"sample_frames": sample_frames, "mixer": mixer | changes.pop("mixer", {})} | changes
        clips = cls(**config)
        clips.load_state_dict(inflate(model.state_dict(), clips.state_dict()))
        return clips.train(model.training)


def _latent_size(sample_size: int | Sequence[int], sample_frames: int | None) -> tuple[int, ...]:
    sides = (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)
    return sides if sample_frames is None else (sample_frames, *sides)


# Saved pipelines name the package, not this file: {"transformer": ["iwin_dit", "IwinDiTTransformer2DModel"]}.
IwinDiTTransformer2DModel.__module__ = IwinDiTTransformer3DModel.__module__ = "iwin_dit"
