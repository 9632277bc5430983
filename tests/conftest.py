"""Real classes at toy size, shared by the tests."""

import contextlib
import functools
import gc
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as iwin_dit says, but before torch is loaded here
os.environ["HF_HUB_OFFLINE"] = "1"  # what is not there is not asked for, again and again

import torch

# without a GPU, Triton's kernels run in its interpreter: read when triton is imported, as by what follows
os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))

import torch_fidelity.feature_extractor_inceptionv3 as theirs
import yaml
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from iwin_dit.data.codec import encode
from iwin_dit.data.latents import Shard, write_latents
from iwin_dit.diffusion.flow_matching import FlowMatching
from iwin_dit.models.transformer import IwinDiTTransformer2DModel
from iwin_dit.pipelines.media import IwinDiTPipeline
from iwin_dit.runtime.signals import ASKING, AT_ONCE

ROOT = Path(__file__).parent.parent
NUM_IMAGES, NUM_CLASSES = 60, 3


def pytest_configure(config):
    """Each worker of pytest-xdist, and what it starts, has one core: threads of others would make it wait."""
    worker = getattr(config, "workerinput", {}).get("workerid")
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
    torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5  # it waits so long for a worker, not 5 s


def pytest_collection_modifyitems(items):
    """The longest tests come first, so that no worker waits for another at the end."""
    items.sort(key=lambda item: not any(name in item.nodeid for name in ("test_readme", "test_wheel")))


def pytest_collection_finish():
    """What has been imported stays: a search for garbage, which took a second, leaves it out from here on."""
    gc.collect()
    gc.freeze()


def give_zeros_noise(model, seed=0):
    """adaLN-Zero starts as a constant, which would hide any mistake: no parameter stays all zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if not parameter.any():
            with torch.no_grad():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def make_vae(latent_channels=4):
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8],
        latent_channels=latent_channels,
        norm_num_groups=4,
        mid_block_add_attention=False,
    ).eval()


def make_model(**options):
    torch.manual_seed(0)
    defaults = dict(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_classes=NUM_CLASSES,
        mixer={"window_size": 4},
    )
    return give_zeros_noise(IwinDiTTransformer2DModel(**(defaults | options))).eval()


def make_pipeline():
    """It draws images of 16 x 16 pixels of three classes."""
    return IwinDiTPipeline(
        make_model(prediction_type="flow_prediction"),
        make_vae(),
        FlowMatching().scheduler(),
        id2label={0: "shark", 1: "dog", 2: "umbrella"},
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


@pytest.fixture(scope="session")
def latents_folder(tmp_path_factory):
    """60 images of 3 classes through a real, tiny VAE, in two shards; the folder's name is not all ASCII."""
    root = tmp_path_factory.mktemp("dätä 漢")
    vae = make_vae()
    vae.save_pretrained(root / "vae")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(NUM_IMAGES, 3, 1, 1, generator=generator).expand(-1, -1, 16, 16)
    images = (images + 0.3 * torch.randn(NUM_IMAGES, 3, 16, 16, generator=generator)).clamp(-1, 1)
    labels = torch.arange(NUM_IMAGES) % NUM_CLASSES
    shards = [
        Shard(encode(vae, images[part]), encode(vae, images[part].flip(-1)), labels[part])
        for part in (slice(0, 40), slice(40, None))
    ]
    names = ["white shark", "golden retriever", "umbrella"]
    write_latents(root / "latents", shards, {"vae": "../vae", "image_size": [16, 16], "class_names": names})
    return root / "latents"


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """Inception's architecture with random weights, saved as torch-fidelity's file is.

    They are scaled so that what is left of an image after 94 layers is not a millionth.
    """
    patch = pytest.MonkeyPatch()
    patch.setattr(theirs, "load_state_dict_from_url", lambda *a, **k: {})
    patch.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda *a, **k: None)
    torch.manual_seed(0)
    network = theirs.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    patch.undo()
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.weight.data.fill_(2.4)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture
def recipe(latents_folder, tmp_path):
    """``recipe(**overrides)`` writes a config that runs in seconds; ``train={...}`` updates a section."""

    def write(name="config.yaml", **overrides):
        config = {
            "output_dir": str(tmp_path / "run"),
            "data": {"path": str(latents_folder), "random_flip": True},
            "model": {
                **{"depth": 2, "width": 32, "heads": 2, "patch_size": 1, "sample_size": 8, "in_channels": 4},
                **{"num_classes": NUM_CLASSES, "mixer": {"window_size": 4}},
            },
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 5, "eps": 1e-6},
            "train": {
                **{
                    "max_steps": 60,
                    "batch_images": 8,
                    "precision": "fp32",
                    "num_workers": 0,
                },
                **{"log_every_steps": 2, "save_every_steps": 20, "sample_every_steps": 0},
            },
            "ema": {"decays": [0.9]},
            "sample": {"num_inference_steps": 2, "num_per_class": 1},
        }
        for key, value in overrides.items():
            if isinstance(value, dict):
                config.setdefault(key, {}).update(value)
            else:
                config[key] = value
        path = tmp_path / name
        path.write_text(yaml.safe_dump(config))
        return path

    return write


def start(*arguments, cwd=ROOT, launcher=(), start_new_session=False, stdin=None, **environment):
    command = [*(launcher or (sys.executable,)), *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=cwd,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=start_new_session,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
    )


def watch_attention(monkeypatch):
    """The set of (whether gradients are wanted, whether flash attention is allowed), which calls fill."""
    seen, real = set(), torch.nn.functional.scaled_dot_product_attention

    def attend(q, *arguments, **options):
        if not q.is_meta:  # which counts operations
            seen.add((torch.is_grad_enabled(), torch.backends.cuda.flash_sdp_enabled()))
        return real(q, *arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    return seen


def execute(script, *arguments):
    """The exit code of a script in this process."""
    handlers = {s: signal.getsignal(s) for s in (*AT_ONCE, *ASKING)}
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [script, *map(str, arguments)])
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as ended:
        return ended.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        AcceleratorState._reset_state(reset_partial_state=True)
        with contextlib.suppress(RuntimeError):  # of a worker that a test has killed
            gc.collect()  # the run's lock


@pytest.fixture
def script_here(capfd):
    """``script_here(script, *arguments) -> (exit code, output)``: in this process, to be patched."""

    def call(script, *arguments):
        capfd.readouterr()
        code = execute(script, *arguments)
        return code, "".join(capfd.readouterr())

    return call


@pytest.fixture
def run_here(script_here):
    """``run_here(script, *arguments) -> output``, where :func:`run` would start a process."""

    def call(*arguments, expect=0):
        code, output = script_here(*arguments)
        assert (code or 0) == expect, output
        return output

    return call


@pytest.fixture
def refused_here(run_here):
    """``refused_here(script, *arguments)``: the one line of error, as :func:`refused`."""

    def call(*arguments):
        output = run_here(*arguments, expect=2)
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, output
        assert "Traceback" not in output, output
        return errors[0]

    return call


@pytest.fixture
def train_here(script_here):
    """``train_here(*arguments)``: train_dit.py, as :func:`script_here`."""
    return functools.partial(script_here, "train_dit.py")


def read_checkpoint(directory, step):
    """``{group: {name: tensor}}`` of a run's checkpoint."""
    folder = Path(directory) / "checkpoints" / f"step-{step:08d}"
    return {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def stopped_before(directory, step):
    """A copy of a finished run that a kill had stopped before its last checkpoint, that of this step."""
    copy = Path(directory).with_name("again")
    shutil.copytree(directory, copy)
    shutil.rmtree(copy / "checkpoints" / f"step-{step:08d}")
    shutil.rmtree(copy / "pipeline")
    return copy


def assert_equal(one, two, **tolerance):
    """Two checkpoints, bit for bit, or within a tolerance."""
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].keys() == two[name].keys()
        for key, value in one[name].items():
            if tolerance:
                torch.testing.assert_close(
                    value, two[name][key], **tolerance, msg=lambda m, k=key: f"{k}: {m}"
                )
            else:
                assert torch.equal(value, two[name][key]), f"{name}: {key} differs"


def run(*arguments, expect=0, **options):
    """Runs a script to its end and returns (stdout, stderr)."""
    process = start(*arguments, **options)
    stdout, stderr = process.communicate(timeout=280)
    assert process.returncode == expect, f"exit {process.returncode}\n{stdout}\n{stderr[-20_000:]}"
    return stdout, stderr


def refused(*arguments, expect=2, **options):
    """Runs a script that must end with one line of error; returns the line."""
    _, stderr = run(*arguments, expect=expect, **options)
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, stderr
    if not options.get("launcher"):  # accelerate's launcher adds a traceback of its own
        assert "Traceback" not in stderr, stderr
    return errors[0]


def logged_steps(directory):
    path = Path(directory) / "log.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(process, directory, step):
    """Returns once this step has been logged."""
    deadline = time.time() + 240
    while max(logged_steps(directory), default=0) < step:
        assert process.poll() is None, process.communicate()[1]
        assert time.time() < deadline
        time.sleep(0.05)


def kill_after(process, directory, step):
    """kill -9 once this step has been logged."""
    wait_for_step(process, directory, step)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def assert_two_processes_train_the_same(config, sharding, tmp_path):
    """Three steps of ``train_dit.py`` on one process and on two."""
    launcher = (
        *(str(Path(sys.executable).parent / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--main_process_port", "0"),
    )
    script = (ROOT / "train_dit.py", "--config", config, "--train.sharding", sharding, "--output_dir")
    run(*script, tmp_path / "one")
    run(*script, tmp_path / "two", launcher=launcher, ACCELERATE_USE_CPU="true")
    one, two = (read_checkpoint(tmp_path / name, 3) for name in ("one", "two"))
    assert_equal(two, one, atol=1e-6, rtol=1e-4)
