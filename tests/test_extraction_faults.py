"""Extraction: two at once, workers that die or hang, full disks, and images that change."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, make_vae
from PIL import Image

from iwin_dit.data import digits, inspection
from iwin_dit.data.extraction import Settings, extract
from iwin_dit.data.inspection import verify_content
from iwin_dit.data.latents import LatentDataset
from iwin_dit.data.sources import open_source
from iwin_dit.runtime.errors import ConfigError, DataError, WorkerError
from iwin_dit.runtime.lock import hold

SETTINGS = Settings(size=(16, 16), batch_images=5, shard_images=8)


@pytest.fixture
def images(tmp_path):
    """24 images of three classes, of equal size in bytes."""
    rng = np.random.default_rng(0)
    for i in range(24):
        path = tmp_path / "images" / "abc"[i % 3] / f"{i:02d}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def run(images, out, source=None, **options):
    source = open_source(str(images)) if source is None else source
    extract(source, make_vae(), out, SETTINGS, {"vae": "of/tests"}, **options)
    return LatentDataset(out)


def no_traces(folder):
    return not [path for path in folder.rglob("*") if path.name.startswith((".tmp-", ".old-"))]


# Two at once


@contextlib.contextmanager
def held_elsewhere(folder):
    """Another process holds the folder."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        lock = hold(folder)
        os.write(writer, b"x")
        time.sleep(60)
        os._exit(lock.fileno())
    assert os.read(reader, 1) == b"x"
    yield child
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_second_extraction_is_refused(images, tmp_path):
    out = tmp_path / "out"
    (out / ".entries").mkdir(parents=True)
    with held_elsewhere(out / ".entries") as other:
        with pytest.raises(ConfigError, match=rf"out/\.entries is in use, held by pid {other} "):
            run(images, out)
        assert not list(out.glob("*.safetensors"))
    assert len(run(images, out)) == 24


def test_a_second_quickstart_waits_and_takes_what_the_first_made(tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(digits, "_prepare", lambda root, seed: made.append(root))

    def first_finishes(seconds):
        (tmp_path / "index.json").write_text("{}")
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

    monkeypatch.setattr("iwin_dit.runtime.lock.time.sleep", first_finishes)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        lock = hold(tmp_path)
        os.write(writer, b"x")
        signal.pause()
        os._exit(lock.fileno())
    os.read(reader, 1)
    digits.prepare(tmp_path)
    assert made == []
    assert f"waiting for {tmp_path}, held by pid {child}" in capsys.readouterr().out
    (tmp_path / "index.json").unlink()
    digits.prepare(tmp_path)
    assert made == [tmp_path]


ROUNDS = """
import sys, time
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import torch
torch.set_num_threads(1)
from conftest import make_vae
from iwin_dit.data import digits
from iwin_dit.data.extraction import extract
from iwin_dit.data.sources import open_source
from iwin_dit.runtime.errors import ConfigError
from test_extraction_faults import SETTINGS
me, folder = sys.argv[1], Path(sys.argv[2])
digits.VAE_STEPS = 1
digits.train_vae.__defaults__ = (1,)
source, vae = open_source(str(folder / "images")), make_vae()
for number in range(10):
    (folder / f"ready-{{me}}-{{number}}").touch()
    while len(list(folder.glob(f"ready-*-{{number}}"))) < 2:
        time.sleep(0.001)
    try:
        extract(source, vae, folder / f"out{{number}}", SETTINGS, {{"vae": "of/tests"}})
        print("extracted", number, flush=True)
    except ConfigError as error:
        assert "is in use" in str(error)
        print("refused", number, flush=True)
    digits.prepare(folder / f"digits{{number}}")
    print("prepared", number, flush=True)
"""


@pytest.mark.slow
def test_two_at_the_same_moment_ten_times(images, tmp_path):
    script = tmp_path / "rounds.py"
    script.write_text(ROUNDS.format(root=str(ROOT), tests=str(ROOT / "tests")))
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(i), tmp_path],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=500) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the rounds: more threads may add in another order
    try:
        latents = run(images, tmp_path / "alone").read_raw(list(range(24)))
    finally:
        torch.set_num_threads(threads)
    for number in range(10):
        said = [
            f"{word} {number}" in out for out, _ in outputs for word in ("extracted", "refused", "prepared")
        ]
        assert said[0] != said[1]
        assert said[3] != said[4]
        assert said[0] or said[3]
        assert said[2]
        assert said[5]
        assert torch.equal(LatentDataset(tmp_path / f"out{number}").read_raw(list(range(24))), latents)
        assert inspection.verify(tmp_path / f"digits{number}") == "1,500 images"
        assert len(list((tmp_path / f"digits{number}" / "test").rglob("*.png"))) == 297


# Workers


class Odd:
    """A source that does something else at image 13, where ``marker`` is not there yet."""

    def __init__(self, images, marker, what):
        self.source, self.marker, self.what = open_source(str(images)), marker, what

    def __len__(self):
        return len(self.source)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.source, name)

    def read(self, i):
        if i == 13 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL) if self.what == "dies" else time.sleep(60)
        return self.source.read(i)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("dies", "killed.*lower --workers"),
        pytest.param("hangs", "--worker-timeout", marks=pytest.mark.slow),
    ],
)
def test_a_worker_that_dies_or_hangs_is_an_error_of_its_own(images, tmp_path, what, message):
    source = Odd(images, tmp_path / "marker", what)
    with pytest.raises(WorkerError, match=message):
        run(images, tmp_path / "out", source, num_workers=1, timeout=3)
    assert no_traces(tmp_path / "out")
    again = run(images, tmp_path / "out", source, num_workers=1, timeout=60)
    clean = run(images, tmp_path / "clean")
    assert torch.equal(again.read_raw(list(range(24))), clean.read_raw(list(range(24))))


# A full disk


def test_a_full_disk_does_not_stay_full(images, tmp_path):
    """By the kernel's limit on the sizes of files; the shards are larger, the records smaller."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*latents_rank00_shard000\.safetensors"):
            run(images, tmp_path / "out")
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
        with pytest.raises(OSError, match=rf"File too large: '{tmp_path}/digits/"):
            digits.write_images(tmp_path / "digits", seed=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert no_traces(tmp_path)
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["lock"]
    assert len(run(images, tmp_path / "out")) == 24


# Images that change


def test_contents_are_compared_on_demand(images, tmp_path, capsys):
    out = tmp_path / "out"
    dataset = run(images, out)
    assert dataset.index["source"]["images"] == 24
    source = open_source(str(images))
    assert verify_content(out, source, "images") == 3
    path = images / "b" / "13.bmp"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    capsys.readouterr()
    run(images, out)  # names, labels and sizes are the same
    assert "of 1 finished shards were written or copied since" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"1 shards of .* content has changed: latents_rank00_shard001"):
        verify_content(out, source, "images")
    (out / "latents_rank00_shard001.safetensors").unlink()
    run(images, out)
    assert verify_content(out, open_source(str(images)), "images") == 3
    path.rename(images / "c" / "13.bmp")
    with pytest.raises(DataError, match="holds other images, by name, label or size"):
        verify_content(out, open_source(str(images)), "images")


def test_a_run_on_latents_knows_their_content(images, tmp_path):
    first = run(images, tmp_path / "one").identity
    assert run(images, tmp_path / "two").identity == first
    for path in sorted((images / "a").iterdir()):
        path.rename(images / "b" / f"x{path.name}")  # other labels, the same pictures
    for path in sorted((images / "b").iterdir())[:8]:
        path.rename(images / "a" / path.name)
    other = run(images, tmp_path / "three").identity
    assert other["shards_sha256"] != first["shards_sha256"]


@pytest.mark.parametrize("damage", [b"\xff", b"[1]", b'{"count": "x"}', b"[" * 10_000])
def test_damaged_records_are_one_line(images, tmp_path, damage):
    out = tmp_path / "out"
    run(images, out)
    for name in ("shard001.json", "settings.json"):
        path = out / ".entries" / name
        before = path.read_bytes()
        path.write_bytes(damage)
        with pytest.raises(DataError, match=rf"{name} is damaged|{name} is not the entry|other settings"):
            run(images, out)
        path.write_bytes(before)
    assert json.loads((out / "index.json").read_bytes())["num_images"] == 24
    assert Path(out).is_dir()
