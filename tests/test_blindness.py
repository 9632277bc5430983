"""What a model cannot see, told by its structure, against what shuffled tokens and Jacobians say."""

import functools
import itertools
import json
import time
import warnings
from dataclasses import asdict, replace

import pytest
import torch
import yaml
from conftest import ROOT, give_zeros_noise

from iwin_dit.build import loading, network, trainer
from iwin_dit.config.parse import load_config, load_run, parse_arguments
from iwin_dit.layers.blindness import AXES, blind_spots, of_earlier_version, resolve
from iwin_dit.layers.specs import BlockSpec, MixerSpec
from iwin_dit.models.backbone import IwinTransformer, IwinTransformer3D
from iwin_dit.models.transformer import IwinDiTTransformer2DModel, IwinDiTTransformer3DModel
from iwin_dit.runtime.errors import ConfigError
from studies.connectivity import dependencies

TINY = dict(in_channels=1, num_layers=1, num_attention_heads=1, attention_head_dim=4, num_classes=1)
BLIND = "tokens this model is blind"
pytestmark = pytest.mark.filterwarnings(f"ignore:.*{BLIND}:UserWarning")


def make(grid, **options):
    torch.manual_seed(0)
    kind = IwinDiTTransformer2DModel
    if len(grid) == 3:
        kind, options = IwinDiTTransformer3DModel, {"sample_frames": grid[0]} | options
    model = kind(sample_size=list(grid[-2:]), **(TINY | options))
    for parameter in give_zeros_noise(model).parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.double().eval()


def answer(model, x):
    return model(x, 500.0, torch.zeros(len(x), dtype=torch.long)).sample


@torch.no_grad()
def shuffling_shows(model, grid, axis=None):
    """How much the answer to shuffled tokens differs from the shuffled answer: of all, or along an axis."""
    x = torch.randn(1, 1, *grid, dtype=torch.float64)
    if axis is None:
        order = torch.randperm(x[0, 0].numel())
        shuffled = lambda z: z.flatten(2)[:, :, order].view_as(z)  # noqa: E731
    else:
        order = torch.roll(torch.randperm(grid[axis]), 1)
        if torch.equal(order, torch.arange(grid[axis])):
            order = order.flip(0)
        shuffled = lambda z: z.index_select(2 + axis, order)  # noqa: E731
    return float((shuffled(answer(model, x)) - answer(model, shuffled(x))).abs().max())


@pytest.mark.parametrize("sides", [range(2, 36), pytest.param(range(36, 65), marks=pytest.mark.slow)])
def test_no_automatic_model_is_blind(sides):
    """Of prime sides and others that one window covers, too: 5, 7, 11, 13, 25, 35, 49, 55, ..."""
    for side in sides:
        assert shuffling_shows(make((side, side)), (side, side)) > 1e-3, side
    for window in (5, 8, "all"):  # one that covers the grid, as given
        assert shuffling_shows(make((5, 5), mixer={"window_size": window}), (5, 5)) > 1e-3, window


MIXERS = [
    *(dict(window_size=w, convolution=c) for w in ("auto", "all", 2, 1) for c in ("auto", True, False)),
    *(dict(window_size=w, kernel_size=k) for w in (2, "all") for k in ([1, 3], [3, 1])),
    *(
        dict(name=name, window_size=w)
        for name in ("swin", "swin_v2", "neighborhood")
        for w in (1, 2, 3, "all")
    ),
    dict(name="global"),
]
CLIPS = [
    *(
        dict(window_size=w, convolution=c)
        for w in ("auto", ["all", 2, 2], [2, "all", "all"])
        for c in (True, False)
    ),
    *(dict(window_size=w, kernel_size=[1, 3, 3]) for w in ("auto", ["all", 2, 2], [2, 2, 2])),
    dict(window_size=["auto", "all", "all"], convolution=False),
    *(dict(name=name, window_size=2) for name in ("swin", "neighborhood")),
    *(dict(name=name) for name in ("global", "factorised")),
]
SPECS = {}  # by their text, since lists have no hash
CASES = [
    *itertools.product(MIXERS, [(4, 4), (5, 1)], ["none", "sincos", "rope"]),
    *itertools.product(CLIPS, [(4, 4, 2), (1, 4, 3)], ["none", "time", "sincos"]),
]


@functools.cache
def _reach(key, grid):
    reads = [dependencies(BlockSpec(8, 2, mixer=SPECS[key]), grid, index).float() for index in range(2)]
    reached = torch.eye(len(reads[0]))
    for index in range(16):
        reached = (reads[index % 2] @ reached).clamp(max=1)
    return reached.view(*grid, *grid)


def truth(mixer, grid, positions):
    """Axes whose tokens never meet, by the blocks' Jacobians; and whose order does not show, by shuffling."""
    SPECS[str(mixer)] = mixer
    reached = _reach(str(mixer), grid)
    model = make(grid, mixer=asdict(mixer), position_embedding=positions, num_layers=2)
    apart, unordered = [], []
    for axis, name in enumerate(AXES[len(grid)]):
        if grid[axis] > 1:
            line = tuple(slice(None) if a == axis else 0 for a in range(len(grid)))
            apart += [] if reached[line + line].all() else [name]
            shows = max(shuffling_shows(model, grid, axis) for _ in range(3))
            unordered += [] if shows > 1e-6 else [name]
    return apart, unordered


@pytest.mark.parametrize("cases", [CASES[::19], pytest.param(CASES, marks=pytest.mark.slow)])
def test_blind_spots_are_those_that_jacobians_and_shuffling_show(cases):
    for options, grid, positions in cases:
        if isinstance(options.get("kernel_size"), list) and len(options["kernel_size"]) != len(grid):
            continue
        mixer = resolve(MixerSpec(**options), grid, positions)
        found, expected = blind_spots(mixer, grid, positions), truth(mixer, grid, positions)
        # in windows that never meet, tokens of one window may be exchanged but not all: no order that serves
        orders = [axis for axis in found.unordered if axis not in found.apart]
        assert found.apart == expected[0], (options, grid)
        assert orders == [axis for axis in expected[1] if axis not in expected[0]], (options, grid, positions)


def test_auto_keeps_what_it_did_where_nothing_was_blind():
    for grid, positions in itertools.product([(8, 8), (12, 8), (16, 16), (9, 9)], ["none", "sincos"]):
        for window in ("auto", 2):
            mixer = MixerSpec(window_size=window)
            now, before = resolve(mixer, grid, positions), of_earlier_version(mixer, grid)
            assert (now.convolution, now.window(grid)) == (before.convolution, before.window(grid))
    for window, positions in itertools.product(("auto", "all", 7), ("sincos", "rope")):
        assert (
            make((7, 7), mixer={"window_size": window}, position_embedding=positions).config.mixer[
                "convolution"
            ]
            is False
        ), "positions come from elsewhere, as they did"
    assert resolve(MixerSpec(convolution=False), (16, 16), "sincos").window((16, 16)) == (16, 16)
    assert resolve(MixerSpec("swin"), (16, 16), "none") == MixerSpec("swin")


def frames_that_see(model, frames):
    """``(frames, frames)``: whether the answer for one depends on the other, by the Jacobian."""
    x = torch.randn(1, 1, *model.latent_size, dtype=torch.float64, requires_grad=True)
    y = answer(model, x)
    rows = [torch.autograd.grad(y[:, :, i].sum(), x, retain_graph=True)[0] for i in range(frames)]
    return torch.stack([row.ne(0).sum((0, 1, 3, 4)) > 0 for row in rows])


@pytest.mark.parametrize("positions", ["none", "sincos"])
@pytest.mark.parametrize("mixer", [{}, {"window_size": "all"}, {"convolution": False}], ids=str)
@pytest.mark.parametrize("side", [5, 6])
def test_frames_of_clips_meet(side, mixer, positions):
    """Those made of a model of images, too, once training has filled the kernels."""
    image = make((side, side), mixer=mixer, position_embedding=positions)
    clips = IwinDiTTransformer3DModel.from_2d(image, 6, num_layers=1)
    direct = make((6, side, side), mixer=mixer, position_embedding=positions, num_layers=6)
    deep = IwinDiTTransformer3DModel(**{**direct.config, "mixer": clips.config.mixer})
    for model in (direct, deep.double().eval()):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        assert frames_that_see(model, 6).all()


def test_an_explicit_blind_model_warns():
    for grid, options, words in (
        ((8, 8), dict(mixer={"name": "global"}), "it cannot tell the order of rows and columns"),
        (
            (8, 8),
            dict(mixer={"window_size": 4, "convolution": False}, position_embedding="sincos"),
            "never meet",
        ),
        (
            (4, 8, 8),
            dict(mixer={"name": "factorised"}, position_embedding="time"),
            "order of rows and columns;",
        ),
        ((4, 8, 8), dict(mixer={"window_size": "all", "kernel_size": [1, 3, 3]}), "order of frames;"),
    ):
        with pytest.warns(UserWarning, match=f"{BLIND}: .*{words}"):
            make(grid, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make((8, 8)), make((7, 7)), make((4, 7, 7))
        IwinTransformer(img_size=28, embed_dim=8, depths=(1, 1), num_heads=(1, 1))
        IwinTransformer3D((4, 28, 28), embed_dim=8, depths=(1, 1), num_heads=(1, 1))
    with pytest.warns(UserWarning, match="order of rows and columns; give it a convolution or pos_embed"):
        IwinTransformer(img_size=28, embed_dim=8, depths=(1,), num_heads=(1,))
    with pytest.warns(UserWarning, match="order of frames"):
        IwinTransformer3D((4, 28, 28), embed_dim=8, depths=(1, 1), num_heads=(1, 1), pos_embed=False)


# -- models and runs of version 0.1, whose configs hold `auto`


def saved(model, folder, **mixer):
    """As version 0.1 saved it: ``auto`` unresolved."""
    model.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["mixer"] |= mixer
    path.write_text(json.dumps(config))
    return type(model).from_pretrained(folder).double()


@pytest.mark.parametrize("size", [7, 16])
def test_models_of_the_earlier_version_answer_as_they_did(tmp_path, size):
    """A blind one has no convolution among its weights; windows without one were the smallest that divide."""
    as_it_was = asdict(
        of_earlier_version(MixerSpec(convolution="auto" if size == 7 else False), (size, size))
    )
    assert (as_it_was["window_size"], as_it_was["convolution"]) == ("divisor", False)
    old = make((size, size), mixer=as_it_was)
    given = dict(window_size="auto", convolution="auto" if size == 7 else False)
    loaded = saved(old, tmp_path / "one", **given)
    x = torch.randn(1, 1, size, size, dtype=torch.float64)
    other = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    assert old.blocks[0].mixer.spec.window((8, 8)) == (4, 4)
    for again in (loaded, saved(loaded, tmp_path / "two")):
        assert torch.equal(answer(again, x), answer(old, x))
        assert torch.equal(answer(again, other), answer(old, other)), "on another grid, too"


def test_what_a_model_saves_has_one_meaning(tmp_path):
    for number, options in enumerate(
        ({}, {"position_embedding": "sincos"}, {"mixer": {"convolution": False}})
    ):
        model = make((7, 7), **options)
        assert isinstance(model.config.mixer["convolution"], bool)
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder).double()
        assert loaded.config.mixer == model.config.mixer
        for side in (7, 8):
            x = torch.randn(1, 1, side, side, dtype=torch.float64)
            assert torch.equal(answer(loaded, x), answer(model, x))


def of_version_0_1(path, convolution_on="input", **model):
    config = load_config(path).to_dict()
    config["model"] |= model
    config["model"]["mixer"]["convolution_on"] = convolution_on
    del config["model"]["allow_blind"]
    path.write_text(yaml.safe_dump(config))


def test_runs_of_the_earlier_version_are_sampled_but_not_made_other_ones(recipe, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    path = recipe("run/config.yaml", model={"sample_size": 7, "mixer": {"window_size": "auto"}})
    config = load_config(path)
    of_version_0_1(path)
    then = load_run(run)
    assert then.model.allow_blind
    assert not then.model.resolved_mixer.convolution
    with torch.device("meta"):
        names = network.build_model(then).state_dict()
        assert not any("convolution" in name for name in names)
        assert any("convolution" in name for name in network.build_model(config).state_dict())
    assert loading.load_run is load_run
    with pytest.raises(ConfigError, match=r"begun by version 0.1, where .* take another"):
        trainer.build_run(config, {})
    path = recipe("run/config.yaml", output_dir=str(run))
    config = load_config(path)
    of_version_0_1(path)
    assert load_run(run).model.resolved_mixer == config.model.resolved_mixer
    trainer.build_run(config, {})  # not blind: it goes on
    of_version_0_1(path, convolution_on="attention")
    with pytest.raises(ConfigError, match=r"mixer.convolution_on: 'attention' -> 'input'"):
        trainer.build_run(config, {})
    with pytest.raises(ConfigError, match=r"convolution_on is 'attention', which version"):
        load_run(run)


# -- configs


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"mixer": {"name": "global"}},
            r"on 8 x 8 tokens the model is blind: it cannot tell the order of rows and columns "
            r"\(mixer global, .*\); set model.position_embedding sincos; for an ablation set model.allow_bl",
        ),
        (
            {"mixer": {"window_size": 4, "convolution": False}},
            "its rows and columns never meet, and it cannot .* remove model.mixer.convolution false, or set "
            "model.position_embedding sincos and model.mixer.window_size all",
        ),
        (
            {"mixer": {"window_size": "all", "kernel_size": [1, 3, 3]}, "sample_frames": 4},
            "it cannot tell the order of frames .* set model.position_embedding time",
        ),
    ],
)
def test_a_config_that_makes_a_blind_model_is_refused(recipe, model, message):
    base = yaml.safe_load(recipe().read_text())["model"]
    path = recipe(model=base | {"mixer": None} | model)
    with pytest.raises(ConfigError, match=message):
        load_config(path)
    assert load_config(recipe(model=base | model | {"allow_blind": True})).model.allow_blind


def test_windows_are_found_at_once_for_any_side(recipe):
    """As the definition says: the smallest divisor M of the side with K M >= side."""
    for side, kernel in itertools.product(range(1, 130), (1, 3, 5, 7)):
        expected = next(m for m in range(1, side + 1) if side % m == 0 and kernel * m >= side)
        assert MixerSpec(kernel_size=kernel).window((side, side)) == (expected, expected)
        least_two = next((m for m in range(2, side + 1) if side % m == 0 and 3 * m >= side), side)
        assert MixerSpec("swin").window((side,) * 2) == (least_two,) * 2
    begin = time.process_time()
    assert MixerSpec().window((10**18, 10**18 + 9)) == (5 * 10**17, 10**18 + 9)
    with pytest.raises(ValueError, match="nearest that do: 4, 5, 8"):
        BlockSpec(10**10, 7)
    quickstart = ROOT / "configs" / "quickstart.yaml"
    for key, value in (
        ("sample_size", 10**10),
        ("sample_size", [8, 10**12]),
        ("width", 10**10),
        ("mixer.kernel_size", 10**10 + 1),
    ):
        with pytest.raises(ConfigError, match=rf"model.{key} is .*, expected at most \d"):
            parse_arguments([f"--model.{key}", str(value)], quickstart)
    assert time.process_time() - begin < 5


def test_replacing_keeps_the_mixer_valid():
    mixer = MixerSpec(window_size=["auto", 4])
    assert resolve(mixer, (7, 7), "none") == replace(mixer, convolution=True)
    assert resolve(mixer, (7, 4), "sincos") == replace(mixer, convolution=False, window_size=["all", 4])
