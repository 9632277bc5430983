"""sample.py: what it draws, and what it refuses with one line."""

import contextlib
import dataclasses
import errno
import inspect
import json
import os
import shutil

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import make_model, make_vae, read_checkpoint
from PIL import Image

from iwin_dit import IwinDiTPipeline, IwinDiTVideoPipeline
from iwin_dit.build import loading
from iwin_dit.build import pipeline as build_pipeline_module
from iwin_dit.build.data import PREPARE_LATENTS
from iwin_dit.config.schema import Config, SampleConfig
from iwin_dit.data.codec import weights_sha256
from iwin_dit.diffusion.flow_matching import FlowMatching
from iwin_dit.pipelines.base import export_pipeline
from iwin_dit.pipelines.sampling import sample_classes
from iwin_dit.runtime.errors import CheckpointError, ConfigError, DataError
from iwin_dit.runtime.run import RunDirectory, number_of
from iwin_dit.runtime.seeds import generator
from iwin_dit.training.state import Run


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    pipeline = IwinDiTPipeline(
        make_model(num_classes=10, prediction_type="flow_prediction"),
        make_vae(),
        FlowMatching().scheduler(),
        id2label={i: f"digit {i}" for i in range(10)},
    )
    folder = tmp_path_factory.mktemp("pipelines") / "pipe line"
    export_pipeline(pipeline, folder, {"step": 1})
    return folder


def pixels(path):
    return np.asarray(Image.open(path)).astype(float)


def test_images_do_not_depend_on_the_batch_size(pipeline_folder, run_here, tmp_path):
    for batch_size in (1, 16):
        run_here(
            *("sample.py", "--checkpoint", pipeline_folder, "--class", 3, "digit 7"),
            *("--num-images", 3, "--steps", 3, "--seed", 5, "--batch-size", batch_size),
            *("--out", tmp_path / f"by {batch_size}"),
        )
    names = [f"{label:04d}-{number:05d}.png" for label in (3, 7) for number in range(3)]
    for name in names:
        one, many = pixels(tmp_path / "by 1" / name), pixels(tmp_path / "by 16" / name)
        assert np.abs(one - many).max() <= 1
    assert np.abs(pixels(tmp_path / "by 1" / names[0]) - pixels(tmp_path / "by 1" / names[1])).max() > 1
    recipe = json.loads((tmp_path / "by 1" / "recipe.json").read_text())
    assert recipe["classes"] == [3, 7]
    assert recipe["seed"] == 5


def test_40_a_folder_goes_on_where_it_was_stopped(pipeline_folder, script_here, tmp_path, monkeypatch):
    """Only what is missing is drawn, each image as it was; another recipe's are not mixed in."""
    out = tmp_path / "out"
    command = ("sample.py", "--checkpoint", pipeline_folder, "--class", 3, 7, "--steps", 2, "--out", out)
    command = (*command, "--batch-size", 2)
    code, output = script_here(*command, "--num-images", 3)
    assert not code, output
    assert "6 images in" in output
    whole = {path.name: pixels(path) for path in out.glob("*.png")}

    save, saved = Image.Image.save, []

    def killed(image, path, **options):
        saved.append(path)
        if len(saved) == 4:
            raise KeyboardInterrupt
        save(image, path, **options)

    shutil.rmtree(out)
    monkeypatch.setattr(Image.Image, "save", killed)
    with contextlib.suppress(KeyboardInterrupt):
        script_here(*command, "--num-images", 3)
    monkeypatch.undo()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert len(kept) == 3
    code, output = script_here(*command, "--num-images", 3)
    assert "3 images in" in output
    assert "3 were there" in output
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    assert sorted(path.name for path in out.iterdir()) == [*sorted(whole), "recipe.json"]
    for name, expected in whole.items():
        assert np.abs(pixels(out / name) - expected).max() <= 1

    code, output = script_here(*command, "--num-images", 4)
    assert "2 images in" in output, "more of the same"
    shutil.copytree(pipeline_folder, tmp_path / "copy")
    copied = [tmp_path / "copy" if part == pipeline_folder else part for part in command]
    code, output = script_here(*copied, "--num-images", 4)
    assert "0 images in" in output, "the weights count, not where they are"
    code, output = script_here(*command, "--num-images", 4, "--seed", 1)
    assert code == 2
    assert "holds images of another recipe (seed: 0 -> 1); remove it" in output
    for text in ("{", "[]"):
        (out / "recipe.json").write_text(text)
        code, output = script_here(*command, "--num-images", 4)
        assert code == 2
        assert f"error: {out / 'recipe.json'} is not the recipe of the images beside it: " in output


def test_a_command_that_was_refused_does_not_block_the_next(
    pipeline_folder, run_here, refused_here, tmp_path
):
    command = ("sample.py", "--checkpoint", pipeline_folder, "--class", 3, "--num-images", 1, "--steps", 1)
    error = refused_here(*command, "--out", tmp_path / "out", "--guidance-interval", 0.9, 0.1)
    assert "guidance_interval is (0.9, 0.1)" in error
    assert "1 images in" in run_here(*command, "--out", tmp_path / "out", "--guidance-interval", 0.1, 0.9)


@pytest.mark.parametrize("out", ["out", "grid.png"])
def test_a_full_disk_is_exit_3(pipeline_folder, run_here, tmp_path, monkeypatch, out):
    def full(image, path, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    command = ("sample.py", "--checkpoint", pipeline_folder, "--class", 3, "--num-images", 1, "--steps", 1)
    assert "make room, and run it again" in run_here(*command, "--out", tmp_path / out, expect=3)


def test_a_grid_has_its_recipe_beside_it(pipeline_folder, run_here, tmp_path):
    out = tmp_path / "new folder" / "grid.PNG"
    stdout = run_here(
        *("sample.py", "--checkpoint", pipeline_folder, "--class", 0, 1, "--num-images", 2, "--steps", 1),
        *("--size", 24, 32, "--out", out),
    )
    out = out.with_suffix(".png")
    assert f"4 images in {out}\n" in stdout
    assert json.loads(out.with_suffix(".json").read_text())["height"] == 24
    assert Image.open(out).size[1] == 2 * (24 * 3 + 2)


def test_a_recipe_is_not_written_over_files_of_others(pipeline_folder, run_here, refused_here, tmp_path):
    options = ("--checkpoint", pipeline_folder, "--class", 0, "--num-images", 1, "--steps", 1)
    (tmp_path / "photo.json").write_text('{"camera": "mine"}')
    assert "photo.json, which is none of sample.py" in refused_here(
        "sample.py", *options, "--out", tmp_path / "photo.png"
    )
    assert (tmp_path / "photo.json").read_text() == '{"camera": "mine"}'
    for _ in range(2):  # its own recipe may be written again
        run_here("sample.py", *options, "--out", tmp_path / "grid.png")


def test_mistakes_are_one_line(pipeline_folder, refused_here, tmp_path):
    base = ("sample.py", "--checkpoint", pipeline_folder, "--out", tmp_path / "x.png")
    assert "class 207 is out of range: this model has 10 classes, 0 to 9" in refused_here(
        *base, "--class", 207
    )
    assert "unknown class name 'digt 3'; nearest names: digit 3" in refused_here(*base, "--class", "digt 3")
    for scale in ("nan", "inf"):
        error = refused_here(*base, "--class", 1, "--guidance-scale", scale)
        assert f"guidance_scale is {scale}, expected a finite number" in error
    assert "height is -32, expected a multiple of 2" in refused_here(*base, "--class", 1, "--size", -32, -32)
    assert "the device meta cannot be used" in refused_here(*base, "--class", 1, "--device", "meta")
    error = refused_here("sample.py", "--class", 1, "--checkpoint", tmp_path / "missing")
    assert "missing does not exist; expected a run, a pipeline folder, or a hub id" in error
    if not torch.cuda.is_available():
        error = refused_here(*base, "--class", 1, "--device", "cuda")
        assert "the device cuda cannot be used" in error
    assert not (tmp_path / "x.png").exists()


@pytest.fixture(scope="module")
def guide_folder(tmp_path_factory):
    model = make_model(num_classes=10, num_layers=1, prediction_type="flow_prediction")
    folder = tmp_path_factory.mktemp("guides") / "guide"
    export_pipeline(IwinDiTPipeline(model, make_vae(), FlowMatching().scheduler()), folder, {"step": 1})
    return folder


def test_a_guide_and_a_sampler(pipeline_folder, guide_folder, run_here, script_here, tmp_path):
    """What the pipeline draws when it is called with them; the recipe knows them, and the guide's weights."""
    command = ("sample.py", "--checkpoint", pipeline_folder, "--class", 3, "--num-images", 2, "--steps", 3)
    guided = ("--guide", guide_folder, "--sampler", "dpm++", "--guidance-scale", 2.5)
    run_here(*command, *guided, "--out", tmp_path / "guided")
    pipeline, other = (loading.load_pipeline(str(path)) for path in (pipeline_folder, guide_folder))
    pipeline.scheduler = FlowMatching().scheduler("dpm++")
    generators = [generator(0, "image", 3, number) for number in range(2)]
    options = dict(num_inference_steps=3, guidance_scale=2.5, guide=other.transformer)
    images = pipeline([3, 3], generator=generators, **options).images
    for number, image in enumerate(images):
        found = pixels(tmp_path / "guided" / f"0003-{number:05d}.png")
        assert np.abs(found - np.asarray(image)).max() <= 1
    recipe = json.loads((tmp_path / "guided" / "recipe.json").read_text())
    assert recipe["sampler"] == "dpm++"
    assert recipe["guide_sha256"] == weights_sha256(other.transformer) != recipe["weights_sha256"]

    code, output = script_here(*command, *guided[2:], "--out", tmp_path / "guided")
    assert code == 2
    assert "holds images of another recipe (guide_sha256: " in output


def test_guides_and_samplers_that_do_not_fit_are_one_line(pipeline_folder, refused_here, tmp_path):
    base = ("sample.py", "--checkpoint", pipeline_folder, "--class", 3, "--out", tmp_path / "x.png")
    error = refused_here(*base, "--sampler", "ddim")
    samplers = "euler, heun, euler_maruyama, dpm++, unipc"
    assert f"--sampler: flow_prediction has no sampler 'ddim'; it has {samplers}" in error
    guides = {
        "of other latents": make_pipeline_of(latents_mean=[0.5] * 4, latents_std=[1.0] * 4),
        "of other classes": make_pipeline_of(make_model(num_classes=9, prediction_type="flow_prediction")),
    }
    for name, guide in guides.items():
        export_pipeline(guide, tmp_path / name, {"step": 1})
    error = refused_here(*base, "--guide", tmp_path / "of other latents")
    assert "has another mean of the latents than the model; take one of the same latents" in error
    error = refused_here(*base, "--guide", tmp_path / "of other classes")
    assert "the guide's num_classes is 9, expected 10, as of the model" in error
    assert "missing does not exist" in refused_here(*base, "--guide", tmp_path / "missing")


def make_pipeline_of(model=None, **options):
    model = model or make_model(num_classes=10, prediction_type="flow_prediction")
    return IwinDiTPipeline(model, make_vae(), FlowMatching().scheduler(), **options)


def test_compiled_images_are_the_same(pipeline_folder, guide_folder, run_here, tmp_path, monkeypatch):
    """Model and guide are compiled; by a quick backend here."""
    compiled = []

    def compile(model, **options):
        compiled.append(model)
        model._compiled_call_impl = torch.compile(model._call_impl, backend="eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    command = ("sample.py", "--checkpoint", pipeline_folder, "--class", 3, "--num-images", 2, "--steps", 2)
    command = (*command, "--guide", guide_folder)
    run_here(*command, "--out", tmp_path / "eager")
    assert not compiled
    run_here(*command, "--out", tmp_path / "compiled", "--compile")
    torch._dynamo.reset()
    assert [len(model.blocks) for model in compiled] == [2, 1]
    for number in range(2):
        one, two = (pixels(tmp_path / name / f"0003-{number:05d}.png") for name in ("eager", "compiled"))
        assert np.abs(one - two).max() <= 1


def test_output_paths_are_checked_before_any_work(refused_here, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused_here(
        "sample.py", "--class", 1, "--out", tmp_path / "file" / "x.png"
    )
    assert "--steps is 0, expected at least 1" in refused_here("sample.py", "--class", 1, "--steps", 0)
    for fps in ("inf", "nan", "1e-9", "0"):
        assert "expected 0.01 to 1000" in refused_here("sample.py", "--class", 1, "--fps", fps)
    for out in ("", tmp_path / "x.jpg", tmp_path / "x.WEBM"):
        error = refused_here("sample.py", "--class", 1, "--out", out)
        assert f"--out is '{out}', expected x.png for a grid (clips also .gif, .mp4), or a folder" in error
    for out in ("x" * 300, f"{'x' * 300}.png"):
        assert "cannot be written" in refused_here("sample.py", "--class", 1, "--out", tmp_path / out)


def test_without_a_run_there_is_nothing_to_sample(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="there is no run in runs/; train one"):
        loading.newest_run()


def test_the_newest_run_has_weights(tmp_path):
    """It was begun last, by number and by no clock; the configs of older ones are not read."""
    weights = ("pipeline/recipe.json", "checkpoints/step-00000020/manifest.json")
    for number, name, config, weight in [
        (1, "broken", "a: [", weights[0]),
        (2, "old", "objective: {}", weights[1]),
        (3, "newest", "objective: {}", weights[0]),
        (4, "classifier", "model: {}", weights[1]),
        (5, "begun", "objective: {}", "checkpoints/nothing"),
    ]:
        path = tmp_path / name / weight
        path.parent.mkdir(parents=True)
        path.write_text("{}")
        (tmp_path / name / "config.yaml").write_text(config)
        (tmp_path / name / "number").write_text(f"{number}\n")
        for part in (path, path.parent):
            os.utime(part, (-number, -number))
    assert loading.newest_run(tmp_path).name == "newest"
    shutil.copytree(tmp_path / "newest", tmp_path / "copy")
    with pytest.raises(
        CheckpointError, match=r"begun last is not known: \S+copy, \S+newest; give --checkpoint"
    ):
        loading.newest_run(tmp_path)
    (tmp_path / "copy" / "number").write_text("of an older version there is none")
    assert loading.newest_run(tmp_path).name == "newest"
    for name in ("old", "newest", "copy"):
        shutil.rmtree(tmp_path / name)
    for text in ("a: [", "a\0: 1", "just words", ""):
        (tmp_path / "broken" / "config.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"broken.config\.yaml (is not valid|cannot be read|holds)"):
            loading.newest_run(tmp_path)


def test_runs_are_numbered_as_they_begin(tmp_path):
    def begin(name):
        run = RunDirectory(tmp_path / name, {"a": 1}, frozenset(), {})
        run.begin(0)
        run._lock.close()
        return number_of(tmp_path / name)

    (tmp_path / "of an older version").mkdir()
    (tmp_path / "of an older version" / "config.yaml").write_text("a: 1")
    assert [begin(name) for name in ("b", "a", "c", "a", "of an older version")] == [1, 2, 3, 2, 0]
    shutil.rmtree(tmp_path / "b")
    assert begin("d") == 4


def test_folders_that_are_not_ours(tmp_path, pipeline_folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"neither a run .* nor a pipeline"):
        loading.load_pipeline(str(tmp_path / "empty"))
    index = tmp_path / "empty" / "model_index.json"
    index.write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(CheckpointError, match="holds a StableDiffusionPipeline, expected an IwinDiTPipeline"):
        loading.load_pipeline(str(tmp_path / "empty"))
    index.write_text("nonsense")
    with pytest.raises(CheckpointError, match=r"model_index\.json cannot be read: "):
        loading.load_pipeline(str(tmp_path / "empty"))
    index.write_bytes((pipeline_folder / "model_index.json").read_bytes())
    with pytest.raises(CheckpointError, match="is a damaged pipeline"):
        loading.load_pipeline(str(tmp_path / "empty"))


def test_a_run_is_sampled_from_its_ema_before_it_ends(recipe, run_here, tmp_path):
    """The newest checkpoint counts, and the exported pipeline once it is as new."""
    config = recipe(train={"max_steps": 4, "save_every_steps": 2})
    run_here("train_dit.py", "--config", config)
    exported = loading.load_pipeline(str(tmp_path / "run"))
    (tmp_path / "run" / "pipeline").rename(tmp_path / "moved")
    built = loading.load_pipeline(str(tmp_path / "run"))
    for name, tensor in built.transformer.state_dict().items():
        assert torch.equal(tensor, exported.transformer.state_dict()[name])
    options = dict(num_inference_steps=2, output_type="pt")
    images = [
        p(["umbrella"], generator=torch.Generator().manual_seed(0), **options).images
        for p in (exported, built)
    ]
    torch.testing.assert_close(images[0], images[1])
    assert json.loads((tmp_path / "moved" / "recipe.json").read_text())["step"] == 4

    run, data = tmp_path / "run", json.loads((tmp_path / "run" / "data.json").read_text())
    (run / "data.json").write_text(json.dumps(data | {"vae_sha256": "of another"}))
    with pytest.raises(CheckpointError, match=r"was trained on other data .*\(vae_sha256: 'of another' -> "):
        loading.load_pipeline(str(run))
    (run / "pipeline").mkdir()
    (run / "pipeline" / "recipe.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"recipe\.json does not say the step of its pipeline"):
        loading.load_pipeline(str(run))


def test_a_run_is_drawn_as_its_own_recipe_says(recipe, run_here, refused_here, tmp_path):
    """Of a run and of its pipeline, elsewhere; an option of the command counts more."""
    own = {"num_inference_steps": 12, "guidance_scale": 1.5, "guidance_interval": [0.1, 0.8]}
    own |= {"guidance_channels": 3, "sampler": "heun"}
    run_here("train_dit.py", "--config", recipe(train={"max_steps": 1}, sample=own))
    run = tmp_path / "run"
    shutil.copytree(run / "pipeline", tmp_path / "pipeline")
    expected = {key: value for key, value in own.items() if key != "sampler"}
    for source in (run, tmp_path / "pipeline"):
        out = tmp_path / f"{source.name} images"
        command = ("sample.py", "--checkpoint", source, "--class", 1, "--num-images", 2)
        run_here(*command, "--out", out)
        said = json.loads((out / "recipe.json").read_text())
        assert {key: said[key] for key in expected} == expected
        assert said["scheduler"] == "FlowMatchHeunDiscreteScheduler"
        pipeline = loading.load_pipeline(str(source))
        generators = [generator(0, "image", 1, number) for number in range(2)]
        for number, image in enumerate(pipeline([1, 1], generator=generators, **expected).images):
            assert np.abs(pixels(out / f"0001-{number:05d}.png") - np.asarray(image)).max() <= 1
    options = ("--steps", 2, "--guidance-scale", 1, "--guidance-interval", 0, 1, "--guidance-channels", "all")
    run_here(*command, *options, "--sampler", "euler", "--out", tmp_path / "other.png")
    said = json.loads((tmp_path / "other.json").read_text())
    other = {"num_inference_steps": 2, "guidance_scale": 1, "guidance_interval": [0, 1]}
    other |= {"guidance_channels": None, "scheduler": "FlowMatchEulerDiscreteScheduler"}
    assert {key: said[key] for key in other} == other

    for sample, message in (
        ({"steps": 3}, "sample.steps is not a key"),
        ({"guidance_scale": "much"}, "sample.guidance_scale is 'much', expected a finite number"),
        ([], "sample is [], expected keys"),
    ):
        text = json.dumps({"step": 1, "config": {"sample": sample}})
        (tmp_path / "pipeline" / "recipe.json").write_text(text)
        error = refused_here(*command, "--out", tmp_path / "x.png")
        assert "recipe.json does not say how its pipeline draws: " in error
        assert message in error
    for text in ("{}", "[]", '{"config": "mine"}'):  # of another program
        (tmp_path / "pipeline" / "recipe.json").write_text(text)
        assert loading.sampling_of(str(tmp_path / "pipeline")) == SampleConfig()


def test_a_pipeline_in_python_has_the_defaults_of_a_recipe():
    for kind in (IwinDiTPipeline, IwinDiTVideoPipeline):
        parameters = inspect.signature(kind.__call__).parameters
        for f in dataclasses.fields(SampleConfig):
            assert f.name not in parameters or parameters[f.name].default == f.default
        assert {"guidance_scale", "num_inference_steps"} <= {*parameters}


def test_sampling_makes_no_data(recipe, run_here, tmp_path, monkeypatch):
    """A new autoencoder would draw something else."""
    config = recipe(train={"max_steps": 2, "save_every_steps": 2})
    run_here("train_dit.py", "--config", config)
    shutil.rmtree(tmp_path / "run" / "pipeline")
    path = tmp_path / "run" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["data"] |= {"path": str(tmp_path / "missing"), "prepare": "digits"}
    path.write_text(yaml.safe_dump(config))
    monkeypatch.setitem(PREPARE_LATENTS, "digits", lambda path: pytest.fail("it was made"))
    with pytest.raises(DataError, match="missing"):
        loading.load_pipeline(str(tmp_path / "run"))


def test_every_average_of_a_run_can_be_drawn(recipe, run_here, refused_here, tmp_path):
    """And a run that goes on does not need the one that it began with any more."""
    short = {"max_steps": 2, "save_every_steps": 2}
    run_here("train_dit.py", "--config", recipe(train=short, output_dir=str(tmp_path / "first")))
    config = recipe(train=short, ema={"decays": [0.9, 0.5]}, model={"init_from": str(tmp_path / "first")})
    run_here("train_dit.py", "--config", config)
    run = tmp_path / "run"
    stored = read_checkpoint(run, 2)
    for ema, group in {"0.5": "ema_0.5", "none": "model", 0.9: "ema", 0.5: "ema_0.5", None: "ema"}.items():
        drawn = loading.load_pipeline(str(run), ema=ema).transformer.state_dict()
        assert all(torch.equal(drawn[name], tensor) for name, tensor in stored[group].items())
    assert not torch.equal(stored["ema"]["proj_out.weight"], stored["model"]["proj_out.weight"])
    command = ("sample.py", "--class", 1, "--num-images", 1, "--steps", 1, "--out", tmp_path / "x.png")
    run_here(*command, "--checkpoint", run, "--ema", "none")
    recipe_of_image = json.loads((tmp_path / "x.json").read_text())
    model = loading.load_pipeline(str(run), ema="none").transformer
    assert recipe_of_image["weights_sha256"] == weights_sha256(model)
    for arguments, message in [
        ((run, "--ema", 0.7), "--ema is 0.7, but"),
        ((run, "--ema", "raw"), "keeps the averages of the decays 0.9, 0.5; take one of them, none for the"),
        ((run, "--ema", 0.5, "--ema-std", 0.1), "--ema and --ema-std choose one average each"),
        ((run / "pipeline", "--ema", 0.5), "is no run; --ema takes one"),
    ]:
        assert message in refused_here(*command, "--checkpoint", *arguments)

    shutil.rmtree(tmp_path / "first")
    run_here("train_dit.py", "--config", config, "--train.max_steps", 4)
    assert read_checkpoint(run, 4)
    shutil.rmtree(run)
    assert "first does not exist" in refused_here("train_dit.py", "--config", config)


def crowded(pipeline, most):
    """The pipeline, where more than so many images at once are too many for the memory."""
    call = type(pipeline).__call__

    class Crowded(type(pipeline)):
        def __call__(self, labels, **options):
            self.asked.append(len(labels))
            if len(labels) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return call(self, labels, **options)

    pipeline.__class__, pipeline.asked = Crowded, []
    return pipeline


def test_fewer_images_are_drawn_together_where_memory_is_short():
    def draw(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        samples = sample_classes(pipeline, range(3), 5, 0, 15, num_inference_steps=1, guidance_scale=1.0)
        return [(sample.label, sample.number, np.asarray(sample.image).astype(int)) for sample in samples]

    pipeline = crowded(make_pipeline_of(), 4)
    found, expected = draw(pipeline), draw(make_pipeline_of())
    assert pipeline.asked == [15, 7, 3, 4, 8, 4, 4]
    assert [one[:2] for one in found] == [one[:2] for one in expected]
    assert max(np.abs(a[2] - b[2]).max() for a, b in zip(found, expected, strict=True)) <= 1
    with pytest.raises(torch.OutOfMemoryError):
        draw(crowded(make_pipeline_of(), 0))


def test_few_images_are_decoded_together():
    pipeline, decoded = make_pipeline_of(), []
    pipeline.set_progress_bar_config(disable=True)
    options = dict(num_inference_steps=1, guidance_scale=1.0, output_type="np")
    noise = torch.randn(20, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    parts = [pipeline([3], latents=one[None], **options).images for one in noise]
    decode = pipeline.vae.decode
    pipeline.vae.decode = lambda x, **options: (decoded.append(len(x)), decode(x, **options))[1]
    images = pipeline([3] * 20, latents=noise, **options).images
    assert decoded == [8, 8, 4]
    np.testing.assert_allclose(images, np.concatenate(parts), atol=1e-5)


def test_a_preview_without_memory_does_not_stop_training(tmp_path, monkeypatch):
    config, pipeline = Config(), crowded(make_pipeline_of(), 0)
    monkeypatch.setattr(build_pipeline_module, "model_of", lambda *arguments: None)
    monkeypatch.setattr(build_pipeline_module, "build_pipeline", lambda *arguments: pipeline)
    run = Run(config, Accelerator(cpu=True), None, None)
    with pytest.warns(UserWarning, match="no samples of step 7: CUDA out of memory"):
        build_pipeline_module.draw_preview(config, None, run, {}, 7, False)
    assert pipeline.asked == [40, 20, 10, 5, 2, 1]


def test_a_preview_that_is_not_finite_does_not_stop_training(tmp_path, monkeypatch):
    def not_finite(*arguments, **options):
        raise DataError("the model draws images that are not finite")
        yield

    config, pipeline = Config(), make_pipeline_of()
    monkeypatch.setattr(build_pipeline_module, "sample_classes", not_finite)
    monkeypatch.setattr(build_pipeline_module, "model_of", lambda *arguments: None)
    monkeypatch.setattr(build_pipeline_module, "build_pipeline", lambda *arguments: pipeline)
    run = Run(config, Accelerator(cpu=True), None, None)
    with pytest.warns(UserWarning, match="no samples of step 7: the model draws images that are not finite"):
        build_pipeline_module.draw_preview(config, None, run, {}, 7, False)
