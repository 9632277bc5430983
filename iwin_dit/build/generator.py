"""What train_dit.py trains: a diffusion transformer, on latents or on images that the step encodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from iwin_dit.build.alignment import Alignment
from iwin_dit.build.budget import Budget
from iwin_dit.build.data import build_dataset, build_encoder, build_images, open_features
from iwin_dit.build.loading import build_denoiser
from iwin_dit.build.network import build_objective
from iwin_dit.build.pipeline import build_pipeline, draw_preview, model_of
from iwin_dit.config.schema import Config
from iwin_dit.data.examples import Data, Drawn, ImagesAsClips, MixedExamples, TaughtExamples, TrainingExamples
from iwin_dit.data.latents import LatentDataset
from iwin_dit.layers.sparse import thinned
from iwin_dit.pipelines.base import export_pipeline
from iwin_dit.runtime.signals import StopRequest
from iwin_dit.training.optimizer import Groups, parameter_groups
from iwin_dit.training.state import Run, State


class TrainingData(NamedTuple):
    """The data of a generator.

    dataset: latents or images, still or moving; images: those that are mixed into training on clips; teacher:
    for alignment, an :class:`~iwin_dit.build.teachers.ImageTeacher`, or the features that one has made.
    """

    dataset: Data
    images: ImagesAsClips | None
    teacher: Any = None

    @property
    def identity(self) -> dict[str, Any]:
        """What makes the data the same to a run that is resumed."""
        found = self.dataset.identity | (self.images.identity if self.images is not None else {})
        if isinstance(self.teacher, LatentDataset):
            return found | {"teacher_sha256": self.teacher.identity.get("shards_sha256")}
        return found | ({} if self.teacher is None else {"teacher_sha256": self.teacher.sha256})


def open_data(config: Config, accelerator: Accelerator) -> TrainingData:
    """The data of the recipe, made first where it says how.

    Raises:
        DataError: where they are missing, or do not fit the model.
    """
    dataset = build_dataset(config, accelerator)
    teacher: Any = None
    if config.alignment.sees_images:
        from iwin_dit.build.teachers import load_teacher  # and networks of images

        options, grid = config.alignment, config.model.grid
        with accelerator.local_main_process_first():  # which may fetch its weights
            teacher = load_teacher(str(options.teacher), options.teacher_weights, options.teacher_block, grid)
    elif (folder := config.alignment.features) is not None:
        teacher = open_features(Path(folder), dataset)
    return TrainingData(dataset, build_images(config, dataset), teacher)


def build_examples(config: Config, data: TrainingData) -> TrainingExamples | MixedExamples | TaughtExamples:
    """What training sees at each position: of the dataset, and of images that are mixed in with it."""
    null_label = config.model.num_classes if config.model.label_dropout else None

    def examples(source: Drawn) -> TrainingExamples:
        options = config.data.random_flip, config.model.label_dropout, null_label
        return TrainingExamples(source, config.seed, *options)

    if isinstance(data.teacher, LatentDataset):
        return TaughtExamples(examples(data.dataset), data.teacher)
    if data.images is None:
        return examples(data.dataset)
    share, batch = config.data.image_share, config.train.batch_images
    return MixedExamples(examples(data.dataset), examples(data.images), config.seed, share, batch)


class Generator:
    """The task of train_dit.py, see :class:`~iwin_dit.training.state.Task`.

    Raises:
        UserError: where the weights it begins with, its autoencoder or its evaluation are not to be had.
    """

    in_pairs = False

    def __init__(self, config: Config, accelerator: Accelerator, data: TrainingData):
        self.config, self.dataset = config, data.dataset
        self.model = build_denoiser(config)
        self.objective = build_objective(config)
        self.features = data.teacher if isinstance(data.teacher, LatentDataset) else None
        self.alignment = None
        if config.alignment.teacher is not None:
            self.alignment = Alignment(config, self.model, self.objective, accelerator, data.teacher)
        self.encode = build_encoder(data.dataset, accelerator)
        self.examples = build_examples(config, data)
        self.flops_per_image = Budget(config).training_flops
        self.is_sparse = True
        self.monitor = None
        if config.train.evaluate_every_steps:
            from iwin_dit.build.evaluation import Monitor  # and all that evaluates

            self.monitor = Monitor(config, data.dataset, accelerator)

    def begin_step(self, state: State, step: int) -> None:
        """The average that sampling uses may teach this step; some blocks may see fewer tokens in it."""
        dense_from = self.config.model.dense_from_step
        self.is_sparse = dense_from is None or step < dense_from
        if self.alignment is not None:
            self.alignment.begin_step(state.emas["ema"], step)

    def parameter_groups(self) -> Groups:
        """As AdamW takes them: matrices decay, all else does not."""
        return parameter_groups(self.model, self.config.optimizer.weight_decay)

    def loss(
        self,
        model: Callable,
        x0: Tensor,
        labels: Tensor,
        noise: Tensor,
        u: Tensor,
        features: Tensor | None = None,
    ) -> Tensor:
        """The objective of each example, ``(B,)``, from what the dataset gives."""
        if self.config.model.dense_blocks is not None:
            model = thinned(model, u, self.config.model.middle_dropout, self.is_sparse)
        if self.alignment is None:
            return self.objective.loss(model, self.encode(x0), labels, noise, u)
        shown = x0 if features is None else features
        return self.alignment.loss(model, shown, self.encode(x0), labels, noise, u)

    def random_batch(self, images: int) -> Sequence[Tensor]:
        """The first example of the dataset, so many times, with random noise and times."""
        self.is_sparse = self.config.model.dense_from_step is None  # as in the steps that take most memory
        (x0, _), shape = self.dataset[0], self.dataset.latent_shape
        labels = torch.zeros(images, dtype=torch.long)
        batch = x0.expand(images, *x0.shape), labels, torch.randn(images, *shape), torch.rand(images)
        return batch if self.features is None else (*batch, torch.randn(images, *self.features.latent_shape))

    def preview(self, run: Run, ema: dict[str, Tensor], step: int, stop: StopRequest) -> None:
        """Draws the first ten classes."""
        draw_preview(self.config, self.dataset, run, ema, step, stop)

    def evaluate(self, run: Run, step: int, stop: StopRequest) -> Mapping[str, float] | None:
        """The figures that the recipe asks for, as evaluate_fid.py finds them."""
        return {} if self.monitor is None else self.monitor.evaluate(run, step, stop)

    def finish(self, run: Run, ema: dict[str, Tensor], step: int) -> str:
        """Writes the pipeline of the EMA."""
        pipeline = build_pipeline(self.config, model_of(self.config, ema), self.dataset)
        export_pipeline(pipeline, run.files.pipeline, {"step": step, "config": self.config.to_dict()})
        return f"; try: python sample.py --checkpoint {run.files.path} --class 0"
