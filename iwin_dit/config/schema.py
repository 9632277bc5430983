"""The keys of a recipe, with their defaults and what they mean.

Imports no torch, so that ``--help`` and an error in a config answer at once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, cast

from iwin_dit.config.alignment import AlignmentConfig
from iwin_dit.config.bounds import (
    ABOVE_ZERO,
    BELOW_ONE,
    FREE,
    MAX_BLOCKS,
    ZERO_OR_MORE,
    Count,
    CountFromZero,
    Free,
    Images,
    Seed,
    Share,
    ascending,
    at_most,
    each,
)
from iwin_dit.config.common import EmaConfig, OptimizerConfig, Size, SourceConfig, TrainConfig, lists, sides
from iwin_dit.diffusion.specs import GUIDANCE_SCALE, NUM_INFERENCE_STEPS, GuidanceName, ObjectiveConfig
from iwin_dit.layers.blindness import resolve
from iwin_dit.layers.specs import MixerSpec, MlpName, NormName, shape_of
from iwin_dit.runtime import limits


@dataclass(frozen=True)
class DataConfig(SourceConfig):
    """The latents to train on, or the images; with ``model.sample_frames`` the clips.

    Args:
        path: folder of latent shards with their index.json; or of images, as ``extract_latents.py --images``.
        kind: ``latents`` are read from shards; ``images``, or videos, are encoded by the autoencoder in every
            step.
        vae: the autoencoder of images, or of latents that do not name it: a preset, a folder, a file or a
            hub id; ``none`` trains on the pixels themselves.
        max_bad_images: of images: leave out up to so many that cannot be decoded, each named; the next one
            takes its place.
        crop: of images: ADM's centre crop, or a random one, another one each time an image is seen.
        images: folder of latents of images, of the same classes and autoencoder as the clips, which are mixed
            in as clips of one frame.
        image_share: share of the steps that train on them.
        random_flip: train on mirror images too. Not for digits or text.
        normalization: ``channel`` takes mean and standard deviation from the index; ``vae`` the factor that
            the autoencoder declares, as DiT does; images have no index and need it.
    """

    path: Free[str] = "data/digits"
    kind: Literal["latents", "images"] = "latents"
    vae: str | None = None
    max_bad_images: Free[CountFromZero] = 0
    crop: Literal["center", "random"] = "center"
    images: Free[str | None] = None
    image_share: Share = 0.0
    random_flip: bool = True
    normalization: Literal["channel", "vae"] = "channel"


@dataclass(frozen=True)
class ModelConfig:
    """The network.

    Args:
        size: depth, width and heads by name, and the patch size, such as ``XL/1``. Or give the four below.
        depth: blocks.
        width: channels of a token.
        heads: attention heads; they divide the width.
        patch_size: latents per side of a token; of pixels 4 to 32.
        sample_size: side of the latent, or [height, width].
        sample_frames: frames of the latent, which makes it a model of clips.
        in_channels: channels of the latent.
        num_classes: classes of the data.
        label_dropout: share of labels that are replaced by the null label; above 0 for guidance.
        mixer: the token mixer.
        position_embedding: none (Iwin needs none in an image), fixed sin-cos, rotary, or both; of clips,
            none, ``time`` (sin-cos of frames alone), or sin-cos of all axes.
        norm: RMS norm with a weight, or layer norm without.
        mlp: SwiGLU, or GELU.
        mlp_ratio: hidden width of the MLP over the width.
        qk_norm: normalise queries and keys.
        modulation_shift: adaLN shifts and scales; without, it only scales.
        open_gates: gates are 1 + gate, open at the start; without, adaLN-Zero.
        post_norm: normalise what a branch returns (Swin V2), rather than what it reads.
        value_residual: later blocks mix the values of the first block's attention into their own.
        dense_blocks: in training, so many first and so many last blocks see all tokens, and those between one
            of each 2 x 2 (clips: 2 x 2 x 2), which saves time (SPRINT, arXiv 2510.21986). It helped others
            from about 1,024 tokens on. Sampling uses all tokens.
        dense_from_step: from this step on training uses all tokens, too; SPRINT's last 5 % of the steps do.
            Default: never.
        middle_dropout: share of the images that skip the blocks between, so that sampling can do so, too
            (``sample.path_drop``).
        patch_bottleneck: a patch passes through so many channels on its way to a token, so that the network
            need not carry all of its noise (JiT, arXiv 2511.13720, has 128). Default: straight.
        base_block: a second head predicts the same after so many blocks, by ``objective.base_weight``: it
            speeds learning up, and lets the network guide itself (``sample.internal_guidance``).
        label_embedding_std: of the label embeddings at the start; 0.02 is DiT's. Short runs learn what labels
            say sooner from a larger one.
        allow_blind: build a network that cannot tell positions, or some of whose tokens never meet, which is
            refused otherwise: for ablations.
        init_from: weights to begin with: a run or a pipeline. Those of a model of images serve one of clips;
            another number of classes gets new label embeddings.
    """

    size: str | None = None
    depth: Annotated[int | None, ABOVE_ZERO, at_most(128)] = None
    width: Annotated[int | None, ABOVE_ZERO, at_most(limits.SIDE)] = None
    heads: Annotated[int | None, ABOVE_ZERO, at_most(limits.SIDE)] = None
    patch_size: Annotated[int | None, ABOVE_ZERO, at_most(limits.PATCH)] = None
    sample_size: Annotated[Size, at_most(limits.SIDE)] = 16
    sample_frames: Annotated[int | None, ABOVE_ZERO, at_most(limits.SIDE)] = None
    in_channels: Annotated[int, ABOVE_ZERO, at_most(limits.SIDE)] = 32
    num_classes: Annotated[int, ABOVE_ZERO, at_most(limits.LABELS)] = 1000
    label_dropout: Share = 0.1
    mixer: MixerSpec = field(default_factory=MixerSpec)
    position_embedding: Literal["none", "time", "sincos", "rope", "sincos+rope"] = "none"
    norm: NormName = "rms_norm"
    mlp: MlpName = "swiglu"
    mlp_ratio: Annotated[float, ABOVE_ZERO, at_most(limits.MLP_RATIO)] = 4.0
    qk_norm: bool = False
    modulation_shift: bool = True
    open_gates: bool = True
    post_norm: bool = False
    value_residual: bool = False
    dense_blocks: Annotated[tuple[int, int] | None, ABOVE_ZERO, at_most(MAX_BLOCKS)] = None
    dense_from_step: Annotated[int | None, ZERO_OR_MORE, at_most(10**9)] = None
    middle_dropout: Annotated[float, ABOVE_ZERO, BELOW_ONE] = 0.1
    patch_bottleneck: Annotated[int | None, ABOVE_ZERO, at_most(limits.SIDE)] = None
    base_block: Annotated[int | None, ABOVE_ZERO, at_most(MAX_BLOCKS)] = None
    label_embedding_std: Annotated[float, ABOVE_ZERO, at_most(1e3)] = 0.02
    allow_blind: Free[bool] = False
    init_from: Free[str | None] = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Depth, width, heads and patch size, by name or by number."""
        if self.size is None:
            numbers = self.depth, self.width, self.heads, self.patch_size
            return cast(tuple[int, int, int, int], numbers)  # the rules refuse None
        return shape_of(self.size)

    @property
    def latent_size(self) -> tuple[int, ...]:
        """Height and width of the latent; of clips, frames first."""
        size = sides(self.sample_size)
        return size if self.sample_frames is None else (self.sample_frames, *size)

    @property
    def grid(self) -> tuple[int, ...]:
        """Tokens per axis."""
        *frames, height, width = self.latent_size
        patch = self.shape[3]
        return *frames, height // patch, width // patch

    @property
    def resolved_mixer(self) -> MixerSpec:
        """The token mixer, with what ``auto`` comes to here."""
        return resolve(self.mixer, self.grid, self.position_embedding)


@dataclass(frozen=True)
class SampleConfig:
    """The grids that training draws, and the scheduler of the exported pipeline.

    Args:
        sampler: euler, heun, dpm++, unipc or euler_maruyama (an SDE, for many steps) for flow matching; ddim,
            ddpm or dpm++ for DDPM. Default: the first choice of the objective.
        num_inference_steps: steps of the sampler.
        guidance_scale: 1 is unguided.
        guidance_interval: times in which guidance acts; 1 is noise.
        guidance_channels: guide the first so many channels only. Default: all.
        internal_guidance: scale of the guidance from the head inside, ``model.base_block``, without a further
            pass; 1 is without.
        guidance: cfg (classifier-free), cfg_zero_star or apg (adaptive projected guidance).
        guidance_rescale: share of the guided prediction that gets back the deviation of the unguided one.
        path_drop: the prediction without a class, which guidance leaves behind, is made without the blocks
            between ``model.dense_blocks``: it is worse, and costs less (SPRINT's path-drop guidance).
        shift: of the times of flow matching. Default: ``objective.shift``.
        num_per_class: images per class in a grid, for the first ten classes.
    """

    sampler: Free[str | None] = None
    num_inference_steps: Annotated[int, ABOVE_ZERO, at_most(100_000), FREE] = NUM_INFERENCE_STEPS
    guidance_scale: Annotated[float, ZERO_OR_MORE, at_most(1e6), FREE] = GUIDANCE_SCALE
    guidance_interval: Annotated[tuple[float, float], ascending(0, 1), FREE] = (0.0, 1.0)
    guidance_channels: Annotated[int | None, ABOVE_ZERO, at_most(limits.SIDE), FREE] = None
    internal_guidance: Annotated[float, ZERO_OR_MORE, at_most(1e6), FREE] = 1.0
    guidance: Free[GuidanceName] = "cfg"
    guidance_rescale: Annotated[float, each(lambda n: 0 <= n <= 1, "a share from 0 to 1"), FREE] = 0.0
    path_drop: Free[bool] = False
    shift: Annotated[float | None, ABOVE_ZERO, at_most(1e3), FREE] = None
    num_per_class: Annotated[int, ABOVE_ZERO, at_most(1_000), FREE] = 4


@dataclass(frozen=True)
class EvaluationConfig:
    """What ``train.evaluate_every_steps`` measures: the EMA's samples, as ``evaluate_fid.py`` does.

    The samples are those of ``sample``'s options, equally many of each class.

    Args:
        reference: a folder or .npz of real images, or an .npz of their mu and sigma.
        metrics: of evaluate_fid.py. Default: fid, or fd with another extractor than Inception.
        extractor: inception, dinov2, dinov2:FILE, efficientnet-lite0 or iwin:RUN; of clips i3d:FILE.
        inception_weights: torch-fidelity's file, for machines without a network.
        num_images: to draw each time; figures of fewer than 50,000 compare with each other alone.
        batch_images: of one forward pass on one process.
        seed: of the samples.
    """

    reference: Free[str | None] = None
    metrics: Free[list[str]] = field(default_factory=list)
    extractor: Free[str] = "inception"
    inception_weights: Free[str | None] = None
    num_images: Free[Count] = 10_000
    batch_images: Free[Images] = 64
    seed: Free[Seed] = 0


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on.

    Args:
        output_dir: the run directory.
        seed: of initial weights, data order, noise, times and label drops.
        data: the latents.
        model: the network.
        objective: what it predicts.
        alignment: with a teacher, inside the network.
        optimizer: AdamW or Muon, and the learning rate.
        ema: averages of the weights.
        train: the run.
        sample: the grids.
        evaluation: figures while it trains.
    """

    output_dir: Free[str] = "runs/quickstart"
    seed: Seed = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries and lists, as YAML writes them."""
        return lists(asdict(self))
