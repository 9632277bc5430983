"""Row 41: what evaluate_fid.py is given that cannot be evaluated, or should not be used again."""

import errno
import gc
import json
import os
import pickle
import shutil
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model, make_pipeline, make_vae
from evaluation_stub import COUNT, Stub, make_sets, one_of
from PIL import Image
from safetensors.torch import load_file, save_file

from iwin_dit import IwinDiTPipeline
from iwin_dit.commands import measure
from iwin_dit.diffusion.flow_matching import FlowMatching
from iwin_dit.evaluation import evaluate as chunks
from iwin_dit.evaluation.archives import NpzImages
from iwin_dit.evaluation.drawing import SampledImages, drawer, label_plan
from iwin_dit.evaluation.extractors import DINOv2, Inception
from iwin_dit.evaluation.images import FolderImages
from iwin_dit.evaluation.metrics import Features, compute
from iwin_dit.pipelines.base import export_pipeline
from iwin_dit.runtime.errors import CheckpointError, ConfigError, DataError

ALL = "fid,sfid,kid,is,pr"


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return make_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture
def evaluate(monkeypatch, script_here, tmp_path):
    """``evaluate(*arguments) -> (exit code, output)``; a stub is in Inception's place."""
    monkeypatch.setattr("iwin_dit.evaluation.extractors.Inception", Stub)
    monkeypatch.setattr(measure, "use_all_cores", lambda processes: None)
    monkeypatch.setattr(gc, "collect", lambda: None)  # which script_here does for a run's lock: here is none
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(*arguments):
        out = () if "--repeat" in arguments else ("--out", tmp_path / "result.json")
        return script_here("evaluate_fid.py", *out, *arguments)

    return call


@pytest.fixture
def refused(evaluate):
    """``refused(message, *arguments)``: one line, exit code 2."""

    def check(message, *arguments):
        code, output = evaluate(*arguments)
        assert code == 2, output
        assert message in output
        assert output.count("error: ") == 1
        assert "Traceback" not in output

    return check


def few(sets, folder, count):
    """A folder of some of the images."""
    folder.mkdir()
    for i in range(count):
        shutil.copy(sets / "other" / f"{i:02d}.png", folder)
    return folder


def test_41_arguments(sets, refused, tmp_path):
    real = ("--generated", sets / "real", "--reference", sets / "real")
    dino, own = (*real, "--extractor", "dinov2"), (*real, "--extractor", "iwin:run")
    expected = "expected inception, dinov2, dinov2:FILE, efficientnet-lite0, "
    for arguments, message in (
        ((), "--generated is missing"),
        ((*real, "--metrics", "fod"), "--metrics has 'fod'; take some of fid, sfid, kid, is, pr"),
        ((*real, "--metrics", ""), "--metrics has ''; take some of fid"),
        ((*real, "--metrics", "kid,fd"), "fd is not of --extractor inception; take some of fid, sfid"),
        ((*dino, "--metrics", "fid"), "fid is not of --extractor dinov2; take some of fd, kid, pr"),
        ((*own, "--metrics", "is"), "is is not of --extractor iwin; take some of fd"),
        ((*real, "--extractor", "iwin"), f"--extractor is iwin, {expected}"),
        ((*real, "--extractor", "inception:x"), f"--extractor is inception:x, {expected}"),
        ((*real, "--extractor", "dinov2:"), f"--extractor is dinov2:, {expected}"),
        ((*real, "--extractor", "dino"), f"--extractor is dino, {expected}"),
        ((*dino, "--inception-weights", "x"), "--inception-weights is of no use with --extractor dinov2"),
        ((*real, "--steps", "many"), "argument --steps: invalid int value: 'many'"),
        ((*real, "--num-images", 0), "--num-images is 0, expected at least 1"),
        ((*real, "--save-images", tmp_path / "x"), "--save-images is for what a model draws"),
        ((*real, "--save-images", sets / "real" / "00.png" / "x"), "x cannot be written"),
        ((*real, "--sweep", "steps=1,2"), "--sweep is for what a model draws"),
        ((*real, "--num-images", 5), "--num-images is for what a model draws"),
        ((*real, "--steps", 50), "--steps is for what a model draws"),
        ((*real, "--seed", 0), "--seed is for what a model draws"),
        ((*real, "--guidance-scale", 1), "--guidance-scale is for what a model draws"),
        ((*real, "--guidance-interval", 0, 1), "--guidance-interval is for what a model draws"),
        ((*real, "--plan", "equal"), "--plan is for what a model draws"),
        ((*real, "--draw-batch", 32), "--draw-batch is for what a model draws"),
        (("--repeat", "x.json", "--steps", 4), "--repeat takes no other option; leave --steps out"),
        (("--compare", "x.json", "--seed", 0), "--compare takes no other option; leave"),
        (("--generated", sets / "real"), "fid compares with real images: give --reference"),
    ):
        refused(message, *arguments)


def test_41_arguments_of_drawing(sets, refused, tmp_path):
    """Found before the work: the first image is drawn at once."""
    drawn = ("--generated", sets / "pipeline", "--reference", sets / "real", "--num-images", 4)
    for arguments, message in (
        (("--guidance-interval", 0.9, 0.1), "guidance_interval is (0.9, 0.1), expected 0 <= low"),
        (("--guidance-channels", 0), "guidance_channels is 0, expected at least 1"),
        (("--guidance-scale", "nan"), "guidance_scale is nan, expected a finite number"),
        (("--sweep", "steps=0,2"), "--sweep is 'steps=0,2', expected steps of at least 1"),
        (("--sweep", "steps=2,2"), "--sweep is 'steps=2,2', expected each value once"),
        (("--sweep", "guidance_scale=1,inf"), "expected guidance_scale=V1,V2 or"),
        (("--sweep", "steps=1,2", "--steps", 4), "--steps is 4, and --sweep gives it too"),
    ):
        refused(message, *drawn, *arguments)
    assert not (tmp_path / ".result.json.work").exists()

    statistics = dict(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    for name, options in (("bare", {"class_dropout_prob": 0.0}), ("fewer", {"num_classes": 2})):
        model = make_model(prediction_type="flow_prediction", **options)
        pipeline = IwinDiTPipeline(model, make_vae(), FlowMatching().scheduler(), **statistics)
        export_pipeline(pipeline, tmp_path / name, {})
    refused("trained without a null label", *drawn, "--guidance-scale", 2, "--generated", tmp_path / "bare")
    refused("the guide's num_classes is 2, expected 3", *drawn, "--guide", tmp_path / "fewer")


def test_41_a_sweep_without_matplotlib(sets, refused, monkeypatch):
    """Found before the work."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    drawn = ("--generated", sets / "pipeline", "--reference", sets / "real", "--num-images", 4)
    refused("--sweep needs matplotlib: pip install 'iwin-dit[demo]'", *drawn, "--sweep", "steps=1,2")


def test_41_a_cache_that_cannot_be_kept(sets, refused, evaluate, monkeypatch, tmp_path):
    """Found before images are looked at; the disk that is full has an exit code of its own."""
    images = ("--generated", sets / "other", "--reference", sets / "real")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    refused("Not a directory; set XDG_CACHE_HOME to a folder that is yours", *images)
    assert not (tmp_path / ".result.json.work").exists()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    replace = chunks.files.replace

    def failing(path, data):
        if "iwin-dit" in path.parts:
            raise OSError(number, os.strerror(number), str(path))
        replace(path, data)

    monkeypatch.setattr(chunks.files, "replace", failing)
    number = errno.EROFS
    refused("Read-only file system; set XDG_CACHE_HOME", *images)
    number = errno.ENOSPC
    assert evaluate(*images)[0] == 3


def test_41_too_few_images(sets, refused, evaluate, tmp_path):
    def sides(generated, real, metrics):
        folders = (few(sets, tmp_path / f"{side}{metrics}", n) for side, n in (("g", generated), ("r", real)))
        return [x for pair in zip(("--generated", "--reference"), folders, strict=True) for x in pair]

    refused("fid needs 2 images or more on each side, found 5 and 1", *sides(5, 1, "fid"), "--metrics", "fid")
    refused("kid needs 2 images or more on each side, found 1 and 5", *sides(1, 5, "kid"), "--metrics", "kid")
    refused("pr needs 5 images or more on each side, found 5 and 4", *sides(5, 4, "pr"), "--metrics", "pr")
    refused("is needs 10 images or more, found 9", *sides(9, 1, "is"), "--metrics", "is")
    code, output = evaluate(*sides(5, 5, "sfid,pr"), "--metrics", "sfid,pr")
    assert code == 0, "enough to be computed"
    assert "sfid of 5 images, fewer than the 32 features: it comes out too high" in output
    with pytest.raises(ConfigError, match="nothing to draw: 3 images of 0 classes"):
        label_plan("equal", 3, 0, 0)


def test_41_images_that_cannot_be_used(sets, refused, tmp_path):
    def changed(name, content):
        folder = few(sets, tmp_path / name, 5)
        (folder / "03.png").unlink()
        content(folder / "03.png")
        return folder

    whole = (sets / "real" / "00.png").read_bytes()
    real = ("--reference", sets / "real", "--metrics", "kid")
    for name, content, message in (
        ("mixed", Image.new("RGB", (16, 20)).save, "03.png has 16 x 20 pixels"),
        ("truncated", lambda path: path.write_bytes(whole[:300]), "is a broken or truncated image"),
        ("empty", Path.touch, "is empty, not an image"),
        (
            "link",
            lambda path: path.symlink_to("nothing"),
            "03.png is a link that loops or leads nowhere",
        ),
        ("text", lambda path: path.write_text("GIF89a"), "has no valid header"),
    ):
        refused(message, "--generated", changed(name, content), *real)
    large = tmp_path / "large"
    large.mkdir()
    for i in range(3):
        Image.new("RGB", (20, 20)).save(large / f"{i}.png")
    (tmp_path / "nothing").mkdir()
    generated = ("--generated", sets / "other", "--metrics", "kid", "--reference")
    refused("the generated images have (16, 16) pixels, the reference's have (20, 20)", *generated, large)
    refused("there are no images in", *generated, tmp_path / "nothing")
    refused("is neither a folder of images, nor an .npz file", *generated, tmp_path / "no")


def test_41_npz_files_that_cannot_be_used(sets, refused, tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "marker"), "w"))

    def file(name, **arrays):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        return tmp_path / f"{name}.npz"

    images = FolderImages(sets / "other").read(0, COUNT).movedim(1, -1).numpy()
    broken = tmp_path / "broken.npz"
    np.savez_compressed(broken, images)
    data = bytearray(broken.read_bytes())
    data[2000:2100] = bytes(100)
    broken.write_bytes(data)
    short = file("short", arr_0=images)
    short.write_bytes(short.read_bytes()[:3000])
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Hostile()))
    (tmp_path / "text.npz").write_text("no archive")
    objects = np.array([Hostile()], dtype=object)
    for path, message in (
        (tmp_path / "pickle.npz", "is no .npz with images in arr_0"),
        (tmp_path / "text.npz", "is no .npz with images in arr_0"),
        (file("objects", arr_0=objects), "holds object of shape (1,)"),
        (file("none", arr_0=images[:0]), "holds uint8 of shape (0, 16, 16, 3)"),
        (file("other", x=images), "is no .npz with images in arr_0"),
        (short, "is no .npz with images in arr_0"),
        (broken, "broken.npz is broken at image 0 or after it"),
    ):
        refused(message, "--generated", path, "--reference", sets / "real", "--metrics", "kid")
        refused(message, "--generated", sets / "real", "--reference", path, "--metrics", "kid")

    eye = np.eye(8)
    for arrays, message in (
        (dict(mu=objects, sigma=eye), "does not hold statistics mu and sigma"),
        (dict(mu=np.zeros(8)), "does not hold statistics mu and sigma"),
        (dict(mu=np.zeros(8), sigma=np.eye(9)), "a covariance of shape (9, 9) beside means (8,)"),
        (dict(mu=np.zeros(()), sigma=np.zeros(())), "a covariance of shape () beside means ()"),
        (dict(mu=np.full(8, np.nan), sigma=eye), "they are not finite"),
        (dict(mu=np.zeros(2048), sigma=np.eye(2048)), "are of 2048 features, inception-stub has 8"),
    ):
        reference = file("statistics", **arrays)
        refused(message, "--generated", sets / "real", "--reference", reference)
    statistics = file("statistics", mu=np.zeros(8), sigma=eye)
    generated = ("--generated", sets / "real", "--reference", statistics)
    refused("kid needs the images", *generated, "--metrics", "kid")
    statistics.write_bytes(statistics.read_bytes()[:-200])
    refused("is no .npz", *generated)
    assert not (tmp_path / "marker").exists()


def test_41_stale_features_are_computed_again(sets, evaluate, tmp_path):
    reference = tmp_path / "reference"
    shutil.copytree(sets / "other", reference)

    def figures():
        code, output = evaluate("--generated", sets / "real", "--reference", reference, "--metrics", ALL)
        assert code == 0, output
        return json.loads((tmp_path / "result.json").read_text())["figures"]

    expected = figures()
    kept = next((tmp_path / "cache").rglob("chunk-00000.safetensors"))
    whole = kept.read_bytes()
    features = load_file(kept)
    for damage in (
        lambda: kept.write_bytes(whole[:-100]),
        lambda: kept.write_bytes(b""),
        lambda: kept.write_bytes(b"garbage" * 1000),
        lambda: save_file({k: v + 1 for k, v in features.items()}, kept),  # by hand: without its hash
        lambda: kept.write_bytes(whole[:-4] + bytes(4)),
        lambda: save_file({"pool": features["pool"]}, kept),
        lambda: save_file({k: v[:5, :2].contiguous() for k, v in features.items()}, kept),
    ):
        damage()
        assert kept.read_bytes() != whole
        assert figures() == expected
        assert kept.read_bytes() == whole

    # another set's features under this one's name
    code, _ = evaluate("--generated", sets / "other", "--reference", sets / "real", "--metrics", ALL)
    assert code == 0
    other = next(p for p in (tmp_path / "cache").rglob("chunk-00000.safetensors") if p != kept)
    shutil.copy(other, kept)
    assert figures() == expected

    # the folder changes: an image, a name (and so the order), one more
    Image.new("RGB", (16, 16), "red").save(reference / "00.png")
    changed = figures()
    assert abs(changed["fid"] - expected["fid"]) > 1e-3 * expected["fid"]
    shutil.copy(sets / "real" / "00.png", reference / "zz.png")
    assert abs(figures()["fid"] - changed["fid"]) > 1e-3 * changed["fid"]
    assert len(list((tmp_path / "cache").rglob("chunk-00000.safetensors"))) == 4


def test_41_weights_that_cannot_be_had(sets, script_here, monkeypatch, tmp_path):
    def offline(*arguments):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(measure, "use_all_cores", lambda processes: None)
    real = ("evaluate_fid.py", "--generated", sets / "real", "--reference", sets / "real")
    real += ("--out", tmp_path / "x.json")
    for arguments, message in (
        ((), "weights-inception-2015-12-05-6726825d.pth and give --inception-weights FILE"),
        (("--extractor", "dinov2"), "dinov2_vitl14_pretrain.pth and give --extractor dinov2:FILE"),
        (("--inception-weights", tmp_path / "no.pth"), "no.pth is not there; expected Inception's weights"),
        (("--extractor", f"dinov2:{tmp_path / 'no.pth'}"), "no.pth is not there; expected DINOv2's weights"),
    ):
        code, output = script_here(*real, *arguments)
        assert code == 2, output
        assert message in output
        assert output.count("error: ") == 1
        assert "Traceback" not in output
    for kind in (Inception, DINOv2):
        with pytest.raises(CheckpointError, match=r"cannot be fetched .*Name or service not known"):
            kind()


def test_41_images_that_are_not_finite(sets, refused, tmp_path):
    pipeline = make_pipeline()
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias[0] = float("nan")
    images = SampledImages(drawer(pipeline, {"num_inference_steps": 1}), [0, 1], 0, {})
    with pytest.raises(DataError, match="pixels are not finite"):
        images.read(0, 2)

    shutil.copytree(sets / "pipeline", tmp_path / "pipeline")
    weights = next((tmp_path / "pipeline" / "transformer").glob("*.safetensors"))
    tensors = load_file(weights)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    refused("are not finite", "--generated", tmp_path / "pipeline", "--reference", sets / "real")

    class Diverged(Stub):
        def forward(self, images):
            return {layer: tensor / 0 for layer, tensor in super().forward(images).items()}

    with pytest.raises(DataError, match=r"images 0 to 11 of the generated have features \(pool\) that"):
        chunks.extract_features(
            FolderImages(sets / "real"), Diverged(), tmp_path / "f", 5, one_of(), "generated"
        )


def test_41_results_that_cannot_be_repeated(sets, evaluate, refused, tmp_path):
    code, output = evaluate("--generated", sets / "real", "--reference", sets / "other")
    assert code == 0, output
    good = json.loads((tmp_path / "result.json").read_text())
    path = tmp_path / "stored.json"
    options = dict(num_images=50_000, seed=0, steps=50, plan="equal", guidance_scale=1.0, draw_batch=32)
    options |= dict(guidance_interval=[0.0, 1.0], compile=False, sampler=None)
    path.write_text(json.dumps(good | {"arguments": good["arguments"] | options}))
    code, output = evaluate("--repeat", path)
    assert (code, "difference 0.0e+00" in output) == (0, True), "as it was stored before they were refused"
    path.unlink()
    refused("stored.json cannot be read: No such file or directory", "--repeat", path)
    refused("cannot be read: Is a directory", "--repeat", tmp_path)
    for content, message in (
        (b"no json", "stored.json is no result of evaluate_fid.py: Expecting value"),
        (b"\xff\xfe", "is no result of evaluate_fid.py"),
        (b"[1]", "expected arguments and figures in it"),
        ({"figures": good["figures"]}, "expected arguments and figures in it"),
        (good | {"figures": {"fid": "low"}}, "its figures are not all numbers"),
        (good | {"arguments": good["arguments"] | {"stpes": 3}}, "unrecognized arguments: --stpes=3"),
        (
            good | {"arguments": good["arguments"] | {"batch_size": "x"}},
            "argument --batch-size: invalid int value",
        ),
        (good | {"arguments": {"seed": 1}}, "--generated is missing"),
        (good | {"arguments": good["arguments"] | {"generated": "/no/where"}}, "/no/where"),
    ):
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        refused(message, "--repeat", path)


def test_41_images_are_not_saved_over_others(sets, evaluate, refused, tmp_path):
    drawn = ("--generated", sets / "pipeline", "--reference", sets / "real", "--num-images", 4, "--steps", 1)
    mine = few(sets, tmp_path / "mine", 3)
    np.savez(tmp_path / "mine.npz", np.zeros((1, 2, 2, 3), np.uint8))
    (tmp_path / "mine.txt").write_text("text")
    for target in (mine, tmp_path / "mine.npz", tmp_path / "mine.txt"):
        refused("is there already and not of this evaluation", *drawn, "--save-images", target)
    assert len(list(mine.iterdir())) == 3
    for target in (tmp_path / "drawn", tmp_path / "drawn.npz"):
        assert evaluate(*drawn, "--save-images", target)[0] == 0
        refused("is there already", *drawn, "--seed", 1, "--save-images", target)
    assert len(NpzImages(tmp_path / "drawn.npz")) == len(FolderImages(tmp_path / "drawn")) == 4


def test_41_figures_of_few_are_refused_by_the_metrics_too():
    features = Features(["pr", "is", "kid"])
    features.add({"pool": torch.randn(1, 4), "logits": torch.randn(1, 4)})
    for name in ("pr", "is", "kid"):
        with pytest.raises(DataError, match=f"{name} needs"):
            compute([name], features, features)
