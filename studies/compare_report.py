"""The comparison of token mixers as text and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from PIL import Image

from iwin_dit.config.schema import Config
from iwin_dit.data.digits import IMAGE_SIZE
from iwin_dit.pipelines.sampling import Sample, draw_grid
from studies.connectivity import MOST_BLOCKS
from studies.costs import machine
from studies.judge import Judge
from studies.runs import Run

ROUNDS, STEP_ROUNDS = 7, 20  # of the times of sampling and of training steps
COLUMNS = (
    *("mixer", "FD (iwin)", "recognised, %", "training, s", "sampling, ms an image", "memory of a step, MiB"),
    *("parameters", "multiply-adds, M", "blocks to connect all"),
)


@dataclass
class Row:
    """A config and what was found of it.

    recipe: its file; runs: one per seed; scores: of those that were trained; costs: see
    :func:`~studies.costs.costs`; failures: why others were not; images: ten samples.
    """

    recipe: Path
    runs: list[Run]
    scores: list[dict[str, float]] = field(default_factory=list)
    costs: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    step_seconds: float | None = None
    sampling_seconds: float | None = None
    images: list[Image.Image] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.recipe.stem

    @property
    def training_seconds(self) -> float:
        """Of all steps."""
        return self.runs[0].config.train.max_steps * self.step_seconds

    def mean(self, key: str) -> float:
        """Over the seeds; infinite where none was trained."""
        return mean(score[key] for score in self.scores) if self.scores else float("inf")

    def std(self, key: str) -> float:
        """Over the seeds, unbiased; 0 of one."""
        return stdev(score[key] for score in self.scores) if len(self.scores) > 1 else 0.0


def with_spread(values: Sequence[float], digits: int, scale: float = 1.0) -> str:
    """``4.21 ± 0.08``: mean and standard deviation; of one value, that."""
    spread = f" ± {scale * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * mean(values):.{digits}f}{spread}"


def table(rows: Sequence[Row]) -> str:
    """In the order of the rows, Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        if not row.scores:
            lines.append(f"| {row.name} | not trained: {row.failures[0]} " + "| " * (len(COLUMNS) - 2) + "|")
            continue
        fd, recognised = ([score[key] for score in row.scores] for key in ("fd", "recognised"))
        blocks = row.costs["blocks"]
        cells = [
            row.name,
            with_spread(fd, 2),
            with_spread(recognised, 1, scale=100),
            f"{row.training_seconds:.1f}",
            f"{1e3 * row.sampling_seconds:.1f}",
            f"{row.costs['memory_bytes'] / 2**20:.1f}",
            f"{row.costs['parameters']:,}",
            f"{row.costs['multiply_adds'] / 1e6:.1f}",
            "never" if blocks is None else str(blocks),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


PAGE = """# Token mixers compared

One trainer, one budget. Every row is a transformer of {depth} blocks, width {width} and {heads} heads on \
{grid} latents of handwritten digits, trained for {steps:,} steps of {batch} images at the learning rate \
{rate:g}. Rows differ in one line of their config, which stands below the table; runs of the same seed see \
the same images and noise in the same order. {seeds} Rows that differ by less than the spread are not told \
apart.

{table}

* FD (iwin): distance of {images} samples ({sampling} steps, no guidance, the same noise for all) to {real} \
digits that nothing was trained on, by the features of `{classifier}`; lower is better. It is the mean over \
halves of both, with equally many of each digit, so that those digits themselves have a distance: {fd:.2f}, \
through the autoencoder {vae_fd:.2f}.
* Recognised: share of the samples that a support vector machine takes for their class; of the real digits \
{recognised:.1f} %, through the autoencoder {vae_recognised:.1f} %.
* Training: {steps:,} times the median of {step_rounds} steps. Sampling: median of {rounds} draws of ten \
images. Both with the mixers in turn, in one process. \
{machine}.
* Memory: peak of tensors in a training step on a CPU, above weights, gradients and AdamW's moments.
* Multiply-adds: of one forward pass on one image, as it is computed.
* Blocks: stacked, until every token depends on every other, by the Jacobians of the mixers; *never*: not \
within {most}.{neighborhood}

![FD over training time]({plot})

Samples of the first seed, in each column from the same noise:

![samples]({samples})

What the rows differ in:

{lines}

Two further rows were measured with commit 36d04d1 and are gone: a convolution that reads what attention \
returns (iwin_serial, FD 8.49 ± 0.61, recognised 43.7 ± 1.5 %), and one that reads attention's values \
(iwin_values, 9.01 ± 0.25, 41.1 ± 2.7 %). The paper's, which reads the mixer's input, was ahead of both in \
the same comparison (iwin, 7.28 ± 0.25, 52.0 ± 2.9 %).

Made by

```bash
{command}
```
"""
NEIGHBORHOOD = (
    " Neighbourhood attention is computed over all tokens with a mask, as everywhere but on GPUs with natten."
)


def text(rows: Sequence[Row], config: Config, judge: Judge, vae: Any, command: str, out: Path) -> str:
    """The whole page; its pictures lie beside it.

    Args:
        config: of a row, for what all rows have in common.
        vae: autoencoder of the latents.
        command: what makes the page.
    """
    depth, width, heads, _ = config.model.shape
    real, through_vae = judge.of_real(IMAGE_SIZE), judge.of_reconstructions(vae, IMAGE_SIZE)
    seeds = len(rows[0].runs)
    spread = f"{seeds} seeds: mean ± standard deviation." if seeds > 1 else "One seed: there is no spread."
    failed = [f"* {row.name}, of some seeds: {why}" for row in rows if row.scores for why in row.failures]
    return PAGE.format(
        depth=depth,
        width=width,
        heads=heads,
        grid=" x ".join(map(str, config.model.grid)),
        steps=config.train.max_steps,
        batch=config.train.batch_images,
        rate=config.optimizer.learning_rate,
        seeds=spread,
        table=table(rows),
        images=judge.num_images,
        sampling=config.sample.num_inference_steps,
        real=len(judge.labels),
        classifier=judge.classifier,
        fd=real["fd"],
        vae_fd=through_vae["fd"],
        recognised=100 * real["recognised"],
        vae_recognised=100 * through_vae["recognised"],
        rounds=ROUNDS,
        step_rounds=STEP_ROUNDS,
        machine=machine(),
        most=MOST_BLOCKS,
        neighborhood=NEIGHBORHOOD if "neighborhood" in _trained_mixers(rows) else "",
        plot=out.with_suffix(".png").name,
        samples=f"{out.stem}_samples.png",
        lines="\n".join(
            [f"* {row.name}: `{line}`" for row, line in zip(rows, own_lines(rows), strict=True)] + failed
        ),
        command=command,
    )


def _trained_mixers(rows: Sequence[Row]) -> set[str]:
    return {row.runs[0].config.model.mixer.name for row in rows if row.scores}


def own_lines(rows: Sequence[Row]) -> list[str]:
    """What each config has that not all have."""
    lines = [row.recipe.read_text().splitlines() for row in rows]
    common = set.intersection(*map(set, lines))
    return [" ".join(line.strip() for line in own if line not in common) for own in lines]


def draw_plot(rows: Sequence[Row], path: Path) -> None:
    """FD over training time, with the standard deviations over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    trained = sorted((row for row in rows if row.scores), key=lambda row: row.mean("fd"))
    colors = plt.get_cmap("tab10").colors
    for i, row in enumerate(trained):
        style = dict(marker="osD^v"[i % 5], color=colors[i % 10], capsize=3, linestyle="none")
        axes.errorbar(row.training_seconds, row.mean("fd"), row.std("fd"), label=row.name, **style)
    axes.set(
        xlabel="training time, s", ylabel="FD (iwin), lower is better", title="mean ± standard deviation"
    )
    axes.spines[["top", "right"]].set_visible(False)
    low, high = axes.get_ylim()
    places = spread_out([(row.mean("fd") - low) / (high - low) for row in trained], gap=0.055)
    for i, (row, place) in enumerate(zip(trained, places, strict=True)):  # names at the right, one by one
        axes.annotate(
            row.name,
            (row.training_seconds, row.mean("fd")),
            xytext=(1.02, place),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=colors[i % 10],
            arrowprops={"arrowstyle": "-", "color": colors[i % 10], "linewidth": 0.5},
        )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def spread_out(places: Sequence[float], gap: float) -> list[float]:
    """Ascending places in [0, 1], moved so that neighbours stand at least ``gap`` apart."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else place)
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], 1.0 if i + 1 == len(moved) else moved[i + 1] - gap)
    return moved


def draw_samples(rows: Sequence[Row], path: Path) -> None:
    """A row of the ten digits for each mixer."""
    samples = [Sample(row.name, i, [image]) for row in rows for i, image in enumerate(row.images)]
    draw_grid(samples, {}).save(path)
