"""Rows 32 to 35 of README.md: no file that we read runs code, or costs more than it is long."""

import ast
import contextlib
import hashlib
import json
import pickle
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml
from conftest import ROOT, make_pipeline, make_vae
from safetensors.torch import load_file, save_file

from iwin_dit import IwinDiTPipeline
from iwin_dit.build import classifier_network
from iwin_dit.build.classifier_network import load_classifier
from iwin_dit.build.evaluation import build_extractor
from iwin_dit.build.loading import load_pipeline
from iwin_dit.config.classifier import ClassifierConfig
from iwin_dit.config.parse import load_config
from iwin_dit.convert import load_official
from iwin_dit.data.codec import load_vae
from iwin_dit.data.latents import LatentDataset
from iwin_dit.diffusion.ddpm import DDPM
from iwin_dit.diffusion.flow_matching import FlowMatching
from iwin_dit.models.transformer import IwinDiTTransformer2DModel
from iwin_dit.pipelines.base import export_pipeline
from iwin_dit.pipelines.trust import check_pipeline_folder
from iwin_dit.runtime import checkpoint, files
from iwin_dit.runtime.errors import CheckpointError, ConfigError, DataError

WEIGHTS = "diffusion_pytorch_model.safetensors"

# -- row 32: nothing that is read can run code --------------------------------------------------------------

SOURCES = [
    *ROOT.glob("*.py"),
    *(p for d in ("iwin_dit", "benchmarks", "docs", "examples") for p in (ROOT / d).rglob("*.py")),
]
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "code"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {
    "torch.load",
    "torch.save",
    "torch.serialization.load",
    "torch.hub.load",
    "torch.jit.load",
    "torch.package.PackageImporter",
    "os.system",
    "os.popen",
}
ATTRIBUTES |= {
    f"yaml.{name}" for name in ("unsafe_load", "full_load", "Loader", "FullLoader", "UnsafeLoader")
}
ARGUMENTS = {  # the only values that they may have
    "allow_pickle": "False",
    "shell": "False",
    "trust_remote_code": "False",
    "use_safetensors": "True",
    "safe_serialization": "True",
    "weights_only": "True",
    "checkpoint_path": "None",  # timm's
    "load_in_8bit": "False",
}
REQUIRED = {  # what a library loads for us: the last part of its name, and what it must be told
    "from_pretrained": ("use_safetensors", "True"),
    "from_single_file": ("use_safetensors", "True"),
    "load_checkpoint": ("weights_only", "True"),
    "load_pretrained": ("weights_only", "True"),
    "load_state_dict_from_hf": ("weights_only", "True"),
    "load_state_dict_from_url": ("weights_only", "True"),
    "load_state": ("weights_only", "True"),  # Accelerate's has no such argument
    "load_custom_pretrained": ("weights_only", "True"),
}


def dangers(source, may_load=False):
    """What in a module could run what it reads. ``may_load`` allows torch.load with weights_only=True."""
    tree, found, safe = ast.parse(source), [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            found += [f"{k}={v}" for k, v in given.items() if ARGUMENTS.get(k, v) != v]
            name = ast.unparse(node.func)
            must = REQUIRED.get(name.rpartition(".")[2])
            if name == "load_state_dict":  # timm's is a function, PyTorch's a method
                must = ("weights_only", "True")
            if must and given.get(must[0]) != must[1]:
                found.append(f"{name} without {must[0]}={must[1]}")
            if may_load and ast.unparse(node.func) == "torch.load" and given.get("weights_only") == "True":
                safe.add(node.func)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            found += [name for name in names if name.split(".")[0] in MODULES or name in ATTRIBUTES]
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in BUILTINS:
            found.append(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ATTRIBUTES and node not in safe:
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_32_no_module_runs_what_it_reads(path):
    assert not dangers(path.read_text(), may_load=path.relative_to(ROOT).parts[:2] == ("iwin_dit", "convert"))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import torch, pickle as p",
        "from pickle import loads",
        "from torch import load",
        "import torch; torch.load(path, weights_only=True)",
        "import torch; read = torch.load",
        "import torch; torch.save(x, path)",
        "def f():\n    eval(x)",
        "exec(x)",
        "numpy.load(path, allow_pickle=True)",
        "numpy.load(path, allow_pickle=options.trust)",
        "subprocess.run(x, shell=True)",
        "Model.from_pretrained(x, use_safetensors=False)",
        "Model.from_pretrained(x, trust_remote_code=True)",
        "yaml.load(file, yaml.UnsafeLoader)",
        "Model.from_pretrained(x)",
        "timm.create_model(name, checkpoint_path=path)",
        "from timm.models import load_state_dict; load_state_dict(path)",
        "timm.models.load_checkpoint(model, path)",
        "torch.hub.load_state_dict_from_url(url)",
        "accelerator.load_state(folder)",
        "torch.jit.load(path)",
    ],
)
def test_32_the_search_for_dangers_finds_them(source):
    assert dangers(source)


def test_32_the_importers_load_weights_only():
    assert not dangers("torch.load(path, weights_only=True)", may_load=True)
    for source in ("torch.load(path)", "torch.load(path, weights_only=False)", "f = torch.load"):
        assert dangers(source, may_load=True)


class Malicious:
    """Writes the marker when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (self.marker.write_text, ("ran",))


@pytest.fixture
def marker(tmp_path):
    """A path that nothing may have written to."""
    path = tmp_path / "marker"
    yield path
    assert not path.exists(), "code in a file has run"


def write_zip(path, value):
    torch.save({"state_dict": value, "mean": value}, path)


def write_plain(path, value):
    path.write_bytes(pickle.dumps({"state_dict": value}, protocol=2))


def write_legacy(path, value):
    torch.save({"state_dict": value}, path, _use_new_zipfile_serialization=False)


forms = pytest.mark.parametrize("write", [write_zip, write_plain, write_legacy])


@forms
def test_32_the_bait_works(tmp_path, write):
    write(tmp_path / "bait", Malicious(tmp_path / "marker"))
    with contextlib.suppress(RuntimeError):  # of the plain one, after it has run
        torch.load(tmp_path / "bait", weights_only=False)
    assert (tmp_path / "marker").exists()


@forms
@pytest.mark.parametrize("suffix", ["pt", "ckpt", "bin", "safetensors"])
def test_32_a_pickle_as_autoencoder(tmp_path, marker, write, suffix):
    from iwin_dit.build.data import load_autoencoder

    write(tmp_path / f"vae.{suffix}", Malicious(marker))
    with pytest.raises(DataError, match="cannot be read as tensors"):
        load_autoencoder(str(tmp_path / f"vae.{suffix}"))


@forms
@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", WEIGHTS])
def test_32_a_pickle_in_the_folder_of_an_autoencoder(tmp_path, marker, write, name):
    make_vae().save_config(tmp_path)
    write(tmp_path / name, Malicious(marker))
    with pytest.raises(DataError, match=r"cannot be loaded: .*safetensors"):
        load_vae(str(tmp_path))


@forms
def test_32_a_pickle_as_statistics_of_published_latents(tmp_path, marker, write):
    from iwin_dit.build.data import build_dataset

    latents = {"latents": torch.randn(2, 4, 8, 8), "labels": torch.arange(2)}
    save_file(latents, tmp_path / "latents_rank00_shard000.safetensors")
    write(tmp_path / "latents_stats.pt", Malicious(marker))
    data = SimpleNamespace(kind="latents", path=str(tmp_path), prepare=None, vae="x", normalization="data")
    with pytest.raises(DataError, match=r"latents_stats\.pt cannot be read as tensors"):
        build_dataset(SimpleNamespace(data=data, model=SimpleNamespace(num_classes=2, in_channels=4)))


@forms
def test_32_a_pickle_as_latents(tmp_path, marker, write, latents_folder):
    shutil.copytree(latents_folder, tmp_path / "latents")
    index = json.loads((tmp_path / "latents" / "index.json").read_text())
    path = tmp_path / "latents" / index["shards"][0]["file"]
    write(path, Malicious(marker))
    index["shards"][0] |= files.fingerprint(path)  # as if the index vouched for it
    (tmp_path / "latents" / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="is not a safetensors file"):
        LatentDataset(tmp_path / "latents")


@forms
@pytest.mark.parametrize("suffix", ["pt", "pth", "ckpt", "safetensors"])
def test_32_a_pickle_as_official_weights(tmp_path, marker, write, suffix):
    write(tmp_path / f"weights.{suffix}", Malicious(marker))
    with pytest.raises(Exception, match=r"objects that could run code|header"):
        load_official(tmp_path / f"weights.{suffix}")


@forms
@pytest.mark.parametrize(
    "option", ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained"]
)
def test_32_a_strangers_classifier_makes_no_library_load_a_file(tmp_path, marker, write, option, monkeypatch):
    """Its run is an extractor of features, and weights that training begins from."""
    bait = tmp_path / "bait.pth"
    write(bait, Malicious(marker))
    value = str(bait) if option == "checkpoint_path" else {"file": str(bait)}
    config = ClassifierConfig()
    config = replace(config, model=replace(config.model, options={option: value, "pretrained": True}))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    model = torch.nn.Linear(2, 2)
    checkpoint.save_checkpoint(tmp_path / "run" / "checkpoints", 1, {"ema": model.state_dict()}, {}, keep=1)
    monkeypatch.setattr(timm, "create_model", lambda *arguments, **options: pytest.fail("it reached timm"))
    for load in (
        lambda: load_classifier(str(tmp_path / "run")),
        lambda: build_extractor(f"iwin:{tmp_path / 'run'}", None),
        lambda: classifier_network.build_classifier(config),
        lambda: classifier_network.begin_classifier(model, str(tmp_path / "run")),
    ):
        with pytest.raises(ConfigError, match="which makes timm load a file"):
            load()


@pytest.mark.parametrize(
    "text", ['{"classes"', "[]", "{}", "\xff", '{"classes": ["a"]}', '{"classes": 3}', None]
)
def test_a_classifier_whose_data_are_not_said(tmp_path, text, monkeypatch):
    config = ClassifierConfig()
    monkeypatch.setattr(classifier_network, "read_run", lambda run: (config, torch.nn.Linear(2, 2)))
    if text is not None:
        (tmp_path / "data.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"data\.json does not say what the classes of its run are: "):
        load_classifier(str(tmp_path))


@forms
def test_32_a_pickle_in_a_checkpoint(tmp_path, marker, write):
    """With a manifest that vouches for it."""
    directory = checkpoint.save_checkpoint(tmp_path, 1, {"model": {"a": torch.ones(2)}}, {}, keep=2)
    path = directory / "model.safetensors"
    write(path, Malicious(marker))
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"][path.name] = files.fingerprint(path)
    (directory / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint.newest(tmp_path) == directory
    with pytest.raises(CheckpointError, match="cannot be read, and only safetensors are accepted"):
        checkpoint.read_tensors(directory, "model")


@forms
def test_32_a_pickle_that_timm_would_load(tmp_path, marker, write):
    """The library itself, at the version that is installed: the bound in pyproject.toml is for this."""
    import timm

    for suffix in ("pt", "pth.tar", "bin"):
        path = tmp_path / f"weights.{suffix}"
        write(path, Malicious(marker))
        for options in (
            {"checkpoint_path": str(path)},
            {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}},
        ):
            with pytest.raises(Exception, match=r"[Ww]eights.only|cannot|unsupported|pickle|Unsupported"):
                timm.create_model("resnet10t", **options)


@forms
def test_32_a_pickle_as_an_extractor(tmp_path, marker, write):
    """Inception is loaded by torch-fidelity, DINOv2's and I3D's files by us."""
    from iwin_dit.evaluation.extractors import DINOv2, Inception
    from iwin_dit.evaluation.i3d import I3D

    for suffix in ("pt", "pth", "safetensors"):
        path = tmp_path / f"weights.{suffix}"
        write(path, Malicious(marker))
        for kind in (Inception, DINOv2, I3D):
            with pytest.raises((CheckpointError, ConfigError, DataError)):
                kind(path)


@forms
@pytest.mark.parametrize("component", ["transformer", "vae"])
@pytest.mark.parametrize("suffix", ["bin", "pt", "ckpt"])
def test_32_a_pickle_in_a_pipeline(pipeline_folder, marker, write, component, suffix):
    (pipeline_folder / component / WEIGHTS).unlink()
    write(pipeline_folder / component / f"diffusion_pytorch_model.{suffix}", Malicious(marker))
    with pytest.raises(
        CheckpointError, match=rf"model\.{suffix}, expected .*: only \.safetensors are accepted"
    ):
        check_pipeline_folder(pipeline_folder)


@forms
@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_32_a_pickle_that_is_called_safetensors(pipeline_folder, marker, write, component):
    write(pipeline_folder / component / WEIGHTS, Malicious(marker))
    with pytest.raises(CheckpointError, match="cannot be read: Error while deserializing"):
        check_pipeline_folder(pipeline_folder)


@pytest.mark.parametrize(
    "text",
    [
        "seed: !!python/object/apply:os.system ['touch {marker}']",
        "model: {{mixer: !!python/object/new:pathlib.Path ['{marker}']}}",
        "model: {{mixer: {{class_path: subprocess.Popen, init_args: {{args: [touch, '{marker}']}}}}}}",
    ],
)
def test_32_yaml_makes_no_objects(tmp_path, marker, text):
    from iwin_dit.build.data import load_autoencoder

    path, vae = tmp_path / "config.yaml", tmp_path / "vae.safetensors"
    path.write_text(text.format(marker=marker))
    with pytest.raises(ConfigError, match=r"is not valid YAML|is not a key"):
        load_config(path)
    save_file({"a": torch.ones(1)}, vae)
    with pytest.raises((DataError, ConfigError)):
        load_autoencoder(str(vae), path)


# -- rows 33 to 35: configs, manifests and weights from strangers -------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    pipeline = make_pipeline()
    folder = tmp_path_factory.mktemp("exported") / "pipeline"
    export_pipeline(pipeline, folder, {"step": 1})
    return folder


@pytest.fixture
def pipeline_folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "pipe line")


def edit(path, **changes):
    """Sets keys of a JSON file; ``mixer__kernel_size=3`` sets one of a section."""
    content = json.loads(path.read_text())
    for key, value in changes.items():
        *sections, name = key.split("__") if not key.startswith("_") else [key]
        target = content
        for section in sections:
            target = target[section]
        target[name] = value
    path.write_text(json.dumps(content))


def test_33_what_we_export_is_accepted(pipeline_folder):
    check_pipeline_folder(pipeline_folder)
    edit(pipeline_folder / "model_index.json", _class_name="IwinDiTPipeline", id2label=None)
    check_pipeline_folder(pipeline_folder)


@pytest.mark.parametrize("objective", [FlowMatching(), DDPM()])
def test_33_every_scheduler_of_an_objective_is_accepted(pipeline_folder, objective):
    for name in objective.samplers:
        scheduler = objective.scheduler(name)
        scheduler.save_pretrained(pipeline_folder / "scheduler")
        library = type(scheduler).__module__.partition(".")[0]
        edit(pipeline_folder / "model_index.json", scheduler=[library, type(scheduler).__name__])
        check_pipeline_folder(pipeline_folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(_class_name="StableDiffusionPipeline"), "holds a StableDiffusionPipeline, expected an Iwin"),
        (dict(_class_name=["../evil", "Evil"]), "holds a Evil, expected an IwinDiTPipeline"),
        (dict(_class_name=[]), r"holds a \[\], expected an IwinDiTPipeline"),
        (dict(transformer=["os", "system"]), r"has transformer \['os', 'system'\], expected iwin_dit's Iwin"),
        (dict(transformer=["iwin_dit", "train"]), "expected iwin_dit's IwinDiTTransformer2DModel"),
        (dict(vae=["subprocess", "Popen"]), "expected diffusers's AutoencoderKL or AutoencoderDC"),
        (dict(vae=["diffusers", "UNet2DModel"]), "expected diffusers's AutoencoderKL or AutoencoderDC"),
        (dict(vae=["../vae", "AutoencoderKL"]), "expected diffusers's AutoencoderKL or AutoencoderDC"),
        (dict(vae=None), "has vae None, expected"),
        (dict(vae={"diffusers": "AutoencoderKL"}), "has vae {'diffusers': 'AutoencoderKL'}, expected"),
        (dict(scheduler=["diffusers", "ScoreSdeVeScheduler"]), "has scheduler .* expected diffusers's DDIM"),
        (dict(text_encoder=["transformers", "AutoModel"]), "names 'text_encoder', expected the components"),
        ({"../transformer": ["iwin_dit", "IwinDiTTransformer2DModel"]}, "names '../transformer', expected"),
        (dict(id2label=["shark"]), "has id2label .*, expected names by the number of the class"),
        (dict(id2label={"0": 1}), "has id2label .*, expected names by the number of the class"),
        (dict(id2label={"../x": "a"}), "has id2label .*, expected names by the number of the class"),
        (dict(latents_mean="0000"), "has latents_mean '0000', expected a number for each of the 4 latent"),
        (
            dict(latents_std=[1.0] * 3 + [float("nan")]),
            r"has latents_std .*nan\], expected a number for each",
        ),
    ],
)
def test_33_an_index_names_what_we_know_alone(pipeline_folder, changes, message):
    edit(pipeline_folder / "model_index.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        check_pipeline_folder(pipeline_folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_layers=10**9), "has num_layers 1000000000, expected a whole number from 1, at most 1,000"),
        (dict(num_layers=0), "has num_layers 0, expected a whole number from 1"),
        (dict(num_layers=True), "has num_layers True, expected a whole number"),
        (dict(num_layers=2.0), r"has num_layers 2\.0, expected a whole number"),
        (dict(num_layers=None), "has num_layers None, expected a whole number"),
        (dict(num_attention_heads=-2), "has num_attention_heads -2, expected a whole number from 1"),
        (dict(attention_head_dim=10**9), "has attention_head_dim 1000000000, expected .* at most 65,536"),
        (dict(num_classes=10**8), "has num_classes 100000000, expected .* at most 10,000,000"),
        (dict(in_channels="4"), "has in_channels '4', expected a whole number"),
        (dict(out_channels=10**6), "has out_channels 1000000, expected .* at most 65,536"),
        (dict(patch_size=2048), "has patch_size 2048, expected .* at most 1,024"),
        (dict(sample_size=[8, 10**6]), r"has sample_size \[8, 1000000\], expected .* at most 65,536"),
        (dict(num_layers=[2]), r"has num_layers \[2\], expected a whole number"),
        (dict(mlp_ratio=65), "has mlp_ratio 65, expected a number above 0, at most 64"),
        (dict(mlp_ratio=0.0), r"has mlp_ratio 0\.0, expected a number above 0, at most 64"),
        (dict(mlp_ratio=float("inf")), "has mlp_ratio inf, expected a number above 0, at most 64"),
        (dict(mlp_ratio=float("nan")), "has mlp_ratio nan, expected a number above 0, at most 64"),
        (dict(mixer="iwin"), "has mixer 'iwin', expected keys and values"),
        (dict(mixer__kernel_size=10**9 + 1), "has kernel_size 1000000001, expected .* at most 1,023"),
        (dict(mixer__window_size=[10**9, 1]), r"has window_size \[1000000000, 1\], expected .* at most 65,5"),
        (dict(timestep_scale=float("nan")), "has timestep_scale nan, expected numbers up to"),
        (dict(class_dropout_prob=10**400), "has class_dropout_prob 1000.*, expected numbers up to"),
        (
            dict(_class_name="AutoencoderKL"),
            "has _class_name 'AutoencoderKL', expected 'IwinDiTTransformer2D",
        ),
        (dict(quantization_config={}), "has 'quantization_config', which this version does not know"),
        (dict(auto_map={"AutoModel": "evil.Model"}), "has 'auto_map', which this version does not know"),
    ],
)
def test_33_sizes_are_bounded_before_anything_is_built(pipeline_folder, monkeypatch, changes, message):
    monkeypatch.setattr(IwinDiTTransformer2DModel, "from_config", lambda config: pytest.fail("was built"))
    edit(pipeline_folder / "transformer" / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        check_pipeline_folder(pipeline_folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_layers=3), "do not fit .*config.json at blocks.2.* and . more"),
        (dict(num_classes=2), "do not fit .*config.json at label_embedding.weight$"),
        (dict(num_attention_heads=300, attention_head_dim=300), "do not fit .*config.json at blocks.0.*more"),
        (dict(sample_size=[8, 8, 8]), r"makes no model: the latent has the axes \(8, 8, 8\)"),
        (dict(sample_size=[]), "makes no model: "),
        (dict(patch_size=3), "makes no model: the patch size 3 does not divide the latent size 8 x 8"),
        (dict(mlp="swim"), "makes no model: mlp is 'swim'"),
        (dict(mixer__window=4), "makes no model: .*unexpected keyword argument 'window'"),
    ],
)
def test_33_a_model_takes_no_more_than_its_weights(pipeline_folder, changes, message):
    """Whatever the sizes within the bounds: the model would be as large as its file."""
    edit(pipeline_folder / "transformer" / "config.json", **changes)
    with pytest.raises(CheckpointError, match=f"is a damaged pipeline: .*{message}"):
        check_pipeline_folder(pipeline_folder)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("vae", dict(layers_per_block=10**9), "has layers_per_block 1000000000, expected numbers up to 64"),
        (
            "vae",
            dict(block_out_channels=[8, 10**9]),
            "has block_out_channels .* expected numbers up to 65,536",
        ),
        ("vae", dict(down_block_types=["DownEncoderBlock2D"] * 99), "has down_block_types .* at most 64"),
        ("vae", dict(scaling_factor=float("nan")), "has scaling_factor nan, expected numbers"),
        ("vae", dict(norm_num_groups=0), "makes no model"),
        ("vae", dict(latent_channels=16), "do not fit .*vae/config.json at decoder.conv_in.weight"),
        ("vae", dict(quantization_config={"quant_method": "gguf"}), "quantization_config .* plain weights"),
        (
            "vae",
            dict(_class_name="AutoencoderDC"),
            "has _class_name 'AutoencoderDC', expected 'AutoencoderKL'",
        ),
        (
            "scheduler",
            dict(num_train_timesteps=10**12),
            "has num_train_timesteps 1000000000000, expected a who",
        ),
        ("scheduler", dict(num_train_timesteps=-1), "has num_train_timesteps -1, expected a whole number"),
    ],
)
def test_33_so_are_those_of_the_other_components(pipeline_folder, file, changes, message):
    name = "scheduler_config.json" if file == "scheduler" else "config.json"
    edit(pipeline_folder / file / name, **changes)
    with pytest.raises(CheckpointError, match=message):
        check_pipeline_folder(pipeline_folder)


JSON_FILES = [
    "model_index.json",
    "transformer/config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
]


@pytest.mark.parametrize("name", JSON_FILES)
def test_33_json_that_is_none_too_large_or_too_deep(pipeline_folder, name):
    path = pipeline_folder / name
    good = path.read_bytes()
    for text, message in (
        (b"nonsense", "Expecting value"),
        (b"[]", "holds a list"),
        (b"[" * 100_000, "nested too deeply"),
        (good + b" " * (16 << 20), r"it has more than 16\.0 MiB"),
        (b"\xff\xff", "decode"),
        (None, "FileNotFoundError|No such file|neither a run"),
    ):
        path.unlink() if text is None else path.write_bytes(text)
        with pytest.raises(CheckpointError, match=message):
            check_pipeline_folder(pipeline_folder)


def test_33_large_json_is_refused_before_it_is_parsed(pipeline_folder, monkeypatch):
    (pipeline_folder / "model_index.json").write_bytes(b"[" + b"1," * (9 << 20))
    monkeypatch.setattr(files.json, "loads", lambda data: pytest.fail("was parsed"))
    with pytest.raises(CheckpointError, match="it has more than 16"):
        check_pipeline_folder(pipeline_folder)


def shard_weights(folder):
    """The transformer's weights in two files and an index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    where = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == file}, folder / file)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return where


def test_33_an_index_of_weights_names_files_beside_it(pipeline_folder):
    folder = pipeline_folder / "transformer"
    where = shard_weights(folder)
    check_pipeline_folder(pipeline_folder)
    index = folder / f"{WEIGHTS}.index.json"
    for file, message in (
        ("../x.safetensors", "expected plain names"),
        ("/etc/passwd", "expected plain names"),
        ("part-0.bin", "expected plain names"),
        (".hidden.safetensors", "expected plain names"),
        (3, "expected plain names"),
        ("part-9.safetensors", "cannot be read"),
    ):
        edit(index, weight_map={**where, next(iter(where)): file})
        with pytest.raises(CheckpointError, match=message):
            check_pipeline_folder(pipeline_folder)
    for broken in ([], {}, None):
        edit(index, weight_map=broken)
        with pytest.raises(CheckpointError, match="expected plain names"):
            check_pipeline_folder(pipeline_folder)


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/passwd",
        "a/b.json",
        "..",
        "",
        ".hidden.json",
        "model.pt",
        "x.json\n",
        "a\\b.json",
    ],
)
def test_33_a_manifest_lists_plain_names(tmp_path, name):
    directory = checkpoint.save_checkpoint(tmp_path / "run", 1, {"model": {"a": torch.ones(2)}}, {}, keep=2)
    (tmp_path / "run" / "x.safetensors").write_bytes(b"")
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        CheckpointError, match=r"expected plain names such as model\.safetensors or state\.json"
    ):
        checkpoint.newest(tmp_path / "run")


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_33_json_of_a_checkpoint_is_bounded(tmp_path, monkeypatch, name):
    directory = checkpoint.save_checkpoint(tmp_path, 1, {"model": {"a": torch.ones(2)}}, {}, keep=2)
    read = checkpoint.verify if name == "manifest.json" else checkpoint.read_state
    path = directory / name
    good = path.read_bytes()
    path.write_bytes(b"[" * 100_000)
    with pytest.raises(CheckpointError, match="nested too deeply"):
        read(directory)
    path.write_bytes(good + b" " * (1 << 20))
    monkeypatch.setattr(files.json, "loads", lambda data: pytest.fail("was parsed"))
    with pytest.raises(CheckpointError, match=r"it has more than 1\.0 MiB"):
        read(directory)


def test_33_what_could_not_be_read_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="readers take 1048576"):
        checkpoint.save_checkpoint(tmp_path, 1, {}, {"note": "x" * (1 << 20)}, keep=2)
    assert checkpoint.newest(tmp_path) is None


@pytest.mark.parametrize("step", [-1, 1.5, "1", None, True])
def test_33_a_state_has_a_step(tmp_path, step):
    directory = checkpoint.save_checkpoint(tmp_path, 1, {}, {}, keep=2)
    edit(directory / "state.json", step=step)
    with pytest.raises(CheckpointError, match=r"its step is .*, expected 1"):
        checkpoint.read_state(directory)


@pytest.mark.parametrize(
    "header", [b"\xff" * 8, (1 << 40).to_bytes(8, "little"), b"\x02" + b"\0" * 7 + b"[]"]
)
def test_33_a_header_that_lies(tmp_path, pipeline_folder, header):
    directory = checkpoint.save_checkpoint(tmp_path / "run", 1, {"a": {"a": torch.ones(2)}}, {}, keep=2)
    for path in (directory / "a.safetensors", pipeline_folder / "transformer" / WEIGHTS):
        path.write_bytes(header + path.read_bytes()[len(header) :])
    with pytest.raises(CheckpointError, match="only safetensors are accepted"):
        checkpoint.read_tensors(directory, "a")
    with pytest.raises(CheckpointError, match="cannot be read: Error while deserializing"):
        check_pipeline_folder(pipeline_folder)


def test_33_a_tensor_that_claims_to_be_longer_than_its_file(tmp_path):
    directory = checkpoint.save_checkpoint(tmp_path, 1, {"a": {"a": torch.ones(2)}}, {}, keep=2)
    claim = json.dumps({"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}).encode()
    (directory / "a.safetensors").write_bytes(len(claim).to_bytes(8, "little") + claim + bytes(8))
    with pytest.raises(CheckpointError, match="only safetensors are accepted"):
        checkpoint.read_tensors(directory, "a")


def change_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    save_file(change(dict(tensors)), folder / WEIGHTS)


@pytest.mark.parametrize("component", ["transformer", "vae"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != min(t)}, "do not fit .*config.json at {first}$"),
        (lambda t: t | {"a.surprise": torch.ones(1)}, "do not fit .*config.json at a.surprise$"),
        (lambda t: t | {min(t): t[min(t)][None]}, "do not fit .*config.json at {first}$"),
        (lambda t: {f"x.{k}": v for k, v in t.items()}, r"do not fit .* at (\S+, ){{9}}\S+ and \d+ more"),
        (lambda t: t | {min(t): t[min(t)] * torch.nan}, "are not finite at {first}$"),
        (lambda t: t | {min(t): t[min(t)].long()}, "is I64 at {first}, expected floats"),
        (lambda t: t | {min(t): t[min(t)].to(torch.float8_e4m3fn)}, "is F8_E4M3 at {first}, expected floats"),
    ],
    ids=["missing", "extra", "shape", "all", "nan", "integers", "float8"],
)
def test_34_weights_of_a_pipeline(pipeline_folder, component, change, message):
    """diffusers takes the first as untrained, the second and the fifth as they are."""
    folder = pipeline_folder / component
    first = min(load_file(folder / WEIGHTS))
    change_weights(folder, change)
    with pytest.raises(CheckpointError, match="is a damaged pipeline: .*" + message.format(first=first)):
        check_pipeline_folder(pipeline_folder)


def test_34_old_names_of_an_autoencoder_are_known(pipeline_folder):
    """diffusers renames them when it loads."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=[8], norm_num_groups=4)  # with attention in the middle
    vae.save_pretrained(pipeline_folder / "vae")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors):
        for new, name in old.items():
            tensors = {key.replace(f".{new}.", f".{name}."): value for key, value in tensors.items()}
        return tensors

    change_weights(pipeline_folder / "vae", rename)
    assert any("proj_attn" in name for name in load_file(pipeline_folder / "vae" / WEIGHTS))
    check_pipeline_folder(pipeline_folder)
    again = IwinDiTPipeline.from_pretrained(pipeline_folder).vae
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in vae.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_35_half_precision_can_be_sampled(pipeline_folder, dtype):
    change_weights(pipeline_folder / "transformer", lambda t: {k: v.to(dtype) for k, v in t.items()})
    check_pipeline_folder(pipeline_folder)
    pipeline = IwinDiTPipeline.from_pretrained(pipeline_folder)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([1], num_inference_steps=1, output_type="pt").images
    assert torch.isfinite(images).all()


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("transformer/config.json", {"class_dropout_prob": "a"}, "expected a value such as 0.1"),
        ("transformer/config.json", {"timestep_scale": {"a": 1}}, "expected a value such as 1.0"),
        ("transformer/config.json", {"timestep_scale": 10**30}, "expected numbers up to"),
        ("scheduler/scheduler_config.json", {"shift": 10**30}, "is a damaged pipeline: "),
        ("scheduler/scheduler_config.json", {"shift": "x"}, "has shift 'x', expected a value such as 1.0"),
        (
            "scheduler/scheduler_config.json",
            {"shift_terminal": 3},
            "timesteps are not finite",
        ),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": True}, "num_train_timesteps True"),
        ("vae/config.json", {"norm_num_groups": 0.5}, "has norm_num_groups 0.5, expected a value such as 32"),
        ("vae/config.json", {"scaling_factor": "x"}, "has scaling_factor 'x', expected a value such as"),
        ("vae/config.json", {"act_fn": "x"}, "is a damaged pipeline: "),
        ("model_index.json", {"id2label": [1]}, "expected names by the number of the class"),
        (
            "model_index.json",
            {"latents_mean": {"a": 1}},
            "expected a number for each of the 4 latent channels",
        ),
    ],
)
def test_33_values_that_only_fail_when_they_are_used(pipeline_folder, file, changes, message):
    """They are refused where the pipeline is loaded, in one line."""
    path = pipeline_folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message) as error:
        load_pipeline(str(pipeline_folder))
    assert "\n" not in str(error.value)
