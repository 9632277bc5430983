"""Files of others: what is read of them, and the cause where they are not read."""

import os
import stat

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import make_pipeline, make_vae
from safetensors.torch import save_file
from test_convert import IMPORTERS, read

from iwin_dit.build import loading
from iwin_dit.build.data import load_autoencoder
from iwin_dit.convert import from_dit, from_iwin_transformer, from_ldm_vae, load_official
from iwin_dit.convert.official_files import find_tensors
from iwin_dit.pipelines.base import export_pipeline
from iwin_dit.runtime import checkpoint, files
from iwin_dit.runtime.errors import CheckpointError, DataError, reason

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4cac\nsize 2690000\n"
KINDS = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1")


def test_numbers_of_numpy_are_read(tmp_path):
    numbers = {f"{order}{kind}": np.dtype(f"{order}{kind}").type(1) for kind in KINDS for order in "<>"}
    numbers |= {"loss": np.float64(-1.25e-3), "step": np.int64(-7), "big": np.array(2.5, ">f4")[()]}
    torch.save({"weight": torch.ones(2), "best": numbers}, tmp_path / "x.pt")
    assert load_official(tmp_path / "x.pt")["best"] == {name: value.item() for name, value in numbers.items()}


class Restoring:
    """Pickles as a call of ``numpy.dtype``, with a state that NumPy itself would take over unchecked."""

    def __init__(self, name, state=None):
        self.name, self.state = name, state

    def __reduce__(self):
        return np.dtype, (self.name, False, True), self.state


class Scalar(Restoring):
    def __reduce__(self):
        return np.float64(0).__reduce__()[0], (Restoring(self.name, self.state), b"\0" * 8)


def test_a_number_of_numpy_that_is_none_is_not_restored(tmp_path):
    """Its state may say that 8 bytes are an address, or a gigabyte."""
    flags = (3, "|", None, None, None, -1, -1, 0x3F)
    for name, state in (
        ("O8", flags),
        ("V8", (3, "|", None, None, None, 1 << 30, 1, 0)),
        ("S1000000000", None),
    ):
        torch.save({"x": Scalar(name, state)}, tmp_path / "x.pt")
        with pytest.raises(DataError, match=r"beside tensors it holds numpy\.dtype\("):
            load_official(tmp_path / "x.pt")
    torch.save({"x": Scalar("f4")}, tmp_path / "x.pt")  # of 8 bytes
    with pytest.raises(DataError, match=r"it is not what torch\.save writes, or it is damaged"):
        load_official(tmp_path / "x.pt")


def test_what_is_not_read_says_why(tmp_path):
    """Whole sentences, and no advice to load files unsafely."""
    damaged = "it is not what torch.save writes, or it is damaged; fetch it again"
    causes = {"text": damaged, "empty": damaged, "short": damaged, "pointer": "git lfs pull fetches the file"}
    causes |= {"list": "holds list, expected tensors by name", "missing": "No such file or directory"}
    causes |= {
        "module": r"it holds torch\.nn\.modules\.linear\.Linear, and objects that could run code are not"
    }
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    torch.save([1], tmp_path / "list.pt")
    (tmp_path / "short.pt").write_bytes((tmp_path / "module.pt").read_bytes()[:-100])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_text("")
    (tmp_path / "pointer.pt").write_text(POINTER)
    for name, cause in causes.items():
        with pytest.raises(DataError, match=cause) as error:
            load_official(tmp_path / f"{name}.pt")
        assert "weights_only" not in str(error.value)
    (tmp_path / "pointer.safetensors").write_text(POINTER)
    with pytest.raises(DataError, match="git lfs pull"):
        load_official(tmp_path / "pointer.safetensors")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        checkpoint.read_tensors(tmp_path, "pointer")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_names_of_wrapped_models(prefix):
    """torch.compile and DDP write them in either order; a compiled block has its part in the middle."""
    for name, importer in IMPORTERS.items():
        weights, _, _, config = read(name)
        wrapped = {prefix + key.replace("blocks.0.", "blocks.0._orig_mod."): t for key, t in weights.items()}
        found, expected = (importer(w, config).state_dict() for w in (wrapped, weights))
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    weights, _, _, config = read("iwin_classifier_1")
    from_iwin_transformer({prefix + key: tensor for key, tensor in weights.items()}, config)
    weights, _, _, config = read("ldm_vae_0")
    from_ldm_vae({prefix + key: tensor for key, tensor in weights.items()}, config)


def test_names_of_another_library_say_whose_they_are():
    config = read("dit_0")[3]
    for name, words in {
        "transformer_blocks.0.attn1.to_q.weight": "they are diffusers'; give the file",
        "encoder.down_blocks.0.resnets.0.conv1.weight": "which needs no import: give its folder",
        "blocks.0.mixer.attention.qkv.weight": "this package's own, which need no import",
    }.items():
        with pytest.raises(ValueError, match=words):
            from_dit({"model": {name: torch.ones(1)}}, config)
    for name in read("dit_0")[0]:
        find_tensors({name: torch.ones(1)})


def test_a_preset_without_a_network_says_what_to_do(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="the hub cannot be reached from here") as error:
        load_autoencoder("sd-vae-ft-ema")
    assert "the preset of stabilityai/sd-vae-ft-ema" in str(error.value)
    assert "hf download" in str(error.value)
    with pytest.raises(DataError, match="the hub cannot be reached from here"):
        load_autoencoder("va-vae-f16d32")
    with pytest.raises(CheckpointError, match="the hub cannot be reached from here"):
        loading.load_pipeline("somebody/something")


def test_reasons_are_whole():
    assert reason(PermissionError(13, "Permission denied", "x")).startswith("permission denied: x; its owner")
    assert reason(OSError(5, "Input/output error", "x")) == "Input/output error: x"
    assert reason(KeyError("weight_map")) == "'weight_map' is missing"
    assert reason(EOFError()) == "EOFError"
    assert reason(RuntimeError("one line\nand another")) == "one line and another"
    long = reason(RuntimeError("A sentence. " * 100))
    assert len(long) < 600
    assert long.endswith("A sentence")


@pytest.fixture
def not_root(tmp_path):
    """This process as a user who may not read everything; root becomes another, who gets at the folder."""
    is_root = os.geteuid() == 0
    if is_root:
        for parent in (tmp_path, *tmp_path.parents[:-1]):
            parent.chmod(parent.stat().st_mode | 0o011)
        os.seteuid(65534)
    yield
    if is_root:
        os.seteuid(0)


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_written_files_follow_the_umask(tmp_path, mask):
    """safetensors itself writes for the owner alone."""
    before = os.umask(mask)
    try:
        export_pipeline(make_pipeline(), tmp_path / "pipeline", {"step": 1})
        (tmp_path / "part").mkdir()
        save_file({"x": torch.ones(1)}, tmp_path / "part" / "x.safetensors")
        files.publish(tmp_path / "part", tmp_path / "whole")
        make_pipeline().save_pretrained(tmp_path / "by hand")
    finally:
        os.umask(before)
    paths = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.suffix == ".safetensors" for path in paths) == 5
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o666 & ~mask}


def test_what_may_not_be_read_is_not_called_damaged(tmp_path, request):
    export_pipeline(make_pipeline(), tmp_path / "pipeline", {"step": 1})
    make_vae().save_pretrained(tmp_path / "vae")
    for path in tmp_path.rglob("*.safetensors"):
        path.chmod(0)
    private = tmp_path / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors"
    request.getfixturevalue("not_root")
    for read_it in (
        lambda: loading.load_pipeline(str(tmp_path / "pipeline")),
        lambda: load_official(private),
    ):
        with pytest.raises((CheckpointError, DataError), match=f"permission denied: {private}") as error:
            read_it()
        assert "damaged" not in str(error.value)
    with pytest.raises(DataError, match="permission denied"):
        load_autoencoder(str(tmp_path / "vae"))
