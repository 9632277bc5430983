"""The report of the video quickstart: ``python -m studies.moving_digits_report RUN``.

Writes to ``RUN/report``: film strips, the same as GIF and MP4, the loss curve, and a table for 120 clips, 3
of each class, and, for scale, for real clips of scans that were not trained on and for the same through the
VAE. It says how many clips are judged to be of their class:

* the digit by a support vector machine that knows middle frames of real clips only;
* the direction by how the centroid of what is bright moves from the first frame to the last.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from iwin_dit.build.loading import load_pipeline
from iwin_dit.data.codec import decode, encode
from iwin_dit.data.moving_digits import DIRECTIONS, NUM_FRAMES, SIDE
from iwin_dit.data.pixels import Reader
from iwin_dit.data.sources import ClipFolderSource
from iwin_dit.data.video import ClipSpec
from iwin_dit.pipelines.sampling import Sample, sample_classes, write_grid
from iwin_dit.runtime.errors import DataError, run_script
from iwin_dit.runtime.processes import keep_freed_memory
from iwin_dit.runtime.run import read_config
from studies.digits_report import SEED, Recogniser, percent

NUM_PER_CLASS = 3
SHOWN = ("3 left", "3 right", "5 up", "8 down", "0 left", "7 right", "2 up", "4 down")
NEXT = """
Look at samples.png (film strips), samples.gif and loss.png in {report}. Then try
  python sample.py --checkpoint {run} --class "3 left" "3 right" --num-images 4 --out threes.gif
  python sample.py --checkpoint {run} --class "8 up" --num-frames 12 --out longer.gif"""


def read_clips(folder: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Clips ``(N, 3, T, H, W)`` in [-1, 1], labels ``(N,)`` and class names of a folder of class folders."""
    reader = Reader(ClipFolderSource(folder), (SIDE, SIDE), clip=ClipSpec(NUM_FRAMES))
    found = [reader.read(i, torch.Generator()) for i in range(len(reader))]
    clips = torch.stack([clip.pixels for clip in found]).float() / 127.5 - 1
    return clips, torch.tensor([clip.label for clip in found]), reader.source.class_names


def to_clips(samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """The same of samples, without the names."""
    clips = np.stack([np.stack([np.asarray(frame) for frame in sample.frames]) for sample in samples])
    return torch.from_numpy(clips).movedim(-1, 1) / 127.5 - 1, torch.tensor([s.label for s in samples])


def directions(clips: Tensor) -> list[str]:
    """Where the centroid of what is bright goes from the first frame to the last."""
    bright = (clips.mean(1) + 1) / 2  # (N, T, H, W)
    bright = (bright - 0.2).clamp(min=0)  # a faint background has a centroid, too
    weight = bright.sum((2, 3)).clamp(min=1e-6)
    places = torch.arange(clips.shape[-1], dtype=torch.float32)
    x = (bright.sum(2) * places).sum(-1) / weight  # (N, T)
    y = (bright.sum(3) * places).sum(-1) / weight
    moved = torch.stack([x[:, -1] - x[:, 0], y[:, -1] - y[:, 0]], 1)  # (N, 2)
    ways = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float32)  # (4, 2)
    return [list(DIRECTIONS)[i] for i in (moved @ ways.T).argmax(1)]


class Judge:
    """Whether digit and direction of clips are those of their classes, by rules that know real clips only.

    Args:
        clips, labels, names: see :func:`read_clips`.
    """

    def __init__(self, clips: Tensor, labels: Tensor, names: list[str]):
        self.classes = [name.split() for name in names]  # digit and direction
        self.recogniser = Recogniser(self._middle(clips), self._digits(labels), side=16)

    def __call__(self, clips: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """By the name of the column: ``(N,)`` booleans."""
        digit = self.recogniser(self._middle(clips)) == self._digits(labels)
        wanted = [self.classes[label][1] for label in labels.tolist()]
        direction = torch.tensor([a == b for a, b in zip(directions(clips), wanted, strict=True)])
        return {"digit": digit, "direction": direction, "both": digit & direction}

    def _digits(self, labels: Tensor) -> Tensor:
        return torch.tensor([int(self.classes[label][0]) for label in labels.tolist()])

    @staticmethod
    def _middle(clips: Tensor) -> Tensor:
        return clips[:, :, clips.shape[2] // 2]


def main() -> None:
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/video_quickstart")
    keep_freed_memory()
    pipeline = load_pipeline(str(run))
    config = read_config(run)
    data = Path(config["data"]["path"])
    if not (data / "test").is_dir():
        raise DataError(f"{data}/test does not exist: the report is for runs on the moving digits")
    report = run / "report"
    report.mkdir(exist_ok=True)

    keys = ("num_inference_steps", "guidance_scale", "guidance_interval")
    options = {key: config["sample"][key] for key in keys}
    classes = range(len(pipeline.id2label))
    samples = list(sample_classes(pipeline, classes, NUM_PER_CLASS, SEED, batch_size=40, **options))
    shown = pipeline.get_label_ids(list(SHOWN))
    strips = [s for label in shown for s in samples if s.label == label and s.number == 0]
    write_grid(strips, report / "samples.png", {"run": str(run), "seed": SEED, **options}, pipeline.id2label)
    shutil.copyfile(run / "loss.png", report / "loss.png")

    judge = Judge(*read_clips(data / "train"))
    real, labels, _ = read_clips(data / "test")
    rows = {
        "real clips, never trained on": (real, labels),
        "the same through the VAE": (decode(pipeline.vae, encode(pipeline.vae, real)).clamp(-1, 1), labels),
        "samples of the model": to_clips(samples),
    }
    lines = ["| clips | number | digit | direction | both |", "|---|---|---|---|---|"]
    for name, (clips, labels) in rows.items():
        cells = [percent(right) for right in judge(clips, labels).values()]
        lines.append(f"| {name} | {len(clips)} | {' | '.join(cells)} |")
    (report / "report.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(NEXT.format(report=report, run=run))


if __name__ == "__main__":
    run_script(main)
