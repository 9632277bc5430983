"""The keys of a recipe, with their defaults and what they mean.

Imports no torch, so that ``--help`` and an error in a config answer at once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, cast

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
    Rule,
    Seed,
    Share,
    ascending,
    at_most,
    each,
)
from iwin_dit.diffusion.specs import GUIDANCE_SCALE, NUM_INFERENCE_STEPS, GuidanceName, ObjectiveConfig
from iwin_dit.layers.blindness import resolve
from iwin_dit.layers.specs import MixerSpec, MlpName, NormName, shape_of
from iwin_dit.runtime import limits

Size = Annotated[int | tuple[int, int], ABOVE_ZERO]  # a side, or height and width


def sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else size


@dataclass(frozen=True)
class SourceConfig:
    """Where images or clips come from, whatever is trained on them.

    Args:
        path: a folder of class folders, .tar or .parquet files, or hf:NAME, as for extract_latents.py; of
            clips, a folder of class folders with video files and folders of frames.
        labels: for a flat folder of images, a CSV with the columns file and label.
        follow_links: links in a folder of images, or clips, may lead out of it.
        split: of Hugging Face data; by default train.
        image_column: of Hugging Face data with several columns of images.
        label_column: of Hugging Face data with several columns of labels, or none of class labels.
        allow_odd_classes: take classes without images, a single class, or folders that are named as splits.
        background: of images: what shows through transparent pixels: white, black or R,G,B; null drops the
            transparency, as earlier versions did.
        prepare: make the data first where they are missing: ``digits`` are scikit-learn's handwritten digits,
            ``moving_digits`` clips of them.
        frame_stride: of videos: take every n-th frame. Latents have extract_latents.py's --frame-stride.
    """

    path: Free[str]
    labels: str | None = None
    follow_links: Free[bool] = False
    split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    allow_odd_classes: Free[bool] = False
    background: str | None = "white"
    prepare: Literal["digits", "moving_digits"] | None = None
    frame_stride: Annotated[int, ABOVE_ZERO, at_most(1_000_000)] = 1


@dataclass(frozen=True)
class DataConfig(SourceConfig):
    """The latents to train on, or the images; with ``model.sample_frames`` the clips.

    Args:
        path: folder of latent shards with their index.json; or of images, as ``extract_latents.py --images``.
        kind: ``latents`` are read from shards; ``images``, or videos, are encoded by the autoencoder in every
            step.
        vae: the autoencoder of images, or of latents that do not name it: a preset, a folder, a file or a
            hub id.
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
        patch_size: latents per side of a token.
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
class OptimizerConfig:
    """The optimiser.

    Args:
        name: ``adamw``; or ``muon``, which orthogonalises the steps of the matrices inside blocks, and leaves
            everything else to AdamW. Its steps are as large as AdamW's.
        learning_rate: after the warm-up.
        warmup_steps: linear warm-up.
        schedule: after it, constant, or half a cosine or a line that end with ``train.max_steps``.
        min_learning_rate: at the end of the cosine or line; a constant rate has none.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: a step shrinks matrices and kernels by this times the learning rate.
        max_grad_norm: gradients are clipped to this norm; null for never.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: Annotated[float, ABOVE_ZERO] = 2e-4
    warmup_steps: CountFromZero = 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    min_learning_rate: Annotated[float, ZERO_OR_MORE] = 0.0
    betas: Annotated[tuple[float, float], BELOW_ONE] = (0.9, 0.95)
    eps: Annotated[float, ABOVE_ZERO] = 1e-8
    weight_decay: Annotated[float, ZERO_OR_MORE] = 0.0
    max_grad_norm: Annotated[float | None, ABOVE_ZERO] = 1.0


SOME = Rule(lambda numbers: len(numbers) > 0, "at least one, which sampling uses")
ONCE = Rule(lambda numbers: len({*numbers}) == len(numbers), "no number twice")
BELOW_FLAT = each(
    lambda std: 0 < std < 12**-0.5, f"numbers above 0 and below {12**-0.5:.3g}, a flat average's"
)


@dataclass(frozen=True)
class EmaConfig:
    """Averages of the weights. The first of ``decays`` is the one that sampling uses.

    Args:
        decays: exponential averages, one for each decay.
        power_stds: power-function averages of these relative standard deviations (Karras et al. 2024), from
            which any other can be reconstructed after training; 0.05 and 0.1 are the paper's.
        snapshot_every_steps: keep the power-function averages of these steps for that; 0 for none.
        on_cpu: hold the averages in the CPU's memory; each step then copies the weights there.
    """

    decays: Annotated[list[float], BELOW_ONE, SOME, ONCE] = field(default_factory=lambda: [0.9999])
    power_stds: Annotated[list[float], BELOW_FLAT, ONCE] = field(default_factory=list)
    snapshot_every_steps: Free[CountFromZero] = 0
    on_cpu: Free[bool] = False

    @property
    def averages(self) -> int:
        """How many."""
        return len(self.decays) + len(self.power_stds)


@dataclass(frozen=True)
class TrainConfig:
    """The run.

    Args:
        max_steps: optimiser steps; a finished run goes on when this grows, unless its learning rate comes
            down, which ends here.
        batch_images: images of a step, over all processes.
        micro_batch: images of one forward pass on one process; gradients accumulate. ``auto`` takes the
            largest that fits into memory. Default: all at once.
        precision: ``fp32``; ``tf32``, the same, but a GPU's tensor cores round the factors of matrix products
            to 10 bits (a CPU does not); or ``bf16`` (autocast; weights, EMA and optimiser stay in float32).
        sharding: ``fsdp2`` splits weights, gradients, optimiser and EMA over the processes.
        gradient_checkpointing: compute every n-th block twice to save memory; 1 for all, 0 for none, which is
            all that a classifier knows.
        compile: torch.compile for the blocks.
        attention_backend: kernel of scaled dot-product attention in training; ``auto`` lets PyTorch choose.
        kernels: Iwin's own ones, in Triton: ``auto`` takes them on a GPU where they are faster, ``torch``
            takes PyTorch's operations everywhere.
        num_workers: processes that read data.
        worker_timeout_seconds: a batch that takes longer to read is an error.
        on_nonfinite: a loss or gradient that is not finite stops the run, or the step is skipped.
        max_skipped_steps: so many skipped steps in a row, of ``on_nonfinite skip``, stop the run.
        spike_factor: a logged loss above so many times the recent median goes back to the last checkpoint,
            and on with other data; checkpoints then come with lines of the log. Default: never.
        log_every_steps: a line in log.jsonl.
        health_every_steps: root mean squares of each block's output and weights in these lines; 0 for none.
        sample_every_steps: a grid of samples; 0 for none.
        evaluate_every_steps: figures of the EMA in the log, and at the end; 0 for none.
        save_every_steps: a checkpoint.
        save_every_minutes: a checkpoint after so much time without one; 0 for none. The clock is that of the
            first process.
        compare_weights_every_steps: several processes compare their copies of the weights in these steps and
            before each checkpoint; 0 for never.
        keep_checkpoints: the newest so many stay.
        trackers: where the log and the samples go too; wandb stays offline unless WANDB_MODE says otherwise.
    """

    max_steps: Free[Count] = 400_000
    batch_images: Images = 256
    micro_batch: Annotated[int | Literal["auto"] | None, ABOVE_ZERO, at_most(10**7), FREE] = None
    precision: Literal["fp32", "tf32", "bf16"] = "bf16"
    sharding: Free[Literal["none", "fsdp2"]] = "none"
    gradient_checkpointing: Annotated[int, ZERO_OR_MORE, at_most(MAX_BLOCKS), FREE] = 0
    compile: Free[bool] = False
    attention_backend: Free[Literal["auto", "flash", "efficient", "cudnn", "math"]] = "auto"
    kernels: Free[Literal["auto", "triton", "torch"]] = "auto"
    num_workers: Annotated[int, ZERO_OR_MORE, at_most(1_024), FREE] = 4
    worker_timeout_seconds: Annotated[int, ABOVE_ZERO, at_most(10**6), FREE] = 600
    on_nonfinite: Free[Literal["stop", "skip"]] = "stop"
    max_skipped_steps: Free[Count] = 10
    spike_factor: Annotated[float | None, each(lambda n: n > 1, "above 1, such as 3"), FREE] = None
    log_every_steps: Free[Count] = 100
    health_every_steps: Free[CountFromZero] = 0
    sample_every_steps: Free[CountFromZero] = 5_000
    evaluate_every_steps: Free[CountFromZero] = 0
    save_every_steps: Free[Count] = 5_000
    save_every_minutes: Annotated[float, ZERO_OR_MORE, FREE] = 0.0
    compare_weights_every_steps: Free[CountFromZero] = 1_000
    keep_checkpoints: Free[Count] = 2
    trackers: Free[list[Literal["tensorboard", "wandb"]]] = field(default_factory=list)


@dataclass(frozen=True)
class SampleConfig:
    """The grids that training draws, and the scheduler of the exported pipeline.

    Args:
        sampler: euler, heun, dpm++ or unipc for flow matching; ddim, ddpm or dpm++ for DDPM. Default: the
            first choice of the objective.
        num_inference_steps: steps of the sampler.
        guidance_scale: 1 is unguided.
        guidance_interval: times in which guidance acts; 1 is noise.
        guidance_channels: guide the first so many channels only. Default: all.
        internal_guidance: scale of the guidance from the head inside, ``model.base_block``, without a further
            pass; 1 is without.
        guidance: cfg (classifier-free), cfg_zero_star or apg (adaptive projected guidance).
        guidance_rescale: share of the guided prediction that gets back the deviation of the unguided one.
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
    shift: Annotated[float | None, ABOVE_ZERO, at_most(1e3), FREE] = None
    num_per_class: Annotated[int, ABOVE_ZERO, at_most(1_000), FREE] = 4


@dataclass(frozen=True)
class EvaluationConfig:
    """What ``train.evaluate_every_steps`` measures: the EMA's samples, as ``evaluate_fid.py`` does.

    The samples are those of ``sample``'s options, equally many of each class.

    Args:
        reference: a folder or .npz of real images, or an .npz of their mu and sigma.
        metrics: of evaluate_fid.py. Default: fid, or fd with another extractor than Inception.
        extractor: inception, dinov2, dinov2:FILE or iwin:RUN; of clips i3d:FILE.
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
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries and lists, as YAML writes them."""
        return lists(asdict(self))


def lists(value: Any) -> Any:
    """Tuples as lists, at any depth."""
    if isinstance(value, dict):
        return {key: lists(item) for key, item in value.items()}
    return [lists(item) for item in value] if isinstance(value, (list, tuple)) else value
