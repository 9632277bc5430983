"""Sets of clips and I3D: against networks written out, pads and resizing in closed form, and themselves."""

from collections import OrderedDict

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from evaluation_stub import one_of
from PIL import Image
from safetensors.torch import save_file

from iwin_dit.evaluation.archives import NpzClips
from iwin_dit.evaluation.evaluate import extract_features, read_features
from iwin_dit.evaluation.i3d import I3D, InflatedInception, Mixed, Pool, Unit, pad_same
from iwin_dit.evaluation.images import FolderClips, open_set
from iwin_dit.evaluation.metrics import compute
from iwin_dit.runtime.errors import CheckpointError, DataError

COUNT, FRAMES, SIDE = 24, 5, 8


def shake(network, seed=0):
    """Kernels that keep a signal's size, so that logits depend on the clip; norms that do something."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if name.endswith("conv3d.weight"):
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
        elif name.endswith(("bn.weight", "running_var")):
            tensor.uniform_(0.7, 1.3, generator=generator)
        elif tensor.is_floating_point():
            tensor.uniform_(-0.2, 0.2, generator=generator)
    return network.eval().requires_grad_(False)


def noise(*shape):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def i3d_state():
    """As old files are: without counts of batches."""
    state = shake(InflatedInception()).state_dict()
    return OrderedDict((name, tensor) for name, tensor in state.items() if "num_batches" not in name)


@pytest.fixture(scope="module")
def i3d_weights(i3d_state, tmp_path_factory):
    path = tmp_path_factory.mktemp("i3d") / "rgb.pt"
    torch.save(i3d_state, path, _use_new_zipfile_serialization=False)
    return path


@pytest.fixture(scope="module")
def i3d(i3d_weights):
    return I3D(i3d_weights)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two folders of clips of noise, in folders of classes; and the first one's clips in their order."""
    root = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    clips = {}
    for name, low, high in (("a", 0, 200), ("b", 60, 256)):
        for i in range(COUNT):
            folder = root / name / f"klasse é {i % 3}" / f"{i:02d}"
            folder.mkdir(parents=True)
            pixels = rng.integers(low, high, (FRAMES, SIDE, SIDE + 2, 3), dtype=np.uint8)
            for number, frame in enumerate(pixels):
                Image.fromarray(frame).save(folder / f"{number:03d}.png")
            clips[name, i % 3, i] = pixels
    (root / "a" / ".thumbnails").mkdir()
    Image.new("RGB", (2, 2)).save(root / "a" / ".thumbnails" / "0.png")
    (root / "a" / "notes.txt").write_text("no frame")
    return root / "a", root / "b", np.stack([clips[key] for key in sorted(clips) if key[0] == "a"])


def test_names_and_shapes_are_the_ports(i3d_state):
    assert {
        "Conv3d_1a_7x7.conv3d.weight": (64, 3, 7, 7, 7),
        "Conv3d_1a_7x7.bn.running_mean": (64,),
        "Conv3d_2c_3x3.conv3d.weight": (192, 64, 3, 3, 3),
        "Mixed_3b.b1a.conv3d.weight": (96, 192, 1, 1, 1),
        "Mixed_3b.b3b.bn.running_var": (32,),
        "Mixed_4e.b2b.conv3d.weight": (64, 32, 3, 3, 3),
        "logits.conv3d.weight": (400, 1024, 1, 1, 1),
        "logits.conv3d.bias": (400,),
    }.items() <= {name: tuple(tensor.shape) for name, tensor in i3d_state.items()}.items()
    assert len(i3d_state) == (3 + 9 * 6) * 5 + 2  # units of five tensors, and the logits' two
    assert all(module.eps == 1e-3 for module in InflatedInception().modules() if hasattr(module, "eps"))


def test_parameters_are_as_many_as_the_widths_say():
    """By the table of Inception's paper, whose blocks 3a to 5b are 3b to 5c here, its 5x5 being 3x3x3."""
    rows = """64 96 128 16 32 32 | 128 128 192 32 96 64 | 192 96 208 16 48 64 | 160 112 224 24 64 64
        | 128 128 256 24 64 64 | 112 144 288 32 64 64 | 256 160 320 32 128 128 | 256 160 320 32 128 128
        | 384 192 384 48 128 128"""
    kernels, norms, width = 3 * 64 * 7**3 + 64 * 64 + 64 * 192 * 3**3, 64 + 64 + 192, 192
    for row in rows.split("|"):
        one, reduce3, three, reduce5, five, pool = map(int, row.split())
        kernels += width * (one + reduce3 + reduce5 + pool) + 27 * (reduce3 * three + reduce5 * five)
        norms += one + reduce3 + three + reduce5 + five + pool
        width = one + three + five + pool
    expected = kernels + 2 * norms + 400 * (width + 1)
    assert sum(p.numel() for p in InflatedInception().parameters()) == expected == 12_697_264


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9])
@pytest.mark.parametrize(("kernel", "stride"), [(7, 2), (3, 2), (3, 1), (2, 2), (1, 1), (1, 2)])
def test_same_padding_is_tensorflows(length, kernel, stride):
    """Output i sees inputs from ``i * stride - before`` on, those outside left out, along each axis."""
    generator = torch.Generator().manual_seed(length)
    count = (length + stride - 1) // stride
    before = max((count - 1) * stride + kernel - length, 0) // 2
    seen = [[i * stride - before + k for k in range(kernel)] for i in range(count)]
    weight = torch.randn(kernel, generator=generator)
    for axis in range(3):
        shape, k, s = [3, 3, 3], [1, 1, 1], [1, 1, 1]
        shape[axis], k[axis], s[axis] = length, kernel, stride
        x = torch.rand(1, 1, *shape, generator=generator)
        lines = x.movedim(2 + axis, 0)
        sums = [sum(weight[j] * lines[n] for j, n in enumerate(window) if 0 <= n < length) for window in seen]
        found = F.conv3d(pad_same(x, k, s), weight.view(1, 1, *k), stride=s).movedim(2 + axis, 0)
        torch.testing.assert_close(found, torch.stack([v + torch.zeros_like(lines[0]) for v in sums]))
        maxima = [torch.stack([lines[n] for n in window if 0 <= n < length]).amax(0) for window in seen]
        assert torch.equal(Pool(k, s)(x).movedim(2 + axis, 0), torch.stack(maxima))


def unit(state, name, x, stride=1, pads=None):
    """Convolution, batch norm by its formula in this order, ReLU."""
    weight = state[f"{name}.conv3d.weight"]
    k = weight.shape[2] // 2
    x = F.conv3d(F.pad(x, pads or [k] * 6), weight, stride=stride)
    keys = ("running_mean", "running_var", "weight", "bias")
    mean, var, gamma, beta = (state[f"{name}.bn.{key}"].view(-1, 1, 1, 1) for key in keys)
    return ((x - mean) / (var + 1e-3).sqrt() * gamma + beta).clamp(min=0)


def block(state, name, x):
    b0 = unit(state, f"{name}.b0", x)
    b1 = unit(state, f"{name}.b1b", unit(state, f"{name}.b1a", x))
    b2 = unit(state, f"{name}.b2b", unit(state, f"{name}.b2a", x))
    b3 = unit(state, f"{name}.b3b", F.max_pool3d(x, 3, stride=1, padding=1))  # by minus infinity
    return torch.cat([b0, b1, b2, b3], 1)


def written_out(state, x):
    """I3D of nine frames of 224 x 224; the pads, by minus infinity for maxima, worked out by hand."""

    def pool(x, kernel, stride, pads):
        return F.max_pool3d(F.pad(x, pads, value=-torch.inf), kernel, stride)

    x = unit(state, "Conv3d_1a_7x7", x, 2, (2, 3, 2, 3, 3, 3))  # 5 x 112 x 112
    x = pool(x, (1, 3, 3), (1, 2, 2), (0, 1, 0, 1, 0, 0))  # 5 x 56 x 56
    x = unit(state, "Conv3d_2c_3x3", unit(state, "Conv3d_2b_1x1", x))
    x = pool(x, (1, 3, 3), (1, 2, 2), (0, 1, 0, 1, 0, 0))  # 5 x 28 x 28
    x = block(state, "Mixed_3c", block(state, "Mixed_3b", x))
    x = pool(x, 3, 2, (0, 1, 0, 1, 1, 1))  # 3 x 14 x 14
    for letter in "bcdef":
        x = block(state, f"Mixed_4{letter}", x)
    x = pool(x, 2, 2, (0, 0, 0, 0, 0, 1))  # 2 x 7 x 7
    x = block(state, "Mixed_5c", block(state, "Mixed_5b", x))
    return x.mean((2, 3, 4)) @ state["logits.conv3d.weight"].flatten(1).T + state["logits.conv3d.bias"]


def bilinear(length, out=224):
    """``(out, length)``: the shares of pixels, whose centres are half pixels from the edges."""
    shares = np.zeros((out, length))
    for i in range(out):
        place = min(max((i + 0.5) * length / out - 0.5, 0), length - 1)
        left = min(int(place), length - 2)
        shares[i, left], shares[i, left + 1] = left + 1 - place, place - left
    return torch.from_numpy(shares)


def test_the_network_is_the_one_written_out(i3d, i3d_state):
    clip = noise(1, 3, 9, 20, 250)
    large = torch.einsum("hi,bctij,wj->bcthw", bilinear(20), clip.double(), bilinear(250))
    expected = written_out(i3d_state, (large * 2 / 255 - 1).float())
    found = i3d(clip)["logits"]
    assert (found.shape, found.dtype) == ((1, 400), torch.float32)
    other = i3d(clip.flip(4))["logits"]
    assert (other - expected).abs().max() > 0.1, "the clip matters"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_block_that_is_inflated_is_the_flat_one_on_a_clip_that_stands_still():
    """Kernels repeated over time and divided by its length; at the middle of three frames, away from pads."""
    network = shake(Mixed(6, 4, 5, 7, 3, 8, 9))
    for module in network.modules():
        if isinstance(module, Unit):
            weight = module.conv3d.weight
            weight.copy_(weight[:, :, :1].clone().expand_as(weight) / weight.shape[2])
    image = torch.rand(2, 6, 5, 7, generator=torch.Generator().manual_seed(1))

    def flat(module, x):
        weight, bn = module.conv3d.weight.sum(2), module.bn
        x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps).relu()

    one, two = (flat(b, flat(a, image)) for a, b in ((network.b1a, network.b1b), (network.b2a, network.b2b)))
    pooled = flat(network.b3b, F.max_pool2d(image, 3, stride=1, padding=1))
    expected = torch.cat([flat(network.b0, image), one, two, pooled], 1)
    found = network(image[:, :, None].expand(-1, -1, 3, -1, -1))[:, :, 1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_times_left_are_an_eighth_less_one():
    """Of the network itself, without numbers; nine frames are the fewest."""
    with torch.device("meta"):
        network = InflatedInception().eval()
        for frames in (9, 16, 17, 24, 25, 64):
            shape = network(torch.empty(2, 3, frames, 224, 224)).shape
            assert shape == (2, 400, -(-frames // 8) - 1, 1, 1)
        with pytest.raises(RuntimeError):
            network(torch.empty(2, 3, 8, 224, 224))


def test_logits_are_of_clips_and_of_times(i3d):
    """A batch is its clips; and seventeen frames leave two times, whose logits are averaged."""
    clips = noise(1, 3, 17, 8, 8)
    clips = torch.cat([clips, clips.flip(2)])
    both = i3d(clips)["logits"]
    assert (both[0] - both[1]).abs().max() > 0.01, "time has a direction"
    large = F.interpolate(clips[1].movedim(1, 0).float(), (224, 224), mode="bilinear").movedim(0, 1)[None]
    times = i3d.network(large / 127.5 - 1)
    assert times.shape == (1, 400, 2, 1, 1)
    torch.testing.assert_close(times.flatten(2).mean(2)[0], both[1], rtol=1e-4, atol=1e-5)


def test_weights_load_from_any_file_of_tensors(i3d, i3d_state, i3d_weights, tmp_path):
    save_file(dict(i3d_state), tmp_path / "same.safetensors")
    again = I3D(tmp_path / "same.safetensors")
    for name, tensor in again.network.state_dict().items():
        assert "num_batches" in name or torch.equal(tensor, i3d_state[name])
    assert (again.name, len(i3d.sha256)) == ("i3d", 64)
    assert again.sha256 != i3d.sha256 == I3D(i3d_weights).sha256
    assert not again.training


@pytest.mark.filterwarnings("ignore:.*torch.*jit")
def test_weights_that_are_not_i3ds_are_refused(i3d_state, tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "marker"), "w"))

    path = tmp_path / "file.pt"
    with pytest.raises(CheckpointError, match="is not there; expected I3D's weights"):
        I3D(path)
    small = {name: tensor[:1] for name, tensor in i3d_state.items()}
    first = "Conv3d_1a_7x7.bn.bias"
    for content, message in (
        ({}, rf"does not hold I3D's weights: .* missing {first}"),
        (small, r"Conv3d_1a_7x7.conv3d.weight \(1, 3, 7, 7, 7\) instead of \(64, 3, 7, 7, 7\)"),
        (i3d_state | {"logits.conv3d.bias": torch.zeros(600)}, r"bias \(600,\) instead of \(400,\)"),
        (i3d_state | {"fc": torch.zeros(2)}, "missing none; unexpected fc"),
        ({"state": small}, "state dict's state is dict, expected a tensor"),
        (Hostile(), "objects that could run code are not read"),
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=message) as caught:
            I3D(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=r"does not hold I3D's weights: .* it is damaged") as caught:
        I3D(path)
    assert "\n" not in str(caught.value)
    torch.jit.script(torch.nn.ReLU()).save(path)
    with pytest.raises(CheckpointError, match=r"does not hold I3D's weights: .* cannot be read as tensors"):
        I3D(path)
    assert not (tmp_path / "marker").exists()


def test_what_is_no_clip_is_refused(i3d):
    with pytest.raises(DataError, match="needs clips of 9 frames or more, found 8"):
        i3d(torch.zeros(1, 3, 8, 8, 8, dtype=torch.uint8))
    with pytest.raises(DataError, match=r"found torch.uint8 of shape \(1, 3, 8, 8\); give clips"):
        i3d(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(DataError, match=r"found torch.float32 of shape \(1, 3, 9, 8, 8\)"):
        i3d(torch.zeros(1, 3, 9, 8, 8))
    with pytest.raises(DataError, match=r"found torch.uint8 of shape \(1, 9, 3, 8, 8\)"):
        i3d(torch.zeros(1, 9, 3, 8, 8, dtype=torch.uint8))


def test_a_folder_is_its_frames_and_its_npz(sets, tmp_path):
    folder, _, pixels = sets
    clips = open_set(str(folder), of_clips=True)
    assert len(clips) == COUNT
    assert clips.description == {"folder": str(folder), "clips": COUNT, "frames": FRAMES}
    expected = torch.from_numpy(pixels).movedim(-1, 1)
    assert torch.equal(clips.read(0, COUNT), expected)
    assert torch.equal(clips.read(7, 9), expected[7:9])
    for name, save in (("plain", np.savez), ("packed", np.savez_compressed)):
        path = tmp_path / f"{name}.npz"
        save(path, pixels)
        found = open_set(str(path), of_clips=True)
        assert len(found) == COUNT
        assert found.description == {"npz": str(path), "clips": COUNT, "frames": FRAMES}
        assert torch.equal(found.read(5, 9), expected[5:9])
        assert torch.equal(found.read(20, COUNT), expected[20:])
    assert NpzClips(tmp_path / "plain.npz").fingerprint != NpzClips(tmp_path / "packed.npz").fingerprint


def test_frames_of_nested_clips_stay_together(tmp_path):
    """A clip whose folder holds another, whose name sorts between its frames."""
    for name, grey in (("clip/a.png", 1), ("clip/b/x.png", 3), ("clip/c.png", 2), ("clip/b/y.png", 4)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2), (grey,) * 3).save(tmp_path / name)
    assert FolderClips(tmp_path).read(0, 2)[:, 0, :, 0, 0].tolist() == [[1, 2], [3, 4]]


def test_fingerprints_change_with_the_content(sets):
    folder = sets[0]
    before = FolderClips(folder).fingerprint
    assert FolderClips(folder).fingerprint == before
    path = sorted(folder.rglob("*.png"))[-1]
    content = path.read_bytes()
    Image.new("RGB", Image.open(path).size).save(path)
    assert FolderClips(folder).fingerprint != before
    path.write_bytes(content)
    assert FolderClips(folder).fingerprint == before


def test_bad_sets_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="there are no images in"):
        open_set(str(tmp_path / "empty"), of_clips=True)
    with pytest.raises(DataError, match="neither a folder of clips"):
        open_set(str(tmp_path / "nothing.npz"), of_clips=True)

    def clip(name, frames, size=(4, 4)):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for frame in frames:
            Image.new("RGB", size).save(folder / f"{frame}.png")
        return folder

    clip("lengths/x", "abc")
    clip("lengths/y", "ab")
    with pytest.raises(DataError, match=r"y has 2 frames, .*x has 3; a metric compares clips of one length"):
        FolderClips(tmp_path / "lengths")
    clip("sizes/x", "ab")
    clip("sizes/y", "ab", (5, 4))
    with pytest.raises(DataError, match=r"y/a\.png has 5 x 4 pixels, .*x/a\.png has 4 x 4"):
        FolderClips(tmp_path / "sizes").read(1, 2)
    broken = clip("broken/x", "ab")
    (broken / "b.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"b\.png"):
        FolderClips(tmp_path / "broken").read(0, 1)
    clip("numbers/x", ["f2", "f10"])
    with pytest.raises(DataError, match=r"f10\.png comes before f2\.png .* leading zeros"):
        FolderClips(tmp_path / "numbers")
    clip("padded/x", ["f02", "f10"])
    assert len(FolderClips(tmp_path / "padded")) == 1

    for name, array, message in (
        ("floats", np.zeros((2, 5, 4, 4, 3)), r"holds float64 of shape \(2, 5, 4, 4, 3\)"),
        (
            "images",
            np.zeros((2, 4, 4, 3), np.uint8),
            r"shape \(2, 4, 4, 3\) in arr_0, expected uint8 \(N, fr",
        ),
        ("none", np.zeros((0, 5, 4, 4, 3), np.uint8), r"shape \(0, 5"),
        ("fortran", np.asfortranarray(np.zeros((2, 5, 4, 4, 3), np.uint8)), "in C order"),
        ("objects", np.array([print, 1], dtype=object), "holds object"),
    ):
        np.savez(tmp_path / f"{name}.npz", array)
        with pytest.raises(DataError, match=message):
            NpzClips(tmp_path / f"{name}.npz")
    (tmp_path / "text.npz").write_text("no zip")
    with pytest.raises(DataError, match=r"is no \.npz with clips"):
        NpzClips(tmp_path / "text.npz")


class Motion:
    """An extractor of clips: six numbers of space and time."""

    name, sha256, layers, preprocessing = "motion", "0", ("pool",), "none"

    def __call__(self, clips):
        x = clips.float() / 255
        still, moving = x.mean((2, 3, 4)), x.diff(dim=2).square().mean((2, 3, 4))
        return {"pool": torch.cat([still, moving], 1)}


@pytest.mark.parametrize("batch", [1, 7])
def test_frechet_distance_of_clips(sets, tmp_path, batch):
    """With an extractor of one's own, through files of features; the witness has them whole, in float64."""
    sides, whole = [], []
    for folder in sets[:2]:
        clips = FolderClips(folder)
        extract_features(clips, Motion(), tmp_path / folder.name, batch, one_of())
        sides.append(read_features(tmp_path / folder.name, len(clips), ["fid"]))
        whole.append(Motion()(clips.read(0, COUNT))["pool"].double().numpy())
    a, b = (np.cov(features.T) for features in whole)
    root = scipy.linalg.sqrtm(a @ b).real
    witness = ((whole[0].mean(0) - whole[1].mean(0)) ** 2).sum() + np.trace(a + b - 2 * root)
    assert compute(["fid"], *sides)["fid"] == pytest.approx(witness, rel=1e-6)
