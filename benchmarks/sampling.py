"""Sampling: few-step solvers and kinds of guidance by FD, compiled against eager, and waits for the GPU.

    python benchmarks/sampling.py                       tables, and docs/sampling.png; after make demo
    python benchmarks/sampling.py --time [--size XL/1]  a call of the pipeline, eager and compiled
    python benchmarks/sampling.py --sync-check          every sampler on CUDA, where a wait is an error

FD (iwin) is the distance to halves of the held-out digits, of 150 images a seed, so that the real digits' own
distance, half against half, stands beside it as the scale. The noise is the same in every row. The guides
of autoguidance are the quickstart after 50 steps, and a smaller model:

    accelerate launch train_dit.py --output_dir runs/quickstart_small --model.depth 2 --model.width 64 \
        --train.max_steps 300
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import matplotlib
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from iwin_dit import IwinDiTPipeline, IwinDiTTransformer2DModel
from iwin_dit.build.loading import choose_sampler, compile_models, load_guide, load_pipeline
from iwin_dit.data.digits import read_images
from iwin_dit.diffusion.ddpm import DDPM
from iwin_dit.diffusion.flow_matching import FlowMatching
from iwin_dit.diffusion.objective import Objective
from iwin_dit.runtime.errors import CheckpointError, ConfigError, run_script
from iwin_dit.runtime.processes import keep_freed_memory
from iwin_dit.runtime.progress import progress, say
from iwin_dit.runtime.seeds import generator
from studies.digits_report import CLASSIFIER, Distance

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RUN, GUIDES = Path("runs/quickstart"), ("runs/quickstart_50_steps", "runs/quickstart_small")
HELD_OUT, PICTURE = Path("data/digits/test"), Path("docs/sampling.png")
NUM_IMAGES, NUM_CLASSES = 150, 10
CALLS = (4, 8, 16, 32, 64)
GUIDANCE_STEPS, SCALES, INTERVAL = 8, (1.5, 2.0, 3.0), (0.1, 0.8)
NO_GUIDANCE = "none"
DTYPES = {"bfloat16": torch.nn.Module.bfloat16, "float32": torch.nn.Module.float}


@dataclass
class Case:
    """A point of a curve: FD of one way to sample, for each seed.

    curve, x: where it is in the picture; calls, guide_calls: forward passes of an image, as they are counted.
    """

    curve: str
    x: float
    sampler: str
    steps: int
    options: dict[str, Any] = field(default_factory=dict)
    calls: float = 0.0
    guide_calls: float = 0.0
    distances: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        spread = f" ± {stdev(self.distances):.2f}" if len(self.distances) > 1 else ""
        return f"{mean(self.distances):.2f}{spread}"


class Calls:
    """Counts the images that a network is asked about."""

    def __init__(self, network: torch.nn.Module):
        self.images = 0
        network.register_forward_pre_hook(self._count)

    def _count(self, network: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self.images += len(arguments[0])


def solver_cases() -> list[Case]:
    """Heun calls the model twice a step, but once in the last: N calls are (N + 1) / 2 steps."""
    return [
        Case(sampler, calls, sampler, calls // 2 if sampler == "heun" else calls, {"guidance_scale": 1.0})
        for sampler in FlowMatching().samplers
        for calls in CALLS
    ]


def guidance_cases(guides: dict[str, IwinDiTTransformer2DModel]) -> list[Case]:
    kinds = {"classifier-free": {}, f"in t of {INTERVAL}": {"guidance_interval": INTERVAL}}
    kinds |= {f"by {Path(source).name}": {"guide": guide} for source, guide in guides.items()}
    cases = [Case(NO_GUIDANCE, 1.0, "euler", GUIDANCE_STEPS, {"guidance_scale": 1.0})]
    for kind, options in kinds.items():
        for scale in SCALES:
            cases.append(Case(kind, scale, "euler", GUIDANCE_STEPS, options | {"guidance_scale": scale}))
    return cases


def measure(
    cases: list[Case], pipeline: IwinDiTPipeline, guides: dict, distance: Distance, seeds: int
) -> None:
    """Fills in the distances and the calls of all cases."""
    own, theirs = Calls(pipeline.transformer), [Calls(guide) for guide in guides.values()]
    labels = [k % NUM_CLASSES for k in range(NUM_IMAGES)]
    with progress(total=sum(case.steps for case in cases) * seeds, unit="step", desc="sample") as bar:
        for case in cases:
            choose_sampler(pipeline, case.sampler)
            for counter in (own, *theirs):
                counter.images = 0
            for seed in range(seeds):
                noise = [generator(seed, "image", label, k // NUM_CLASSES) for k, label in enumerate(labels)]
                options = dict(num_inference_steps=case.steps, output_type="pt", return_dict=False)
                (images,) = pipeline(labels, generator=noise, **options, **case.options)
                case.distances.append(distance(2 * images.float().cpu() - 1, torch.tensor(labels)))
                bar.update(case.steps)
            case.calls = own.images / NUM_IMAGES / seeds
            case.guide_calls = sum(counter.images for counter in theirs) / NUM_IMAGES / seeds


def solver_table(cases: list[Case]) -> str:
    lines = ["| sampler | " + " | ".join(f"{calls} calls" for calls in CALLS) + " |"]
    lines.append("|---" * (len(CALLS) + 1) + "|")
    for sampler in FlowMatching().samplers:
        row = [case for case in cases if case.curve == sampler]
        odd = any(case.calls != case.x for case in row)
        name = f"{sampler} ({', '.join(f'{case.calls:g}' for case in row)} calls)" if odd else sampler
        lines.append(f"| {name} | " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines)


def guidance_table(cases: list[Case]) -> str:
    lines = ["| guidance | " + " | ".join(f"scale {scale:g}" for scale in SCALES) + " | calls of an image |"]
    lines.append("|---" * (len(SCALES) + 2) + "|")
    for kind in dict.fromkeys(case.curve for case in cases):
        row = [case for case in cases if case.curve == kind]
        calls = f"{row[0].calls:g}"
        if row[0].guide_calls:
            calls += f" + {row[0].guide_calls:g} of the guide"
        cells = list(map(str, row)) if len(row) == len(SCALES) else [f"{row[0]} (scale 1)", "", ""]
        lines.append(f"| {kind} | " + " | ".join(cells) + f" | {calls} |")
    return "\n".join(lines)


def draw(solvers: list[Case], guided: list[Case], real: float) -> None:
    """FD against model calls, and against the guidance scale."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for panel, cases in zip(panels, (solvers, guided), strict=True):
        start = [case for case in cases if case.curve == NO_GUIDANCE]
        for name in dict.fromkeys(case.curve for case in cases if case.curve != NO_GUIDANCE):
            points = start + [case for case in cases if case.curve == name]
            x = [case.calls if cases is solvers else case.x for case in points]
            spread = [stdev(case.distances) if len(case.distances) > 1 else 0.0 for case in points]
            y = [mean(case.distances) for case in points]
            panel.errorbar(x, y, spread, marker="o", markersize=4, linewidth=1.4, capsize=2, label=name)
        panel.axhline(real, color="grey", linestyle=":", label="real digits, half against half")
        panel.legend(frameon=False, fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set(xlabel="model calls of an image, without guidance", ylabel="FD (iwin)")
    panels[0].set_xscale("log", base=2)
    panels[0].set_xticks(CALLS, [str(calls) for calls in CALLS])
    panels[1].set(xlabel=f"guidance scale, {GUIDANCE_STEPS} steps of Euler")
    figure.savefig(PICTURE, dpi=120)
    plt.close(figure)


def compare(arguments: argparse.Namespace) -> None:
    """Both tables and the picture."""
    for path in (RUN, Path(CLASSIFIER), HELD_OUT):
        if not path.exists():
            raise CheckpointError(f"{path} is not there; make demo makes it")
    started = time.perf_counter()
    pipeline = load_pipeline(str(RUN), arguments.device)
    guides = {}
    for source in arguments.guides:
        if Path(source).exists():
            guides[source] = load_guide(source, pipeline)
        else:
            say(f"without the guide {source}, which is not there; see --help")
    for model in (pipeline.transformer, *guides.values()):
        DTYPES[arguments.dtype](model)
    images, labels, _ = read_images(HELD_OUT)
    distance = Distance(CLASSIFIER, images, labels)
    real = distance(images, labels)
    solvers, guided = solver_cases(), guidance_cases(guides)
    measure([*solvers, *guided], pipeline, guides, distance, arguments.seeds)
    say(
        f"FD (iwin), mean and standard deviation over {arguments.seeds} seeds of {NUM_IMAGES} images, "
        f"{arguments.dtype}, on {machine(arguments.device)}; real digits, half against half: {real:.2f}\n\n"
        f"{solver_table(solvers)}\n\n{GUIDANCE_STEPS} steps of Euler:\n\n{guidance_table(guided)}"
    )
    draw(solvers, guided, real)
    say(f"\n{PICTURE}; {time.perf_counter() - started:.0f} s")


def toy(objective: Objective, sampler: str, size: str | None, device: str) -> IwinDiTPipeline:
    """A pipeline with random weights: of the size, on 16 x 16 x 32 latents, or a few blocks on 8 x 8 x 4."""
    common = dict(prediction_type=objective.prediction_type, num_classes=1000)
    if size is not None:
        model = IwinDiTTransformer2DModel.from_size(size, **common)
    else:
        channels = 4 * objective.kind.outputs
        common |= dict(sample_size=8, in_channels=4, out_channels=channels, num_layers=2)
        model = IwinDiTTransformer2DModel(num_attention_heads=2, attention_head_dim=16, **common)
    pipeline = IwinDiTPipeline(model.eval(), AutoencoderKL(), objective.scheduler(sampler))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def check_sync(arguments: argparse.Namespace) -> None:
    """Each sampler's steps after the first, with an error of PyTorch's at the first wait for the GPU."""
    if not torch.cuda.is_available():
        raise ConfigError("--sync-check needs a GPU of NVIDIA; tests/test_guidance.py checks on any machine")

    def watch(pipe: IwinDiTPipeline, step: int, timestep: Tensor, tensors: dict) -> dict:
        torch.cuda.set_sync_debug_mode("error" if step + 1 < pipe.num_timesteps else "default")
        return tensors

    print("| objective | sampler | guidance | waits for the GPU |\n|---|---|---|---|")
    for objective in (FlowMatching(), DDPM()):
        for sampler in objective.samplers:
            pipeline, guide = (toy(objective, sampler, None, "cuda") for _ in range(2))
            for kind, network in (("classifier-free", None), ("by a guide", guide.transformer)):
                options = dict(num_inference_steps=6, guidance_scale=2.0, guidance_interval=(0.2, 0.9))
                noise = torch.Generator("cuda").manual_seed(0)
                found = "none"
                try:
                    options |= dict(generator=noise, guide=network, callback_on_step_end=watch)
                    pipeline([0, 1, 2], output_type="latent", **options)
                except RuntimeError as error:
                    found = f"yes: {str(error).splitlines()[0]}"
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                print(f"| {type(objective).__name__} | {sampler} | {kind} | {found} |", flush=True)


def compare_times(arguments: argparse.Namespace) -> None:
    """Milliseconds of a call of the pipeline without its decoder, eager and compiled in turn."""
    device, steps, batch = arguments.device, GUIDANCE_STEPS, arguments.batch
    if arguments.size is None:
        eager = load_pipeline(str(RUN), device)
    else:
        eager = toy(FlowMatching(), "euler", arguments.size, device)
    DTYPES[arguments.dtype](eager.transformer)
    compiled = IwinDiTPipeline(copy.deepcopy(eager.transformer), eager.vae, eager.scheduler)
    compiled.set_progress_bar_config(disable=True)
    compile_models(compiled.transformer)

    def seconds(pipeline: IwinDiTPipeline) -> tuple[float, Tensor]:
        started = time.perf_counter()
        latents = pipeline(
            [k % NUM_CLASSES for k in range(batch)],
            generator=[generator(0, "image", k) for k in range(batch)],
            **dict(num_inference_steps=steps, guidance_scale=2.0, output_type="latent"),
        ).images.cpu()
        return time.perf_counter() - started, latents

    _, one = seconds(eager)
    first, two = seconds(compiled)
    times = [(seconds(eager)[0], seconds(compiled)[0]) for _ in range(arguments.rounds)]
    own, other = (1e3 * median(column) for column in zip(*times, strict=True))
    ratio = median(a / b for a, b in times)
    difference = ((one - two).abs().max() / one.abs().max()).item()
    print(
        f"{arguments.size or RUN}, {arguments.dtype}, {batch} images, {steps} steps with guidance, on "
        f"{machine(device)}: eager {own:.0f} ms, compiled {other:.0f} ms, ratio {ratio:.2f}; the first call "
        f"compiles, {first:.0f} s; largest relative difference of the latents {difference:.1e}"
    )


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    count = torch.get_num_threads()
    return f"{count} thread{'s' if count > 1 else ''} of a CPU"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    add("--dtype", default="bfloat16", choices=tuple(DTYPES), help="of the transformers (bfloat16)")
    add("--seeds", type=int, default=3)
    add("--guides", nargs="*", default=GUIDES, metavar="RUN", help="(those above)")
    add("--time", action="store_true", help="a call, eager and compiled")
    add("--size", help="with --time: such as XL/1, with random weights (the quickstart's run)")
    add("--batch", type=int, default=16, help="with --time: images of a call (16)")
    add("--rounds", type=int, default=5, help="with --time (5)")
    add("--sync-check", action="store_true", help="on CUDA: which samplers wait for the GPU")
    arguments = parser.parse_args()
    keep_freed_memory()
    action = check_sync if arguments.sync_check else compare_times if arguments.time else compare
    action(arguments)


if __name__ == "__main__":
    run_script(main)
