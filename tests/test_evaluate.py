"""evaluate_fid.py: figures of folders, files, statistics and samples; repeated, interrupted and swept."""

import json
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import make_pipeline, run, start
from PIL import Image

from iwin_dit.evaluation.extractors import Inception
from iwin_dit.evaluation.images import FolderImages
from iwin_dit.evaluation.metrics import Features
from iwin_dit.pipelines.export import export_pipeline

COUNT = 12
TWO_PROCESSES = (
    *(str(Path(sys.executable).parent / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two folders of 16 x 16 pixels, and a pipeline that draws such images."""
    root = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    for name, low in (("real", 0), ("other", 80)):
        (root / name).mkdir()
        for i in range(COUNT):
            pixels = rng.integers(low, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:02d}.png")
    pipeline = make_pipeline()
    export_pipeline(pipeline, root / "pipeline", {})
    return root


@pytest.fixture
def evaluate(sets, inception_weights, tmp_path, monkeypatch, script_here):
    """``evaluate(generated, *arguments) -> (figures, result)``."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(generated, *arguments):
        code, output = script_here("evaluate_fid.py", *command(sets / generated, *arguments))
        assert code == 0, output
        result = json.loads((tmp_path / "result.json").read_text())
        return result["figures"], result

    def command(generated, *arguments):
        return (
            *("--generated", generated, "--reference", sets / "real", "--out", tmp_path / "result.json"),
            *("--inception-weights", inception_weights, *arguments),
        )

    call.command = command
    return call


def test_folders_files_and_statistics_give_the_same_figures(sets, evaluate, inception_weights, tmp_path):
    expected, result = evaluate("other", "--metrics", "fid,sfid,kid,is,pr")
    assert set(expected) == {"fid", "sfid", "kid", "kid_std", "is", "is_std", "precision", "recall"}
    assert result["generated"]["sha256"] == FolderImages(sets / "other").fingerprint
    assert result["extractor"]["name"].startswith("inception-"), "random weights are not called Inception"

    images = FolderImages(sets / "other").read(0, COUNT).movedim(1, -1).numpy()
    np.savez(sets / "other.npz", images)
    found, _ = evaluate("other.npz", "--metrics", "fid,kid", "--batch-size", 7)
    assert found == pytest.approx({k: expected[k] for k in ("fid", "kid", "kid_std")}, rel=1e-6)

    features = Features(["fid", "sfid"])
    features.add(Inception(inception_weights)(FolderImages(sets / "real").read(0, COUNT)))
    pool, spatial = features.moments["pool"], features.moments["spatial"]
    statistics = dict(mu=pool.mean, sigma=pool.covariance, mu_s=spatial.mean, sigma_s=spatial.covariance)
    np.savez(tmp_path / "statistics.npz", **statistics)
    found, _ = evaluate("other", "--reference", tmp_path / "statistics.npz", "--metrics", "fid,sfid")
    assert found == pytest.approx({k: expected[k] for k in ("fid", "sfid")}, rel=1e-6)

    # the folder changes: what was kept of it is not used
    again, _ = evaluate("real", "--metrics", "fid")
    assert abs(again["fid"]) < 1e-6 * expected["fid"]
    shutil.copytree(sets / "real", tmp_path / "changed")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "changed" / "00.png")
    changed, _ = evaluate("real", "--reference", tmp_path / "changed", "--metrics", "fid")
    assert changed["fid"] > 1e-3 * expected["fid"]


def test_samples_are_evaluated_and_repeated(evaluate, script_here, tmp_path):
    options = ("--num-images", 12, "--steps", 2, "--metrics", "fid,is")
    expected, result = evaluate("pipeline", *options)
    for batch in (5,):
        found, _ = evaluate("pipeline", *options, "--batch-size", batch)
        assert found == pytest.approx(expected, rel=1e-5)
    assert result["generated"]["images"] == 12
    assert result["generated"]["scheduler"] == "FlowMatchEulerDiscreteScheduler"
    assert len(result["generated"]["weights_sha256"]) == 64

    code, output = script_here("evaluate_fid.py", "--repeat", tmp_path / "result.json")
    rows = {line.split("|")[1].strip(): line.split("|")[2:4] for line in output.splitlines() if "|" in line}
    assert code == 0, output
    assert [float(cell) for cell in rows["again"]] == pytest.approx(
        [float(cell) for cell in rows["stored"]], rel=1e-5
    )
    evaluate("pipeline", *options, "--sweep", "guidance_scale=1,2")
    assert (tmp_path / "result.png").stat().st_size > 5000
    swept = [json.loads((tmp_path / f"result.guidance_scale-{v}.json").read_text()) for v in ("1.0", "2.0")]
    assert swept[0]["figures"] == pytest.approx(expected, rel=1e-5)
    assert swept[1]["generated"]["guidance_scale"] == 2
    assert swept[1]["figures"] != swept[0]["figures"]


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
    work = tmp_path / "killed.work"
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
    from iwin_dit.evaluation.metrics import compute

    assert stored == pytest.approx(compute(["fid"], whole, reference)["fid"], rel=1e-5)


@pytest.mark.slow
def test_two_processes_give_the_same_figures(evaluate, sets, tmp_path):
    options = ("--num-images", 12, "--steps", 2, "--metrics", "fid,kid,is")
    one, _ = evaluate("pipeline", *options)
    command = evaluate.command(sets / "pipeline", *options)
    run("evaluate_fid.py", *command, launcher=TWO_PROCESSES, ACCELERATE_USE_CPU="true")
    two = json.loads((tmp_path / "result.json").read_text())["figures"]
    assert two == pytest.approx(one, rel=1e-6)


def test_mistakes_are_one_line(sets, inception_weights, tmp_path, script_here):
    weights = ("--inception-weights", inception_weights, "--out", tmp_path / "x.json")
    (tmp_path / "large").mkdir()
    for i in range(3):
        Image.new("RGB", (20, 20)).save(tmp_path / "large" / f"{i}.png")
    np.savez(tmp_path / "objects.npz", mu=np.array([print], dtype=object), sigma=np.zeros(1))
    real = ("--generated", sets / "real", *weights)
    for arguments, message in (
        (("--generated", sets / "real", "--metrics", "fod"), "--metrics has fod, expected some of fid, sfid"),
        ((*real, "--metrics", "kid"), "kid compares with real images: give --reference"),
        ((*real, "--reference", tmp_path / "large"), "have (16, 16) pixels, the reference's have (20, 20)"),
        ((*real, "--reference", tmp_path / "nothing"), "is neither a folder of images nor an .npz file"),
        ((*real, "--reference", tmp_path / "objects.npz"), "does not hold statistics mu and sigma"),
        ((*real, "--reference", sets / "real", "--inception-weights", tmp_path / "no.pth"), "is not there"),
        ((), "--generated is missing"),
    ):
        code, output = script_here("evaluate_fid.py", *arguments)
        assert code == 2, output
        assert message in output
        assert output.count("error: ") == 1
        assert "Traceback" not in output
