"""Configs: every recipe builds, every mistake is one line that says what to do."""

import copy
import functools
import os
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, watch_attention
from evaluation_stub import COUNT, Stub, make_sets
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from iwin_dit.build import network, trainer
from iwin_dit.build.budget import Budget
from iwin_dit.build.describe import describe_classifier, describe_run
from iwin_dit.config.bounds import may_change
from iwin_dit.config.classifier import ClassifierConfig
from iwin_dit.config.parse import load_config, parse_arguments
from iwin_dit.config.rules import local_batch
from iwin_dit.config.schema import Config
from iwin_dit.diffusion.sampling import check_scheduler, make_scheduler
from iwin_dit.diffusion.specs import NUM_TRAIN_TIMESTEPS, SAMPLERS
from iwin_dit.runtime import strict_yaml
from iwin_dit.runtime.errors import ConfigError
from iwin_dit.runtime.run import flatten
from iwin_dit.training import attention

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
CLASSIFIERS = sorted((ROOT / "configs" / "classifier").glob("*.yaml"))
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


def parse(*arguments):
    return parse_arguments(arguments, QUICKSTART)[0]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_built(path):
    config = load_config(path)
    with torch.device("meta"):
        model = network.build_model(config)
    latent = torch.empty(2, config.model.in_channels, *config.model.latent_size, device="meta")
    output = model(
        latent, torch.zeros(2, device="meta"), torch.zeros(2, dtype=torch.long, device="meta")
    ).sample
    assert output.shape[0] == 2
    assert output.shape[2:] == latent.shape[2:]
    network.build_objective(config).scheduler(config.sample.sampler)
    assert "parameters" in describe_run(Budget(config))


@pytest.mark.parametrize("path", CLASSIFIERS, ids=lambda p: p.stem)
def test_every_recipe_of_a_classifier_is_built(path):
    config = load_config(path, ClassifierConfig)
    assert "multiply-adds" in describe_classifier(config)
    assert set(flatten(config.to_dict())) > {"augment.mixup", "optimizer.layer_decay"}


def test_the_mean_and_deviation_of_imagenet_are_timms():
    """A config tells them without torch, which timm loads."""
    assert ClassifierConfig().data.mean == IMAGENET_DEFAULT_MEAN
    assert ClassifierConfig().data.std == IMAGENET_DEFAULT_STD


def test_samplers_fit_what_the_model_predicts():
    for predicted, samplers in SAMPLERS.items():
        for name in samplers:
            scheduler = make_scheduler(predicted, name)
            check_scheduler(scheduler, predicted)
            assert scheduler.config.num_train_timesteps == NUM_TRAIN_TIMESTEPS


def test_a_resolved_config_is_a_config(tmp_path):
    config = parse("--train.max_steps", "7", "--model.mixer.window_size", "[4, 2]")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    assert load_config(tmp_path / "config.yaml") == config
    assert config.train.max_steps == 7
    assert set(flatten(config.to_dict())) > may_change(Config)


def test_yaml_that_is_read_as_it_is_meant(tmp_path):
    """PyYAML alone reads 1e-4 as a string."""
    path = tmp_path / "c.yaml"
    path.write_text(QUICKSTART.read_text().replace("3.0e-3", "1e-4"))
    assert load_config(path).optimizer.learning_rate == 1e-4


MISTAKES = [
    ("--train.max_stepz 5", "did you mean --train.max_steps?"),
    ("--train.max_step 5", "did you mean --train.max_steps?"),
    ("--model.depth many", "model.depth is 'many', expected a whole number or null"),
    ("--train.precision fp16", "train.precision is 'fp16', expected one of fp32, tf32, bf16"),
    ("--model.mixer.name swim", "mixer.name is 'swim', expected one of iwin, global, swin, swin_v2"),
    ("--model.heads 3", "3 heads do not divide the width 128; nearest that do: 1, 2, 4"),
    (
        "--model.patch_size 3",
        "model.patch_size 3 does not divide model.sample_size 8; nearest sizes that fit: 6, 9",
    ),
    ("--model.size XL/1", "model.size XL/1 and model.depth are both given"),
    ("--sample.sampler ddim", "sample.sampler ddim does not fit objective flow_matching"),
    ("--model.label_dropout 0", "without label dropout there is no null label"),
    ("--model.label_dropout 1.5", "model.label_dropout is 1.5, expected a number in [0, 1)"),
    ("--train.batch_images 0", "train.batch_images is 0, expected a number above 0"),
    ("--optimizer.warmup_steps -1", "optimizer.warmup_steps is -1, expected 0 or more"),
    ("--model.mixer.kernel_size 4", "expected an odd number"),
    ("--model.mixer.window_size [4,4,4]", "has 3 axes"),
    ("--model.mixer.name global", "the global mixer has no window_size"),
    (
        "--model.mixer.name factorised --model.mixer.window_size auto",
        "the factorised mixer is for clips: set sample_frames, or take another mixer",
    ),
    ("--model.mixer.name swin_v2 --model.qk_norm true", "swin_v2 normalises queries and keys already"),
    (
        "--objective.name ddpm --objective.cosine_weight 1",
        "objective.cosine_weight is 1.0, but is not read without objective.name flow_matching",
    ),
    ("--sample.guidance_interval [0.5,0.1]", "sample.guidance_interval is [0.5, 0.1]"),
    ("--model.position_embedding rope --model.heads 64", "heads of a width that 4 divides, found 128 / 64"),
    ("--ema.decays []", "ema.decays is [], expected at least one"),
    ("--ema.decays [0.9,0.9]", "ema.decays is [0.9, 0.9], expected no number twice"),
    ("--ema.decays [1.0]", "ema.decays is [1.0], expected a number in [0, 1)"),
    ("--ema.power_stds [0.3]", "ema.power_stds is [0.3], expected numbers above 0 and below 0.289"),
    ("--ema.snapshot_every_steps 10", "is 10, but is not read without ema.power_stds"),
    ("--ema.on_cpu true --train.sharding fsdp2", "exclude each other"),
    ("--train.micro_batch auto --train.sharding fsdp2", "give a number"),
    ("--train.spike_factor 0.5", "train.spike_factor is 0.5, expected above 1"),
    (
        "--train.spike_factor 3 --train.save_every_steps 25",
        "train.save_every_steps 25 is no multiple of train.log_every_steps 10",
    ),
    (
        "--train.max_skipped_steps 3",
        "max_skipped_steps is 3, but is not read without train.on_nonfinite skip",
    ),
    ("--optimizer.betas [0.9,1.0]", "optimizer.betas is [0.9, 1.0], expected a number in [0, 1)"),
    ("--optimizer.betas [-0.1,0.9]", "optimizer.betas is [-0.1, 0.9], expected a number in [0, 1)"),
    ("--optimizer.min_learning_rate 1e-5", "is 1e-05, but is not read without optimizer.schedule cosine"),
    (
        "--optimizer.schedule cosine --optimizer.min_learning_rate 1",
        "optimizer.min_learning_rate 1.0 is above optimizer.learning_rate 0.003",
    ),
    ("--optimizer.max_grad_norm 0", "optimizer.max_grad_norm is 0.0, expected a number above 0"),
    (
        "--objective.time_sampling uniform --objective.logit_mean 1",
        "objective.logit_mean is 1.0, but is not read without objective.time_sampling logit_normal",
    ),
    (
        "--objective.time_sampling uniform --objective.logit_std 2",
        "objective.logit_std is 2.0, but is not read without objective.time_sampling logit_normal",
    ),
    (
        "--objective.name ddpm --sample.num_inference_steps 1001",
        "sample.num_inference_steps is 1001, but ddpm has 1000 times",
    ),
    ("--sample.guidance_scale -1", "sample.guidance_scale is -1.0, expected 0 or more"),
    ("--train.health_every_steps 7", "no multiple of train.log_every_steps 10"),
    (
        "--train.trackers [tensorbord]",
        "train.trackers is ['tensorbord'], expected a list, each one of tensor",
    ),
    ("--model.sample_size 10000000000 --model.mixer.window_size auto", "expected at most 65,536"),
    ("--model.sample_size [8,65536,8]", "expected a whole number or a list of 2, each a whole number"),
    ("--model.sample_size 65536", "makes 65536 x 65536 tokens of patch_size 1, expected at most 16,777,216"),
    ("--model.width 10000000000 --model.heads 7", "model.width is 10000000000, expected at most 65,536"),
    (
        "--model.mixer.window_size [4,100000]",
        "model.mixer.window_size is [4, 100000], expected at most 65,536",
    ),
    ("--train.num_workers 100000", "train.num_workers is 100000, expected at most 1,024"),
    ("--train.max_steps 1000000000000", "train.max_steps is 1000000000000, expected at most 1,000,000,000"),
    ("--optimizer.learning_rate 1e300", "optimizer.learning_rate is 1e+300, expected at most 1e+30"),
    ("--model.size B/\xb2", "model.size B/\xb2 and model.depth are both given"),
    ("--train.keep_checkpoints null", "train.keep_checkpoints is null, expected a whole number"),
    ("--train null", "train is null, expected keys such as max_steps"),
    ("--ema.decays [0.9,null]", "ema.decays is [0.9, None], expected a list, each a finite number"),
    ("--output_dir null", "output_dir is null, expected text"),
    ("--output_dir a\x07b", "expected text that could be a name, without control characters"),
    (
        f"--output_dir runs/{'a' * 256}",
        "could be a name, without control characters and with at most 255 bytes between slashes",
    ),
    (f"--output_dir {'a/' * 2050}a", "4096 in all"),
    ("--output_dir=", "output_dir is '', expected text that could be a name"),
    ("--output_dir ~nobody_of_that_name/x", "there is no such home folder"),
    ("--train.compile", "--train.compile has no value after it"),
    ("--train.compile --dry-run", "--train.compile has no value after it"),
    ("--train.compile 1", "train.compile is 1, expected true or false"),
    ("--train.max_steps true", "train.max_steps is true, expected a whole number"),
    ("--train.max_steps 1.0", "train.max_steps is 1.0, expected a whole number"),
    ("--train.max_steps 1:30", "train.max_steps is '1:30', expected a whole number"),
    ("--train.max_steps 010", "train.max_steps is '010', expected a whole number"),
    (
        "--seed 99999999999999999999",
        "seed is 99999999999999999999, expected a whole number of at most 64 bits",
    ),
    ("--optimizer.learning_rate .nan", "optimizer.learning_rate is nan, expected a finite number"),
    ("--optimizer.learning_rate 1e999", "optimizer.learning_rate is inf, expected a finite number"),
    ("--optimizer.betas [0.9]", "optimizer.betas is [0.9], expected a list of 2, each a finite number"),
    ("--optimizer.betas [0.9", "optimizer.betas is '[0.9', expected a list of 2"),
    ("--config missing.yaml", "missing.yaml cannot be read: No such file"),
    ("surprise", "unrecognized arguments: surprise"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[a for a, _ in MISTAKES])
def test_mistakes_are_explained(arguments, message):
    with pytest.raises(ConfigError) as error:
        parse(*arguments.split())
    assert message in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        "--train.spike_factor 3 --train.save_every_steps 30",
        "--train.max_skipped_steps 3 --train.on_nonfinite skip",
        "--train.max_steps 20",  # below the warm-up, to look whether it runs
        "--optimizer.betas [0,0]",
        "--optimizer.schedule cosine --optimizer.min_learning_rate 3e-3",
        "--optimizer.max_grad_norm null",
        "--objective.time_sampling uniform",
        "--objective.name ddpm --sample.num_inference_steps 1000",
        "--sample.num_inference_steps 1001",
        "--sample.guidance_scale 0",
        "--train.precision tf32",
    ],
)
def test_what_borders_on_mistakes_is_none(arguments):
    parse(*arguments.split())


BOMB = "x0: &x0 [1]\n" + "".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 9))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: {dephth: 3}", "model.dephth is not a key; did you mean model.depth?"),
        ("modle: {depth: 3}", "modle is not a key; did you mean model?"),
        (
            "model: {mixer: {window: 3}}",
            "model.mixer.window is not a key; did you mean model.mixer.window_size?",
        ),
        ("model: 3", "model is 3, expected keys such as"),
        ("seed: 1\nseed: 2", "the key seed appears twice, again in line 2"),
        ("- 1", "holds list, expected keys and values"),
        ("a: [", "is not valid YAML: line 1: expected the node content"),
        ("", "holds NoneType, expected keys and values"),
        ("[1, 2]: 3", "line 1: a key is a list or a mapping, expected text"),
        ("? {a: 1}\n: 3", "line 1: a key is a list or a mapping, expected text"),
        ("1: 2", "1 is not a key; expected one of output_dir"),
        ("output_dir: 2024", "output_dir is 2024, expected text; put it in quotes"),
        ("seed: 2001-99-99", "seed is '2001-99-99', expected a whole number"),
        ("seed: !!int abc", "line 1: 'abc' is not what its tag tag:yaml.org,2002:int says"),
        ("seed: !!bool ''", "line 1: '' is not what its tag tag:yaml.org,2002:bool says"),
        ("seed: !!timestamp 2001-01-01", "'2001-01-01' is not what its tag tag:yaml.org,2002:timestamp says"),
        ("seed: !!set {a}", "could not determine a constructor for the tag"),
        ("seed: " + "[" * 5000, "is not valid YAML: it is nested too deeply"),
        ("seed: " + "[" * 100 + "]" * 100, "seed is [[[[[[[...]]]]]]], expected a whole number"),
        ("a: &a [*a]", "line 1: an alias refers to what it is in"),
        (BOMB, "is not valid YAML: line 5: it has more than 10,000 values"),
        ("seed: 1\n---\nseed: 2", "line 2: but found another document"),
        ("# " + "x" * 100_000, "has more than 100,000 bytes"),
        ("output_dir: \x07", "special characters are not allowed"),
        ("seed: \udc80", "is not valid YAML: 'utf-8' codec can't decode byte 0x80 in position 6"),
        ("model: {sample_size: 16}", "give size (such as B/1), or depth, width, heads and patch_size"),
        ("model: {size: XXL/1}", "did you mean XL/1?"),
        ("model: {size: XL/\xb2}", "model.size: unknown size 'XL/\xb2', expected one of S, B, L"),
    ],
)
def test_mistakes_in_a_file_are_explained(tmp_path, content, message):
    path = tmp_path / "c.yaml"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert message in str(error.value)


def keys(kind=Config, prefix=""):
    for f in fields(kind):
        nested = f.default_factory
        if isinstance(nested, type) and is_dataclass(nested):
            yield from keys(nested, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}"


def test_every_key_misspelt_fails(tmp_path):
    path = tmp_path / "c.yaml"
    for key in keys():
        *sections, name = key.split(".")
        content = {f"{name[:-1]}": 1}
        for section in reversed(sections):
            content = {section: content}
        path.write_text(yaml.safe_dump(content))
        with pytest.raises(ConfigError, match="is not a key"):
            load_config(path)


def annotations(kind, prefix=""):
    """Each key, sections among them, with the text of its annotation."""
    for f in fields(kind):
        yield f"{prefix}{f.name}", f.type
        if is_dataclass(f.default_factory):
            yield from annotations(f.default_factory, f"{prefix}{f.name}.")


@pytest.mark.parametrize(
    ("kind", "recipe"), [(Config, RECIPES[-2]), (ClassifierConfig, CLASSIFIERS[0])], ids=["dit", "classifier"]
)
def test_null_is_refused_unless_the_annotation_has_it(kind, recipe, tmp_path):
    """In a file and on the command line; the expectation is the text of the annotation."""
    base, path, seen = yaml.safe_load(recipe.read_text()), tmp_path / "c.yaml", set()
    assert load_config(recipe, kind)
    for key, annotation in annotations(kind):
        *sections, name = key.split(".")
        content = node = copy.deepcopy(base)
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = None
        path.write_text(yaml.safe_dump(content))
        for arguments in (["--config", str(path)], ["--config", str(recipe), f"--{key}", "null"]):
            is_null = f"{key} is null, expected"
            try:
                config = parse_arguments(arguments, path, kind)[0]
                assert functools.reduce(getattr, key.split("."), config) is None
                refused = False
            except ConfigError as error:  # or another key needs this one
                refused = is_null in str(error)
            assert refused == ("None" not in annotation), (arguments, annotation)
            seen.add(refused)
    assert seen == {True, False}


def test_a_home_folder_is_meant_by_its_sign(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/iwin")
    path = tmp_path / "c.yaml"
    path.write_text(QUICKSTART.read_text().replace("data/digits", "~/digits"))
    config = parse(
        *("--config", str(path), "--output_dir", "~/runs/a", "--evaluation.extractor", "iwin:~/runs/digits"),
        *("--evaluation.reference", "~"),
    )
    assert config.data.path == "/home/iwin/digits"
    assert config.output_dir == "/home/iwin/runs/a"
    assert config.evaluation.extractor == "iwin:/home/iwin/runs/digits"
    assert config.evaluation.reference == "/home/iwin"


def test_what_is_written_is_read_as_the_same(tmp_path):
    for text in ("1e-4", "2001-01-01", "010", "1:30", "0x1f", "yes", "null", "~x", "3", "é漢", "a: b", " a"):
        content = {"a": text, "b": [text, 1e-4, 1.5, -3, True, None, 1e300]}
        path = tmp_path / "c.yaml"
        path.write_text(strict_yaml.dump(content))
        assert strict_yaml.load(path) == content


def test_later_arguments_count_and_sections_are_joined(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("train: {max_steps: 7, batch_images: 4}")
    config = parse("--config", str(QUICKSTART), "--train.max_steps=5", "--config", str(path))
    assert (config.train.max_steps, config.train.batch_images, config.train.log_every_steps) == (7, 4, 10)
    config = parse("--train", "{max_steps: 9}", "--data.path", "2024")
    assert (config.train.max_steps, config.train.batch_images, config.data.path) == (9, 32, "2024")


def test_batches_that_do_not_divide_are_explained():
    train = parse("--train.batch_images", "30").train
    assert local_batch(train, 3) == (10, 10)
    with pytest.raises(
        ConfigError, match=r"batch_images 30 is not divisible by 4 processes; nearest that is: 28 or 32"
    ):
        local_batch(train, 4)
    train = parse("--train.batch_images", "30", "--train.micro_batch", "4").train
    with pytest.raises(ConfigError, match=r"micro_batch 4 does not divide the 10 images of a process"):
        local_batch(train, 3)


@pytest.mark.parametrize("arguments", [["--help"], ["--model.heads", "3"]])
def test_help_and_errors_answer_at_once_without_torch(arguments):
    code = (
        "import sys, runpy; sys.argv = ['train_dit.py', *sys.argv[1:]]\n"
        "try: runpy.run_path('train_dit.py', run_name='__main__')\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    before = os.times()
    ended = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 3
    assert ended.returncode == (0 if arguments == ["--help"] else 2)
    assert ended.stderr.strip().splitlines()[-1] == "False"
    assert ("usage: train_dit.py" in ended.stdout) or "error: model: 3 heads" in ended.stderr


# --- what the config alone cannot tell


@pytest.mark.parametrize("backend", ["cudnn", "efficient"])
def test_an_attention_that_is_not_there_is_a_mistake(recipe, refused_here, backend):
    """Of float32 on a CPU, where neither is; on a GPU cuDNN's is not."""
    if torch.cuda.is_available() and backend == "efficient":
        pytest.skip("this device has the kernel")
    config = recipe(train={"max_steps": 2})
    for more in ((), ("--train.compile", "true")):
        error = refused_here("train_dit.py", "--config", config, "--train.attention_backend", backend, *more)
        assert f"train.attention_backend {backend} has no kernel for this model's attention here" in error
        assert "in fp32" in error


def test_other_errors_stay_what_they_are(recipe):
    config = load_config(recipe(train={"attention_backend": "math"}))
    with pytest.raises(RuntimeError, match="another") as error, attention.attention_backend(config):
        raise RuntimeError("another")
    assert not isinstance(error.value, ConfigError)


@pytest.mark.parametrize("what", ["sample_every_steps", "evaluate_every_steps"])
def test_drawing_takes_the_attention_that_it_finds(recipe, train_here, monkeypatch, tmp_path, what):
    """Training's need not serve the float32 of samples: they are drawn as if ``auto`` were set."""
    monkeypatch.setattr("iwin_dit.evaluation.extractors.Inception", Stub)
    seen = watch_attention(monkeypatch)
    evaluation = {"reference": str(make_sets(tmp_path) / "real"), "num_images": COUNT}
    config = recipe(train={"max_steps": 2, what: 2, "attention_backend": "math"}, evaluation=evaluation)
    code, output = train_here("--config", config)
    assert code == 0, output
    assert seen == {(True, False), (False, True)}


def test_triton_needs_a_device(recipe, refused_here, monkeypatch, tmp_path):
    """Or Triton's interpreter, which conftest.py asks for where there is none."""
    config = recipe(train={"kernels": "triton"})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert trainer._runs_triton(device)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert trainer._runs_triton(torch.device("cuda"))
    monkeypatch.setattr(trainer.kernels, "INSTALLED", device.type == "cpu")
    error = refused_here("train_dit.py", "--config", config)
    assert f"train.kernels triton needs triton and a CUDA device, found {device.type}" in error
    monkeypatch.setattr(trainer.kernels, "INSTALLED", False)
    assert not trainer._runs_triton(torch.device("cuda"))
    assert not (tmp_path / "run").exists()


def test_tf32_is_float32_but_for_products(recipe, train_here, monkeypatch, tmp_path):
    """Without autocast; a run in fp32 that follows does without tensor cores again."""
    asked, real = [], trainer.Accelerator
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    monkeypatch.setattr(
        trainer, "Accelerator", lambda **options: asked.append(options["mixed_precision"]) or real(**options)
    )
    for precision in ("tf32", "fp32"):
        config = recipe(output_dir=str(tmp_path / precision), train={"max_steps": 1, "precision": precision})
        code, output = train_here("--config", config)
        assert code == 0, output
    assert asked == ["no", "high", "no", "highest"]


def test_dit_is_trained_as_dit_was():
    """facebookresearch/DiT's train.py: no clipping, TF32."""
    config = load_config(ROOT / "configs" / "dit_xl_2_imagenet256.yaml")
    assert config.optimizer.max_grad_norm is None
    assert config.train.precision == "tf32"


def test_defaults_are_documented():
    for kind in (Config, *(f.default_factory for f in fields(Config) if is_dataclass(f.default_factory))):
        explained = "".join(base.__doc__.replace(", ", ":") for base in kind.__mro__[:-1])
        for f in fields(kind):
            assert f"{f.name}:" in explained, f"{kind.__name__}.{f.name} is not explained"


def test_recipes_are_found():
    assert Path(QUICKSTART) in RECIPES
