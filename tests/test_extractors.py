"""Extractors of features: DINOv2 against its definition, one's own classifier, and how images are resized."""

import hashlib

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from iwin_dit.evaluation import extractors
from iwin_dit.evaluation.extractors import Classifier, DINOv2, Inception, resize, resize_positions
from iwin_dit.runtime.errors import CheckpointError

WIDTH, DEPTH, HEADS, SIDE = 24, 2, 3, 37  # the published grid: 518 pixels


def tiny():
    shape = dict(img_size=224, patch_size=14, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS)
    return VisionTransformer(**shape, init_values=1e-5, num_classes=0)


@pytest.fixture(scope="module")
def state():
    """Weights as the original file holds them, none of them at its start."""
    rng = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in tiny().state_dict().items()}
    shapes |= {"pos_embed": (1, 1 + SIDE**2, WIDTH), "mask_token": (1, WIDTH)}
    return {name: 0.3 * torch.randn(shape, generator=rng) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def weights(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("dinov2") / "dinov2_vitl14_pretrain.pth"
    torch.save(state, path)
    return path


def cubic(x, a=-0.75):
    """Keys's kernel."""
    x = np.abs(x)
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def positions_by_definition(positions, grid=16):
    """Bicubic at ``(i + 0.5) * 37 / (16 + 0.1) - 0.5``, edges repeated, as DINOv2's own code asks for."""
    centres = (np.arange(grid) + 0.5) * SIDE / (grid + 0.1) - 0.5
    matrix = np.zeros((grid, SIDE))
    for i, centre in enumerate(centres):
        for j in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            matrix[i, min(max(j, 0), SIDE - 1)] += cubic(centre - j)
    patches = positions[0, 1:].double().numpy().reshape(SIDE, SIDE, WIDTH)
    small = np.einsum("ia,jb,abd->ijd", matrix, matrix, patches).reshape(1, grid * grid, WIDTH)
    return torch.cat([positions[:, :1].double(), torch.from_numpy(small)], 1)


def dinov2_by_definition(images, w):
    """Oquab et al. 2023: a vision transformer whose branches are scaled by ``gamma``; the class token."""
    w = {name: tensor.double() for name, tensor in w.items()}

    def affine(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    batch = len(images)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = (images.double() / 255 - mean) / std
    patches = x.reshape(batch, 3, 16, 14, 16, 14).permute(0, 2, 4, 1, 3, 5).reshape(batch, 256, -1)
    x = patches @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]
    x = torch.cat([w["cls_token"].expand(batch, -1, -1), x], 1) + positions_by_definition(w["pos_embed"])
    for i in range(DEPTH):
        b = f"blocks.{i}"
        qkv = affine(norm(x, f"{b}.norm1"), f"{b}.attn.qkv").view(batch, 257, 3, HEADS, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5).softmax(-1)
        mixed = (scores @ v).transpose(1, 2).reshape(batch, 257, WIDTH)
        x = x + affine(mixed, f"{b}.attn.proj") * w[f"{b}.ls1.gamma"]
        hidden = affine(norm(x, f"{b}.norm2"), f"{b}.mlp.fc1")
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        x = x + affine(hidden, f"{b}.mlp.fc2") * w[f"{b}.ls2.gamma"]
    return norm(x, "norm")[:, 0]


def test_sfid_compares_the_first_seven_channels_of_tensorflows_mixed_6(inception_weights):
    """Layer by layer: TensorFlow's mixed, mixed_1, ... are Mixed_5b, 5c, 5d, 6a, 6b, 6c and 6d."""
    extractor = Inception(inception_weights)
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, 3, 64, 64), generator=rng).to(torch.uint8)
    found, network = extractor(images), extractor.network
    x = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False)
    x = (x - 128) / 128
    early = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1")
    early += ("Conv2d_4a_3x3", "MaxPool_2")
    for name in (*early, *(f"Mixed_{block}" for block in ("5b", "5c", "5d", "6a", "6b", "6c"))):
        x = getattr(network, name)(x)
    block = network.Mixed_6d.branch1x1
    shift = (block.bn.running_mean, block.bn.running_var, block.bn.weight, block.bn.bias)
    x = F.batch_norm(F.conv2d(x, block.conv.weight), *shift, eps=0.001)
    assert x.shape == (2, 192, 17, 17)
    expected = x.relu()[:, :7].reshape(2, -1)
    assert found["spatial"].shape == (2, 2023)
    torch.testing.assert_close(found["spatial"], expected, rtol=1e-4, atol=1e-5)
    assert expected.std(1).min() > 0.01
    assert not torch.allclose(expected, x.relu()[:, 1:8].reshape(2, -1), rtol=1e-2)
    assert found["pool"].shape == (2, 2048)
    assert found["logits"].shape == (2, 1008)


def test_dinov2_is_what_its_definition_says(state, weights):
    extractor = DINOv2(weights, tiny)
    images = torch.randint(256, (3, 3, 224, 224), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    found, expected = extractor(images), dinov2_by_definition(images, state)
    assert list(found) == list(extractor.layers) == ["pool"]
    assert found["pool"].dtype == torch.float32
    torch.testing.assert_close(found["pool"].double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(extractor(images[1:2])["pool"], found["pool"][1:2], rtol=1e-5, atol=1e-5)
    assert extractor.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert extractor.name == f"dinov2-{extractor.sha256[:8]}", "not the published weights"


def test_positions_are_resized_as_dinov2_does(state):
    found = resize_positions(state["pos_embed"], 16)
    torch.testing.assert_close(found.double(), positions_by_definition(state["pos_embed"]), rtol=0, atol=1e-5)
    by_size = F.interpolate(
        state["pos_embed"][:, 1:].view(1, SIDE, SIDE, WIDTH).movedim(-1, 1), (16, 16), mode="bicubic"
    )
    assert (found[0, 1:].T - by_size.flatten(2)[0]).abs().max() > 0.01, "the offset of 0.1 makes a difference"
    assert resize_positions(found, 16) is found


def test_the_architecture_is_that_of_the_published_file():
    """Which has 1,217,586,395 bytes: four for each parameter, and the names."""
    with torch.device("meta"):
        network = extractors.vit_large()
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    count = sum(tensor.numel() for tensor in network.state_dict().values())
    count += 1024 + (SIDE**2 - 16**2) * 1024  # the mask token, and the positions of 518 pixels
    assert 0 < 1_217_586_395 - 4 * count < 200_000
    assert len(shapes) == 4 + 24 * 14 + 2
    assert shapes["blocks.23.ls2.gamma"] == shapes["norm.bias"] == (1024,)
    assert shapes["blocks.0.attn.qkv.weight"] == (3072, 1024)
    assert shapes["patch_embed.proj.weight"] == (1024, 3, 14, 14)
    assert network.blocks[0].attn.num_heads == 16
    assert extractors.DINOV2_SHA256.startswith("d5383ea8f4877b24")


def test_other_weights_are_refused(state, weights, tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "marker"), "w"))

    registers = state | {"register_tokens": torch.zeros(1, 4, WIDTH)}
    fewer = {name: tensor for name, tensor in state.items() if "ls1" not in name}
    for content, message in (
        (registers, 'does not hold DINOv2\'s weights: .*Unexpected key.*"register_tokens"'),
        (fewer, 'Missing key.*"blocks.0.ls1.gamma"'),
        ({}, "does not hold DINOv2's weights"),
        ([1], "does not hold DINOv2's weights"),
        (Hostile(), "does not hold DINOv2's weights"),
    ):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(CheckpointError, match=message):
            DINOv2(tmp_path / "other.pth", tiny)
    assert not (tmp_path / "marker").exists()
    with pytest.raises(CheckpointError, match=r"does not hold DINOv2's weights: .*Missing key"):
        DINOv2(weights)  # of another size than ViT-L


def test_published_weights_are_fetched_once(weights, tmp_path, monkeypatch):
    asked = []

    def fetch(url, path, sha256):
        asked.append((url, sha256))
        with open(path, "wb") as file:
            file.write(weights.read_bytes())

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    for _ in range(2):
        DINOv2(build=tiny)
    assert asked == [(extractors.URL_DINOV2, extractors.DINOV2_SHA256)]
    assert (tmp_path / "hub" / "checkpoints" / "dinov2_vitl14_pretrain.pth").is_file()


def test_images_are_resized_as_pillow_does():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 56, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels).movedim(-1, 1)
    for size in ((16, 24), (64, 80)):
        found = resize(images, size).movedim(1, -1).numpy()
        theirs = [Image.fromarray(p).resize(size[::-1], Image.Resampling.BICUBIC) for p in pixels]
        difference = np.abs(found - np.stack([np.asarray(image, np.float32) for image in theirs]))
        assert difference.max() <= 1
        assert difference.mean() < 0.001
    assert torch.equal(resize(images, (40, 56)), images.float())


def test_a_classifier_gives_what_is_before_its_last_layer():
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", pretrained=False, num_classes=5)
    extractor = Classifier(model, (32, 48), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), "a" * 64)
    images = torch.randint(256, (2, 3, 20, 20), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    found = extractor(images)
    x = resize(images, (32, 48)) / 255
    x = torch.stack([(x[:, c] - m) / s for c, (m, s) in enumerate(((0.1, 0.5), (0.2, 0.6), (0.3, 0.7)))], 1)
    with torch.no_grad():
        expected = model.eval()(x)
        pooled = model.forward_features(x).mean((2, 3))
    torch.testing.assert_close(found["logits"], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["pool"], pooled, rtol=1e-5, atol=1e-6)
    assert set(found) == set(extractor.layers)
    assert "32 x 48" in extractor.preprocessing
    assert "0.2" in extractor.preprocessing
