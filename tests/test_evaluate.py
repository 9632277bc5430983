"""evaluate_fid.py: figures of folders, files, statistics and samples; repeated, interrupted and swept.

All but the slow tests have a stub in Inception's place; :mod:`test_metrics` has Inception itself.
"""

import gc
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, give_zeros_noise, make_model, make_vae, run, start
from diffusers import FlowMatchEulerDiscreteScheduler
from evaluation_stub import COUNT, Stub, frechet_of_few, make_sets, one_of
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from iwin_dit import IwinDiTPipeline, IwinDiTTransformer3DModel, IwinDiTVideoPipeline
from iwin_dit.build import evaluation
from iwin_dit.build.loading import load_pipeline
from iwin_dit.commands import measure
from iwin_dit.commands.evaluate import parse_arguments
from iwin_dit.data.codec import weights_sha256
from iwin_dit.data.video import write_gif
from iwin_dit.diffusion.flow_matching import FlowMatching
from iwin_dit.evaluation import evaluate as chunks
from iwin_dit.evaluation.archives import NpzImages
from iwin_dit.evaluation.drawing import NpzFile, PngFolder, SampledImages, drawer, label_plan
from iwin_dit.evaluation.extractors import Inception
from iwin_dit.evaluation.images import FolderImages
from iwin_dit.evaluation.metrics import Features, compute
from iwin_dit.evaluation.rules import stored_command
from iwin_dit.pipelines.base import export_pipeline
from iwin_dit.runtime import scratch
from iwin_dit.runtime.processes import use_all_cores
from iwin_dit.runtime.seeds import generator

TWO_PROCESSES = (
    *(str(Path(sys.executable).parent / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
)
DRAWN = ("--num-images", 12, "--steps", 1)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return make_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr("iwin_dit.evaluation.extractors.Inception", Stub)
    monkeypatch.setattr(gc, "collect", lambda: None)  # which script_here does for a run's lock: here is none
    monkeypatch.setattr(measure, "use_all_cores", lambda processes: None)  # for so little


@pytest.fixture
def evaluate(sets, tmp_path, monkeypatch, script_here):
    """``evaluate(generated, *arguments) -> (figures, result)``."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(generated, *arguments):
        code, output = script_here("evaluate_fid.py", *command(sets / generated, *arguments))
        assert code == 0, output
        result = json.loads((tmp_path / "result.json").read_text())
        return result["figures"], result

    def command(generated, *arguments):
        files = ("--reference", sets / "real", "--out", tmp_path / "result.json")
        return ("--generated", generated, *files, *arguments)

    call.command = command
    return call


def test_folders_files_and_statistics_give_the_same_figures(sets, evaluate, stub, tmp_path):
    expected, result = evaluate("other", "--metrics", "fid,sfid,kid,is,pr")
    assert set(expected) == {"fid", "sfid", "kid", "kid_std", "is", "is_std", "precision", "recall"}
    assert result["generated"]["sha256"] == FolderImages(sets / "other").fingerprint
    assert result["extractor"]["name"] == Stub.name
    both = [Stub()(FolderImages(sets / name).read(0, COUNT)) for name in ("other", "real")]
    for metric, layer in (("fid", "pool"), ("sfid", "spatial")):  # of 12 samples of 8 and of 32 features
        assert expected[metric] == pytest.approx(frechet_of_few(*(f[layer] for f in both)), rel=1e-6)

    images = FolderImages(sets / "other").read(0, COUNT).movedim(1, -1).numpy()
    np.savez(sets / "other.npz", images)
    found, _ = evaluate("other.npz", "--metrics", "fid,sfid,kid,is,pr", "--batch-size", 7)
    assert found == pytest.approx(expected, rel=1e-6)

    features = Features(["fid", "sfid"])
    features.add(both[1])
    pool, spatial = features.moments["pool"], features.moments["spatial"]
    statistics = dict(mu=pool.mean, sigma=pool.covariance, mu_s=spatial.mean, sigma_s=spatial.covariance)
    np.savez(tmp_path / "statistics.npz", **statistics)
    found, result = evaluate("other", "--reference", tmp_path / "statistics.npz", "--metrics", "fid,sfid")
    assert len(result["reference"]["sha256"]) == 64
    assert found == pytest.approx({k: expected[k] for k in ("fid", "sfid")}, rel=1e-6)
    assert abs(evaluate("real")[0]["fid"]) < 1e-6 * expected["fid"]


def test_samples_do_not_depend_on_the_batch_and_are_repeated(evaluate, stub, script_here, tmp_path):
    options = (*DRAWN, "--metrics", "fid,sfid,kid,is,pr", "--draw-batch", 5)
    expected, result = evaluate("pipeline", *options)
    for batch in (1, 7):
        found, same = evaluate("pipeline", *options, "--batch-size", batch)
        assert found == pytest.approx(expected, rel=1e-6), batch
        assert same["generated"]["sha256"] == result["generated"]["sha256"]
    assert result["arguments"]["batch_size"] == 64
    assert result["generated"]["images"] == 12
    assert result["generated"]["scheduler"] == "FlowMatchEulerDiscreteScheduler"
    assert len(result["generated"]["weights_sha256"]) == 64

    code, output = script_here("evaluate_fid.py", "--repeat", tmp_path / "result.json")
    assert code == 0, output
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in output.splitlines() if "|" in line}
    assert [float(cell) for cell in rows["again"]] == pytest.approx(
        [float(cell) for cell in rows["stored"]], rel=1e-6
    )
    assert len(rows["again"]) == len(expected)
    assert float(re.search(r"largest relative difference (\S+)", output)[1]) < 1e-6
    assert "has changed" not in output

    stored = json.loads((tmp_path / "result.json").read_text())
    stored["figures"]["fid"] *= 2
    stored["generated"]["sha256"] = "of another model"
    (tmp_path / "result.json").write_text(json.dumps(stored))
    code, output = script_here("evaluate_fid.py", "--repeat", tmp_path / "result.json")
    assert code == 0, output
    assert "the generated has changed: its hash is another" in output
    assert "largest relative difference 5.0e-01" in output


def test_images_of_another_schedule_or_normalisation_are_others(sets, evaluate, stub, tmp_path):
    """Kept images are told apart by this hash."""
    hashes = []
    for shift, mean in ((1.0, 0.0), (6.0, 0.0), (1.0, 0.5)):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        statistics = dict(latents_mean=[mean] * 4, latents_std=[1.0] * 4)
        model = make_model(prediction_type="flow_prediction")
        export_pipeline(IwinDiTPipeline(model, make_vae(), scheduler, **statistics), tmp_path / "other", {})
        hashes.append(evaluate(tmp_path / "other", *DRAWN)[1]["generated"]["sha256"])
    assert len(set(hashes)) == 3


def test_two_evaluations_with_one_output_are_refused(sets, evaluate, stub, refused_here, tmp_path):
    work = scratch.make(scratch.beside(tmp_path / "result.json"))
    program = (
        "import sys; from pathlib import Path; from iwin_dit.runtime.lock import hold\n"
        "held = hold(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    other = start("-c", program, work, stdin=subprocess.PIPE)
    assert other.stdout.readline()
    error = refused_here("evaluate_fid.py", *evaluate.command(sets / "other"))
    assert f"is in use, held by pid {other.pid}" in error
    other.communicate()
    evaluate("other")
    assert not work.exists()


def test_a_guide_is_in_the_result_and_repeated(sets, evaluate, stub, refused_here, script_here, tmp_path):
    """With the sampler, the compilation and a scale of 0, which is the guide alone."""
    guide = make_model(num_layers=1, prediction_type="flow_prediction")
    statistics = dict(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    export_pipeline(
        IwinDiTPipeline(guide, make_vae(), FlowMatching().scheduler(), **statistics), tmp_path / "guide", {}
    )
    options = (*DRAWN, "--guide", tmp_path / "guide", "--sampler", "heun", "--guidance-scale", 0)
    found, result = evaluate("pipeline", *options)
    alone, _ = evaluate(tmp_path / "guide", *DRAWN, "--sampler", "heun", "--guidance-scale", 1)
    assert found == pytest.approx(alone, rel=1e-4)
    unguided, plain = evaluate("pipeline", *DRAWN, "--guidance-scale", 1)
    assert found != pytest.approx(unguided, rel=1e-3)
    generated = result["generated"]
    assert generated["guide"] == str(tmp_path / "guide")
    assert generated["guide_sha256"] == weights_sha256(guide)
    assert generated["scheduler"] == "FlowMatchHeunDiscreteScheduler"
    assert "guide" not in plain["generated"]

    evaluate("pipeline", *options)
    code, output = script_here("evaluate_fid.py", "--repeat", tmp_path / "result.json")
    assert code == 0, output
    assert float(re.search(r"largest relative difference (\S+)", output)[1]) < 1e-6
    assert "has changed" not in output

    give_zeros_noise(guide.train(), seed=1)
    with torch.no_grad():
        guide.proj_out.weight.mul_(1.5)
    again = IwinDiTPipeline(guide, make_vae(), FlowMatching().scheduler(), **statistics)
    export_pipeline(again, tmp_path / "guide", {})
    code, output = script_here("evaluate_fid.py", "--repeat", tmp_path / "result.json")
    assert code == 0, output
    assert "the generated has changed: its hash is another" in output

    options = ("--guide", tmp_path / "guide", "--out", tmp_path / "x.json")
    error = refused_here("evaluate_fid.py", *evaluate.command(sets / "other", *options))
    assert "--guide is for what a model draws" in error


def test_a_stored_command_is_that_of_before():
    given = ("--generated=a", "--reference=b", "--guide=c", "--sampler=unipc", "--compile", "--seed=0")
    given = (*given, "--guidance-scale=0", "--guidance-interval", "0", "0.5")
    arguments = parse_arguments(given)
    assert parse_arguments(stored_command({"arguments": vars(arguments)})) == arguments
    assert not parse_arguments(stored_command({"arguments": vars(arguments) | {"compile": False}})).compile


def test_a_model_is_measured_as_its_own_recipe_says(evaluate, stub, script_here, sets, tmp_path):
    """The result says how, so that it is repeated as it was when the recipe has changed."""
    own = {"num_inference_steps": 3, "guidance_scale": 1.5, "guidance_interval": [0.1, 0.8]}
    folder = tmp_path / "model"
    shutil.copytree(sets / "pipeline", folder)
    for sample in (own, own | {"guidance_channels": 2}):
        (folder / "recipe.json").write_text(json.dumps({"config": {"sample": sample}}))
        _, result = evaluate(folder, "--num-images", 12)
        assert {key: result["generated"][key] for key in sample} == sample
        other = {"num_inference_steps": 1, "guidance_channels": 1}
        (folder / "recipe.json").write_text(json.dumps({"config": {"sample": other}}))
        code, output = script_here("evaluate_fid.py", "--repeat", tmp_path / "result.json")
        assert code == 0, output
        assert float(re.search(r"largest relative difference (\S+)", output)[1]) < 1e-6
        assert "has changed" not in output


def test_a_sweep_is_an_evaluation_per_value(evaluate, stub, tmp_path):
    expected, _ = evaluate("pipeline", *DRAWN, "--guidance-scale", 1, "--metrics", "fid,is")
    sweep = ("--sweep", "guidance_scale=1,2", "--save-images", tmp_path / "drawn")
    evaluate("pipeline", *DRAWN, "--metrics", "fid,is", *sweep)
    assert (tmp_path / "result.png").stat().st_size > 5000
    swept = [json.loads((tmp_path / f"result.guidance_scale-{v}.json").read_text()) for v in ("1.0", "2.0")]
    assert swept[0]["figures"] == pytest.approx(expected, rel=1e-6)
    assert swept[1]["generated"]["guidance_scale"] == 2
    assert swept[1]["figures"] != swept[0]["figures"]
    one, two = (FolderImages(tmp_path / f"drawn.guidance_scale-{v}").read(0, 12) for v in ("1.0", "2.0"))
    assert not torch.equal(one, two)


def test_images_are_saved_as_they_were_evaluated(evaluate, stub, tmp_path, monkeypatch):
    """In chunks of five; stopped in the second one; then once more, which keeps what is there."""
    metrics = ("--metrics", "fid,sfid,kid,is,pr")
    expected, _ = evaluate("pipeline", *DRAWN, *metrics)
    monkeypatch.setattr(chunks, "CHUNK", 5)
    forward, seen = Stub.forward, []

    def stopping(self, images):
        seen.append(len(images))
        if len(seen) > allowed:
            raise KeyboardInterrupt
        return forward(self, images)

    monkeypatch.setattr(Stub, "forward", stopping)
    for target in (tmp_path / "drawn", tmp_path / "drawn.npz"):
        save = ("--save-images", target)
        seen.clear()
        allowed = 2  # of the second chunk's three batches of two, but one
        with pytest.raises(AssertionError, match="interrupted"):
            evaluate("pipeline", *DRAWN, *metrics, *save, "--batch-size", 3)
        assert sum(seen[:2]) == 5
        seen.clear()
        allowed = 100
        found, _ = evaluate("pipeline", *DRAWN, *metrics, *save)
        reference = COUNT * (target.suffix == "")  # of which the features are there the second time
        assert sum(seen) == 7 + reference, "the first chunk was there"
        assert found == pytest.approx(expected, rel=1e-6)
        found, _ = evaluate(target, *metrics)
        assert found == pytest.approx(expected, rel=1e-6)
    names = [path.name for path in sorted((tmp_path / "drawn").iterdir())]
    assert names == [*(f"{i:06d}.png" for i in range(12)), "recipe.json"]
    drawn, packed = FolderImages(tmp_path / "drawn"), NpzImages(tmp_path / "drawn.npz")
    assert torch.equal(drawn.read(0, 12), packed.read(0, 12))
    assert np.load(tmp_path / "drawn.npz")["arr_0"].shape == (12, 16, 16, 3)

    # a rerun writes what is missing, and leaves the rest
    before = {path: path.stat().st_mtime_ns for path in drawn.paths}
    drawn.paths[7].unlink()
    evaluate("pipeline", *DRAWN, "--save-images", tmp_path / "drawn")
    assert torch.equal(FolderImages(tmp_path / "drawn").read(0, 12), packed.read(0, 12))
    assert [path for path in before if path.stat().st_mtime_ns != before[path]] == [drawn.paths[7]]


def test_images_of_several_processes_are_the_same(tmp_path, monkeypatch):
    def draw(labels, generators):
        return torch.stack([torch.randint(256, (3, 16, 16), generator=g) for g in generators]).to(torch.uint8)

    monkeypatch.setattr(chunks, "CHUNK", 5)
    images = SampledImages(draw, label_plan("equal", 23, 3, 0), 0, {})
    for processes in (1, 3):
        folder = tmp_path / str(processes)
        for name in ("pngs", "parts"):
            (folder / name).mkdir(parents=True)
        exports = PngFolder(folder / "pngs", 23), NpzFile(folder / "x.npz", 23, folder / "parts")
        for again in (False, True):
            if again:  # features are there, but not all images: their chunks are drawn again
                next((folder / "pngs").glob("*11.png")).unlink()
                next((folder / "parts").glob("*10.npy")).unlink()
            for process in range(processes):
                for export in exports:
                    work, where = folder / type(export).__name__, one_of(processes, process)
                    chunks.extract_features(images, Stub(), work, 2, where, export=export)
        exports[1].finish()
        assert torch.equal(FolderImages(folder / "pngs").read(0, 23), images.read(0, 23))
        assert torch.equal(NpzImages(folder / "x.npz").read(0, 23), images.read(0, 23))


def test_other_extractors_have_names_of_their_own(sets, evaluate, tmp_path, monkeypatch):
    """A classifier of the user's, whose features are the mean colours: a distance that is known."""

    class Colours(nn.Module):
        def forward_features(self, x):
            return x

        def forward_head(self, x, pre_logits=False):
            return x.mean((2, 3))

        def get_classifier(self):
            return nn.Identity()

    loaded = namedtuple("LoadedClassifier", "model image_size mean std sha256")(
        Colours(), (16, 16), (0.5,) * 3, (0.25,) * 3, "f" * 64
    )
    monkeypatch.setattr(evaluation, "load_classifier", lambda run: loaded if run == "runs/mine" else None)
    found, result = evaluate("other", "--extractor", "iwin:runs/mine", "--metrics", "fd,kid,pr")
    assert list(found) == ["FD (iwin)", "KID (iwin)", "KID_std (iwin)", "precision (iwin)", "recall (iwin)"]
    assert result["extractor"]["sha256"] == "f" * 64
    colours = Features(["fd"]), Features(["fd"])
    for features, name in zip(colours, ("other", "real"), strict=True):
        pixels = FolderImages(sets / name).read(0, COUNT).double()
        features.add({"pool": (pixels.mean((2, 3)) / 255 - 0.5) / 0.25})
    assert found["FD (iwin)"] == pytest.approx(compute(["fd"], *colours)["fd"], rel=1e-5)
    default, result = evaluate("other", "--extractor", "iwin:runs/mine")
    assert list(default) == ["FD (iwin)"]
    assert result["arguments"]["metrics"] == "fd"


class Motion(nn.Module):
    """Six features of clips: each colour's mean, and how it changes from frame to frame."""

    name, sha256, preprocessing, layers = "i3d", "0" * 64, "none", ("logits",)

    def __init__(self, weights):
        super().__init__()

    def forward(self, clips):
        x = clips.float().mean((3, 4)) / 255
        return {"logits": torch.cat([x.mean(2), (x[:, :, 1:] - x[:, :, :-1]).mean(2)], 1)}


def test_clips_are_compared_by_an_extractor_of_clips(sets, evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr("iwin_dit.evaluation.i3d.I3D", Motion)
    rng = np.random.default_rng(0)
    clips = {
        name: rng.integers(low, 256, (12, 4, 8, 8, 3), dtype=np.uint8) for name, low in (("a", 0), ("b", 99))
    }
    for name, pixels in clips.items():
        np.savez(tmp_path / f"{name}.npz", pixels)
    chosen = ("--extractor", "i3d:weights.pt", "--reference", tmp_path / "b.npz")
    found, _ = evaluate(tmp_path / "a.npz", *chosen)
    features = []
    for name in ("a", "b"):
        x = clips[name].astype(np.float64).mean((2, 3)) / 255
        features.append(torch.from_numpy(np.concatenate([x.mean(1), (x[:, 1:] - x[:, :-1]).mean(1)], 1)))
    assert found == {"FVD (i3d)": pytest.approx(frechet_of_few(*features), rel=1e-4)}


def test_clips_that_a_model_draws_are_those_that_sampling_writes(
    sets, evaluate, refused_here, run_here, tmp_path, monkeypatch
):
    """GIFs of three colours and MP4s of sample.py are read as clips; the figure is that of the drawn ones."""
    monkeypatch.setattr("iwin_dit.evaluation.i3d.I3D", Motion)
    torch.manual_seed(0)
    model = IwinDiTTransformer3DModel(
        sample_frames=3,
        sample_size=8,
        in_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_classes=3,
        prediction_type="flow_prediction",
    )
    pipeline = IwinDiTVideoPipeline(give_zeros_noise(model).eval(), make_vae(), FlowMatching().scheduler())
    export_pipeline(pipeline, tmp_path / "model", {"step": 1})
    for i in range(12):
        greys = [Image.new("L", (16, 16), 20 * i + 5 * k) for k in range(3)]
        folder = tmp_path / "real" / str(i % 3)
        folder.mkdir(parents=True, exist_ok=True)
        write_gif(greys, folder / f"{i:02d}.gif", 8)
    common = ("--extractor", "i3d:weights.pt", "--reference", tmp_path / "real")
    drawing = ("--num-images", 9, "--steps", 2, "--guidance-scale", 2)
    found, result = evaluate(tmp_path / "model", *common, *drawing)
    draw = drawer(load_pipeline(str(tmp_path / "model")), {"num_inference_steps": 2, "guidance_scale": 2.0})
    labels = [0, 1, 2] * 3
    clips = draw(labels, [generator(0, "image", label, k // 3) for k, label in enumerate(labels)])
    assert clips.shape == (9, 3, 3, 16, 16)
    real = torch.tensor([[(20 * i + 5 * k) / 255 for k in range(3)] for i in range(12)], dtype=torch.float64)
    real = torch.stack([real.mean(1), (real[:, 2] - real[:, 0]) / 2], 1).repeat_interleave(3, 1)
    own = Motion(None)(clips)["logits"].double()
    assert found == {"FVD (i3d)": pytest.approx(frechet_of_few(own, real), rel=1e-3)}
    assert result["reference"]["clips"] == 12

    assert "is for images" in refused_here(
        *("evaluate_fid.py", "--generated", tmp_path / "model", *common, *drawing),
        *("--save-images", tmp_path / "x.npz", "--out", tmp_path / "x.json"),
    )
    assert "draws clips, which i3d:FILE alone compares" in refused_here(
        *("evaluate_fid.py", "--generated", tmp_path / "model", "--reference", sets / "real"),
        *("--out", tmp_path / "x.json"),
    )
    drawn = tmp_path / "drawn"
    sample = ("sample.py", "--checkpoint", tmp_path / "model", "--class", 0, 1, 2, "--num-images", 3)
    run_here(*sample, "--steps", 2, "--guidance-scale", 2, "--out", drawn)
    assert "are one clip twice" in refused_here(
        *("evaluate_fid.py", "--generated", drawn, *common, "--out", tmp_path / "x.json")
    )
    for path in drawn.glob("*.gif"):
        path.unlink()
    again, _ = evaluate(drawn, *common)
    assert again["FVD (i3d)"] == pytest.approx(found["FVD (i3d)"], rel=0.2)  # H.264 is not exact


def test_statistics_stand_in_for_the_reference(sets, evaluate, stub, script_here, tmp_path):
    """Of the extractor that they were made with alone; stored results print as one table."""
    kept, both = tmp_path / "new" / "folder" / "kept.safetensors", ("--metrics", "fid,sfid")
    expected, first = evaluate("other", *both, "--save-reference", kept)
    found, second = evaluate("other", *both, "--reference", kept)
    assert found == pytest.approx(expected, rel=1e-6)
    for name, result in (("one", first), ("two", second)):
        (tmp_path / f"{name}.json").write_text(json.dumps(result | {"figures": {name: 1.25}}))
    code, output = script_here("evaluate_fid.py", "--compare", tmp_path / "one.json", tmp_path / "two.json")
    assert code == 0
    assert "| | one | two |" in output
    assert f"| {tmp_path / 'two.json'} |  | 1.25 |" in output
    tensors = load_file(kept)
    assert tensors["pool.sigma"].dtype == torch.float64
    about = {"extractor": {"name": "another"}, "images": 12}
    save_file(tensors, kept, {"about": json.dumps(about)})
    code, output = script_here("evaluate_fid.py", *evaluate.command(sets / "other", "--reference", kept))
    assert code == 2
    assert "they are of the extractor {'name': 'another'}, not of" in output
    code, output = script_here(
        "evaluate_fid.py", *evaluate.command(sets / "other", "--save-reference", "kept.npz")
    )
    assert (code, "expected a path that ends with .safetensors" in output) == (2, True)


@pytest.mark.slow
def test_an_interrupted_evaluation_goes_on(sets, evaluate, inception_weights, tmp_path):
    """Killed after its first chunk, of a folder of three: that chunk is not made again."""
    many = tmp_path / "many"
    many.mkdir()
    for i in range(520):
        (many / f"{i:03d}.png").hardlink_to(sets / "other" / f"{i % COUNT:02d}.png")
    command = (
        *("evaluate_fid.py", "--generated", many, "--reference", sets / "real", "--metrics", "fid"),
        *("--inception-weights", inception_weights, "--out", tmp_path / "killed.json"),
    )
    process = start(*command, XDG_CACHE_HOME=str(tmp_path / "cache"), OMP_NUM_THREADS="2")
    work = tmp_path / ".killed.json.work"
    while not list(work.rglob("chunk-00000.safetensors")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    first = next(work.rglob("chunk-00000.safetensors"))
    before = first.stat().st_mtime_ns
    kept = tmp_path / "first.safetensors"
    kept.hardlink_to(first)
    run(*command, XDG_CACHE_HOME=str(tmp_path / "cache"), OMP_NUM_THREADS="2")
    assert kept.stat().st_mtime_ns == before
    assert not work.exists()
    whole = Features(["fid"])
    extractor = Inception(inception_weights)
    values = extractor(FolderImages(sets / "other").read(0, COUNT))["pool"].double()
    whole.add({"pool": values.repeat(44, 1)[:520]})
    stored = json.loads((tmp_path / "killed.json").read_text())["figures"]["fid"]
    reference = Features(["fid"])
    reference.add({"pool": extractor(FolderImages(sets / "real").read(0, COUNT))["pool"]})
    assert stored == pytest.approx(compute(["fid"], whole, reference)["fid"], rel=1e-5)


@pytest.mark.slow
def test_one_of_two_processes_looks_lists_and_computes(sets, evaluate, stub, tmp_path):
    """The other is told, and waits longer than the half hour after which gloo would give up."""
    metrics = ("--metrics", "fid,sfid,kid,is,pr")
    one, _ = evaluate("other", *metrics)
    shutil.rmtree(tmp_path / "cache")
    program = ROOT / "tests" / "evaluation_stub.py"
    command = evaluate.command(sets / "other", *metrics)
    environment = {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    output, _ = run(program, *command, launcher=TWO_PROCESSES, **environment)
    assert json.loads((tmp_path / "result.json").read_text())["figures"] == pytest.approx(one, rel=1e-6)
    lines = sorted(line for line in output.splitlines() if line.startswith("process "))
    wait = "timeout 86400"
    looked = 2 * COUNT + 2  # of each set the first is looked at once more, for its size
    assert lines == [
        f"process 0: {{'looked at': {looked}, 'listed': 2, 'computed': 1}} {wait}",
        f"process 1: {{'looked at': 0, 'listed': 0, 'computed': 0}} {wait}",
    ]


@pytest.mark.slow
def test_two_processes_give_the_same_figures(evaluate, sets, inception_weights, tmp_path, monkeypatch):
    """With as many threads in each, since the number of threads decides how float32 is rounded."""
    monkeypatch.setattr(measure, "use_all_cores", lambda processes: use_all_cores(2))
    options = (*DRAWN, "--metrics", "fid,kid,is", "--inception-weights", inception_weights)
    one, _ = evaluate("pipeline", *options, "--save-images", tmp_path / "one.npz")
    shutil.rmtree(tmp_path / "cache")
    command = evaluate.command(sets / "pipeline", *options, "--save-images", tmp_path / "two.npz")
    run("evaluate_fid.py", *command, launcher=TWO_PROCESSES, ACCELERATE_USE_CPU="true")
    two = json.loads((tmp_path / "result.json").read_text())["figures"]
    assert NpzImages(tmp_path / "one.npz").fingerprint == NpzImages(tmp_path / "two.npz").fingerprint
    assert two == pytest.approx(one, rel=1e-6)
