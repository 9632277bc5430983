"""What evaluations read and write: images that are broken late, bombs, links, sizes; files of others."""

import gc
import io
import json
import os
import subprocess
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, start
from evaluation_stub import COUNT, Stub, make_sets
from PIL import Image
from safetensors.torch import save_file

from iwin_dit.commands import measure
from iwin_dit.evaluation import drawing, images
from iwin_dit.evaluation.archives import NpzImages
from iwin_dit.evaluation.images import FolderImages, Reading, in_order, open_set
from iwin_dit.evaluation.metrics import Features
from iwin_dit.evaluation.statistics import read_statistics
from iwin_dit.runtime import files, limits
from iwin_dit.runtime.errors import DataError, WorkerError


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return make_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture
def evaluate(monkeypatch, script_here, tmp_path):
    """``evaluate(*arguments) -> (exit code, output)``; a stub is in Inception's place."""
    monkeypatch.setattr("iwin_dit.evaluation.extractors.Inception", Stub)
    monkeypatch.setattr(measure, "use_all_cores", lambda processes: None)
    monkeypatch.setattr(gc, "collect", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(*arguments):
        return script_here("evaluate_fid.py", "--out", tmp_path / "result.json", *arguments)

    return call


def result(tmp_path):
    return json.loads((tmp_path / "result.json").read_text())


def copied(sets, folder, name="real"):
    folder.mkdir(parents=True)
    for path in sorted((sets / name).iterdir()):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_broken_reference_is_found_before_anything_is_drawn(sets, evaluate, tmp_path, monkeypatch):
    """The last image has another size, is no image, or is cut off within its pixels."""
    real, drawn = measure.drawer, []

    def drawer(*arguments):
        draw = real(*arguments)
        return lambda labels, generators: (drawn.append(len(labels)), draw(labels, generators))[1]

    monkeypatch.setattr(measure, "drawer", drawer)
    first = ("--generated", sets / "pipeline", "--num-images", 64, "--steps", 1, "--draw-batch", 4)
    for name, damage, message, seen in (
        ("size", lambda path: Image.new("RGB", (8, 8)).save(path), "11.png has 8 x 8 pixels", 0),
        ("broken", lambda path: path.write_bytes(b"x"), "11.png", 0),
        ("cut", lambda path: path.write_bytes(path.read_bytes()[:-200]), "broken or truncated", 4),
    ):
        reference = copied(sets, tmp_path / name)
        damage(reference / "11.png")
        drawn.clear()
        code, output = evaluate(*first, "--reference", reference)
        assert code == 2, output
        assert message in output
        assert sum(drawn) == seen, "but the first batch, whose size is compared"


def test_nothing_of_others_is_removed_or_written_over(sets, evaluate, tmp_path):
    images = ("--generated", sets / "other", "--reference", sets / "real")
    drawn = ("--generated", sets / "pipeline", "--reference", sets / "real", "--num-images", 2, "--steps", 1)
    mine = tmp_path / "result.work" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("years")
    assert evaluate(*images)[0] == 0
    assert mine.read_text() == "years"
    assert not list(tmp_path.glob(".*"))
    assert evaluate(*images)[0] == 0, "its own result is replaced"

    hidden = tmp_path / ".result.json.work" / "thesis.txt"
    hidden.parent.mkdir()
    hidden.write_text("years")
    code, output = evaluate(*images)
    assert (code, "is needed for intermediate files, but something is there" in output) == (2, True)
    assert hidden.read_text() == "years"
    hidden.unlink()
    hidden.parent.rmdir()

    kept = tmp_path / "kept.safetensors"
    save_file({"weights": torch.zeros(2)}, kept)
    for name, content in (("notes.json", '{"my": "notes"}'), ("plot.png", "a picture")):
        (tmp_path / name).write_text(content)
    for arguments, path in (
        ((*images, "--out", tmp_path / "notes.json"), tmp_path / "notes.json"),
        ((*images, "--save-reference", kept), kept),
        ((*drawn, "--sweep", "steps=1,2", "--out", tmp_path / "plot.json"), tmp_path / "plot.png"),
    ):
        before = path.read_bytes()
        code, output = evaluate(*arguments)
        assert (code, f"would write over {path}" in output) == (2, True), output
        assert path.read_bytes() == before
    (tmp_path / "x.npz.recipe.json").write_text("mine")
    code, output = evaluate(*drawn, "--save-images", tmp_path / "x.npz")
    assert (code, "is there already and not of this evaluation" in output) == (2, True), output
    assert (tmp_path / "x.npz.recipe.json").read_text() == "mine"


def test_statistics_that_cannot_be_kept_are_refused(sets, evaluate, tmp_path):
    statistics = tmp_path / "statistics.npz"
    np.savez(statistics, mu=np.zeros(8), sigma=np.eye(8))
    keep = ("--generated", sets / "other", "--save-reference", tmp_path / "kept.safetensors")
    for arguments in (("--reference", statistics), ("--reference", sets / "real", "--metrics", "kid,pr")):
        code, output = evaluate(*keep, *arguments)
        assert (code, "--save-reference keeps means and covariances of real images" in output) == (2, True)
    assert evaluate(*keep, "--reference", sets / "real")[0] == 0
    assert evaluate(*keep, "--reference", sets / "real")[0] == 0, "its own statistics are replaced"


def test_adms_batch_gives_its_statistics_and_its_images(sets, evaluate, tmp_path):
    """Statistics of many more images than the batch holds, as ADM publishes them."""
    pixels = FolderImages(sets / "real").read(0, COUNT).movedim(1, -1).numpy()
    features = Features(["fid", "sfid"])
    features.add(Stub()(FolderImages(sets / "other").read(0, COUNT)))
    pool, spatial = features.moments["pool"], features.moments["spatial"]
    known = dict(mu=pool.mean, sigma=pool.covariance, mu_s=spatial.mean, sigma_s=spatial.covariance)
    np.savez(tmp_path / "statistics.npz", **known)
    np.savez(tmp_path / "batch.npz", arr_0=pixels, **known)
    generated = ("--generated", sets / "other")

    def figures(reference, metrics):
        code, output = evaluate(*generated, "--reference", reference, "--metrics", metrics)
        assert code == 0, output
        return result(tmp_path)["figures"]

    found = figures(tmp_path / "batch.npz", "fid,sfid,kid,is,pr")
    described = result(tmp_path)["reference"]
    assert (described["statistics"], described["images"]) == (str(tmp_path / "batch.npz"), COUNT)
    expected = figures(tmp_path / "statistics.npz", "fid,sfid") | figures(sets / "real", "kid,is,pr")
    assert found == pytest.approx(expected, rel=1e-6)
    assert abs(found["fid"]) < 1e-6 < figures(sets / "real", "fid")["fid"], "fid is of the statistics"
    assert figures(tmp_path / "batch.npz", "pr") == pytest.approx(figures(sets / "real", "pr"))


def test_links_and_endings_follow_the_one_rule(sets, evaluate, tmp_path):
    """A folder of which half are links: none is left out, or the command is refused."""
    linked, elsewhere = tmp_path / "linked", copied(sets, tmp_path / "elsewhere")
    (linked / "a").mkdir(parents=True)
    for name in ("00.png", "01.png"):
        os.rename(elsewhere / name, linked / "a" / name)
    (linked / "b").symlink_to(elsewhere)
    (linked / "notes.txt").touch()
    code, output = evaluate("--generated", sets / "other", "--reference", linked)
    assert (code, "--follow-links" in output) == (2, True), output
    code, output = evaluate("--generated", sets / "other", "--reference", linked, "--follow-links")
    assert code == 0, output
    assert result(tmp_path)["reference"]["images"] == COUNT
    assert "ignored 1 in" in output
    assert "notes.txt" in output
    Image.open(linked / "a" / "00.png").save(linked / "a" / "zz.tif")
    assert len(FolderImages(linked, Reading(follow_links=True))) == COUNT + 1


def test_raw_images_of_mixed_sizes_are_cropped(sets, evaluate, tmp_path):
    """By ADM's crop: of an image of twice the size, the mean of 2 x 2 pixels; borders are cut."""
    raw = tmp_path / "raw"
    raw.mkdir()
    for i, path in enumerate(sorted((sets / "real").iterdir())):
        pixels = np.asarray(Image.open(path)).repeat(2, 0).repeat(2, 1)
        Image.fromarray(np.pad(pixels, ((0, 0), (2 * i, 2 * i), (0, 0)))).save(raw / path.name)
    code, output = evaluate("--generated", sets / "other", "--reference", raw)
    assert (code, "--size" in output) == (2, True), output
    for size in ((16,), (16, 16)):
        code, output = evaluate("--generated", sets / "other", "--reference", raw, "--size", *size)
        assert code == 0, output
        found = result(tmp_path)
        assert found["reference"]["center_crop"] == [16, 16]
    assert evaluate("--generated", sets / "other", "--reference", sets / "real")[0] == 0
    assert found["figures"] == pytest.approx(result(tmp_path)["figures"], rel=1e-6)
    assert FolderImages(raw, Reading((16, 16))).fingerprint != FolderImages(raw, Reading((8, 8))).fingerprint


def test_transparent_images_have_the_ground_that_is_asked_for(tmp_path, capsys):
    for i in range(3):
        Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / f"{i}.png")
    plain = FolderImages(tmp_path)
    assert plain.fingerprint
    assert "3 of 3 images in" in capsys.readouterr().out
    white = FolderImages(tmp_path, Reading(background=(255, 255, 255)))
    assert white.read(0, 3).min() == 255
    assert white.fingerprint != plain.fingerprint
    assert "alpha" not in capsys.readouterr().out


def test_a_read_that_hangs_and_a_worker_that_dies_end_the_evaluation(sets, monkeypatch):
    """A set of one batch is read by the process itself, without a limit."""
    stored = FolderImages(sets / "real", Reading(workers=2))
    expected = FolderImages(sets / "real").read(0, COUNT)
    ranges = [(start, start + 2) for start in range(0, COUNT, 2)]
    assert torch.equal(torch.cat(list(in_order(stored.read, ranges, stored.workers))), expected)
    read = images.read_file

    def hanging(path):
        if path.endswith("05.png"):
            do()
        return read(path)

    monkeypatch.setattr(images, "read_file", hanging)
    for act, seconds, message in (
        (lambda: time.sleep(30), 1, "timed out after 1 seconds; the disk hangs"),
        (lambda: os._exit(1), 60, "lower --workers"),
    ):
        do = act
        monkeypatch.setattr(images, "READ_SECONDS", seconds)
        with pytest.raises(WorkerError, match=message):
            list(in_order(stored.read, ranges, stored.workers))


def read_bytes():
    """Bytes that this process has asked for, of any file."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(lines[0].removeprefix("rchar: "))


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes as Linux does")
def test_a_piece_of_an_archive_costs_its_own_length(tmp_path):
    """A stored array is read in place; a compressed one once, from its start to its end."""
    pixels = np.random.default_rng(0).integers(0, 256, (500, 32, 32, 3), dtype=np.uint8)
    piece = 10 * pixels[0].nbytes
    for save, least in ((np.savez, 0), (np.savez_compressed, pixels.nbytes)):
        save(tmp_path / "x.npz", pixels)
        found = NpzImages(tmp_path / "x.npz")
        before = read_bytes()
        last = found.read(490, 500)
        cost = read_bytes() - before
        assert least * 0.9 < cost < least * 1.1 + 2 * piece
        assert np.array_equal(last.movedim(1, -1), pixels[490:])
        found = NpzImages(tmp_path / "x.npz")
        before = read_bytes()
        pieces = [found.read(start, start + 10) for start in range(0, 500, 10)]
        assert read_bytes() - before < 1.2 * pixels.nbytes + piece
        assert np.array_equal(torch.cat(pieces).movedim(1, -1), pixels)


def npy(descr, shape, data=b""):
    file = io.BytesIO()
    np.lib.format.write_array_header_2_0(file, dict(descr=descr, fortran_order=False, shape=shape))
    return file.getvalue() + data


def archive(path, **arrays):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in arrays.items():
            file.writestr(f"{name}.npy", data)
    return path


def test_small_archives_do_not_become_large(tmp_path, monkeypatch):
    """Refused by what their headers say, before anything is allocated."""
    path, eye = tmp_path / "x.npz", npy("<f8", (8, 8), np.eye(8).tobytes())
    zeros = npy("<f8", (8,), bytes(64))
    monkeypatch.setattr(limits, "ARRAY_BYTES", 1000)
    for mu, sigma, message in (
        (
            zeros,
            npy("<f8", (12, 12), bytes(12 * 12 * 8)),
            r"sigma has the shape \(12, 12\), more than 1,000 bytes",
        ),
        (npy("<f8", (10**12,)), eye, "mu has the shape"),
        (npy("<f8", (2**32, 2**32)), eye, "mu has the shape"),
        (npy("<f8", (-1,)), eye, "mu"),
        (npy("<c16", (8,), bytes(128)), eye, "mu holds complex128, expected real numbers"),
        (npy("<U3", (8,), bytes(96)), eye, "mu holds <U3, expected real numbers"),
        (npy("<f8", (8,), bytes(3 << 20)), eye, r"mu of shape \(8,\) holds 31"),
    ):
        with pytest.raises(DataError, match=message):
            read_statistics(archive(path, mu=mu, sigma=sigma), ["fid"], Stub)
    for shape, data, message in (
        ((10**12, 4, 4, 3), b"", "promises"),
        ((2, 2**40, 2**40, 3), b"", "promises"),
        ((2, 4, 4, 3), bytes(95), "promises"),
        ((2, -1, 4, 3), bytes(24), "holds uint8 of shape"),
    ):
        with pytest.raises(DataError, match=message):
            NpzImages(archive(path, arr_0=npy("|u1", shape, data)))
    monkeypatch.setattr(limits, "IMAGE_BYTES", 47)
    with pytest.raises(DataError, match="more than 47 bytes each"):
        NpzImages(archive(path, arr_0=npy("|u1", (2, 4, 4, 3), bytes(96))))


def test_statistics_that_say_odd_things_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    identity = {"name": Stub.name, "sha256": Stub.sha256, "preprocessing": Stub.preprocessing}
    tensors = {"pool.mu": torch.zeros(8), "pool.sigma": torch.eye(8)}
    good = {"extractor": identity, "images": 12}
    for about in (
        *("[]", "1", '"x"', "null", "{}", "[" * 100_000, "{bad"),
        *(json.dumps(good | {"images": count}) for count in (float("inf"), [1], -5, 1, "12")),
    ):
        save_file(tensors, path, {"about": about})
        with pytest.raises(DataError, match="does not hold statistics mu and sigma"):
            read_statistics(path, ["fid"], Stub)
    save_file(tensors, path, {"about": json.dumps(good)})
    assert read_statistics(path, ["fid"], Stub).moments["pool"].count == 12


def test_a_broken_archive_is_found_by_a_look_at_it(sets, tmp_path):
    pixels = FolderImages(sets / "real").read(0, COUNT).movedim(1, -1).numpy()
    path = tmp_path / "x.npz"
    np.savez(path, pixels)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # within the pixels: only the checksum tells
    path.write_bytes(data)
    with pytest.raises(DataError, match="is broken at image"):
        open_set(str(path), of_clips=False)


def test_images_are_on_disk_before_they_have_their_names(tmp_path, monkeypatch):
    synced = []
    fsync, replace = files.fsync, os.replace
    monkeypatch.setattr(files, "fsync", lambda path: (synced.append(Path(path)), fsync(path)))

    def checked(source, target):
        if Path(target).suffix in (".png", ".npz"):
            assert Path(source) in synced, target
        replace(source, target)

    monkeypatch.setattr(os, "replace", checked)
    pixels = torch.arange(4 * 3 * 2 * 2, dtype=torch.uint8).view(4, 3, 2, 2)
    (tmp_path / "drawn").mkdir()
    folder = drawing.PngFolder(tmp_path / "drawn", 4)
    folder.write(0, pixels)
    assert folder.has(0, 4)
    assert torch.equal(FolderImages(tmp_path / "drawn").read(0, 4), pixels)
    (tmp_path / "drawn" / "000002.png").write_bytes(b"")  # what an older version left after a power loss
    assert not folder.has(0, 4)
    folder.write(0, pixels)
    assert torch.equal(FolderImages(tmp_path / "drawn").read(0, 4), pixels)
    (tmp_path / "parts").mkdir()
    packed = drawing.NpzFile(tmp_path / "drawn.npz", 4, tmp_path / "parts")
    packed.write(0, pixels)
    packed.finish()
    assert torch.equal(NpzImages(tmp_path / "drawn.npz").read(0, 4), pixels)


@pytest.mark.slow
def test_two_evaluations_at_the_same_moment_are_both_right(sets, tmp_path):
    """With one reference, whose features are then made once; with one output, one of them is refused."""
    pixels = np.random.default_rng(0).integers(0, 256, (700, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "big.npz", pixels)
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    program = ROOT / "tests" / "evaluation_stub.py"
    both = [start(program, stdin=subprocess.PIPE, **environment) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n", process.communicate()

    def evaluate(*outs):
        """Both at once; how they ended."""
        for process, out in zip(both, outs, strict=True):
            command = ["--generated", sets / "other", "--reference", tmp_path / "big.npz", "--out", out]
            print(json.dumps([*map(str, command), "--metrics", "fid,pr"]), file=process.stdin, flush=True)
        lines = [iter(process.stdout.readline, "") for process in both]
        return [next(line for line in found if line.startswith("ended")) for found in lines]

    for _ in range(10):
        outs = [tmp_path / "a.json", tmp_path / "b.json"]
        assert evaluate(*outs) == ["ended: well\n"] * 2
        one, two = (json.loads(out.read_text())["figures"] for out in outs)
        assert one == two
        chunks = sorted((tmp_path / "cache").rglob("chunk-*.safetensors"))
        assert len(chunks) == 3
        for path in (*chunks, *outs):
            path.unlink()
    same = sorted(evaluate(tmp_path / "same.json", tmp_path / "same.json"))
    assert "is in use, held by pid" in same[0]
    assert same[1] == "ended: well\n"
    for process in both:
        process.communicate()
