"""Token dropping in training: one token of each group, by a loop over groups, and a model without."""

import itertools
import json

import pytest
import torch
from conftest import (
    assert_equal,
    assert_two_processes_train_the_same,
    give_zeros_noise,
    make_model,
    make_vae,
    read_checkpoint,
)
from torch._dynamo.testing import CompileCounterWithBackend

from iwin_dit import IwinDiTPipeline
from iwin_dit.build.budget import Budget
from iwin_dit.build.network import build_model
from iwin_dit.config.alignment import AlignmentConfig
from iwin_dit.config.rules import check
from iwin_dit.config.schema import Config, ModelConfig
from iwin_dit.diffusion.flow_matching import FlowMatching
from iwin_dit.diffusion.guidance import Guidance
from iwin_dit.layers.sparse import Kept, SparseMiddle, Tokens, low_bits
from iwin_dit.models.transformer import IwinDiTTransformer3DModel
from iwin_dit.pipelines.trust import check_model_folder
from iwin_dit.runtime.errors import CheckpointError, ConfigError

GRIDS = [(4, 6), (4, 3), (2, 4, 6), (3, 4, 4), (1, 2, 2)]


def kept_places(choice, grid):
    """The coordinates of the kept tokens of one image, group by group, and the grid that they make."""
    groups = [2 if side % 2 == 0 else 1 for side in grid]
    places = list(itertools.product(*map(range, groups)))
    place = places[int(choice * len(places))]
    half = [side // group for side, group in zip(grid, groups, strict=True)]
    return half, {
        corner: tuple(c * g + p for c, g, p in zip(corner, groups, place, strict=True))
        for corner in itertools.product(*map(range, half))
    }


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_one_token_of_each_group_goes_there_and_back(grid):
    """By a loop over the groups, forward and gradient; the middle scales tokens and adds their mean."""
    torch.manual_seed(0)
    choice, skips = torch.tensor([0.0, 0.3, 0.7, 0.99]), torch.tensor([False, False, True, False])
    module = give_zeros_noise(SparseMiddle(8)).double()
    x = torch.randn(4, *grid, 8, dtype=torch.float64, requires_grad=True)

    def middle(tokens):
        axes = tuple(range(1, tokens.x.ndim - 1))
        return tokens._replace(x=3 * tokens.x + tokens.x.mean(axes, keepdim=True))

    found = module(Tokens(x), middle, choice, skips, torch.float64).x

    images = []
    for image, number, skipped in zip(x, choice.tolist(), skips.tolist(), strict=True):
        g = module.mask.expand_as(image).clone()
        _, places = kept_places(number, grid)
        if not skipped:
            mean = torch.stack([image[place] for place in places.values()]).mean(0)
            for place in places.values():
                g[place] = 3 * image[place] + mean
        images.append(torch.cat([image, g], -1) @ module.fuse.weight.T + module.fuse.bias)
    expected = torch.stack(images)
    torch.testing.assert_close(found, expected)
    cotangent, wanted = torch.randn_like(expected), (x, module.mask, module.fuse.weight)
    gradients = [torch.autograd.grad(output, wanted, cotangent) for output in (found, expected)]
    torch.testing.assert_close(*gradients)


def model_and_inputs(rank=2, **options):
    options = {"num_layers": 4, "dense_blocks": (1, 1), "mixer": {"window_size": 2}} | options
    if rank == 2:
        model = make_model(**options)
    else:
        sizes = dict(sample_frames=2, sample_size=8, in_channels=4, num_classes=3)
        heads = dict(num_attention_heads=2, attention_head_dim=8)
        torch.manual_seed(0)
        model = give_zeros_noise(IwinDiTTransformer3DModel(**sizes, **heads, **options)).eval()
    x = torch.randn(2, 4, *model.latent_size, generator=torch.Generator().manual_seed(1))
    return model, (x, torch.tensor([300.0, 700.0]), torch.tensor([0, 3]))


CHOICE = torch.tensor([0.1, 0.6])


@pytest.mark.parametrize("value_residual", [False, True])
@pytest.mark.parametrize(
    ("rank", "mixer", "positions"),
    [
        (2, {"name": "iwin", "window_size": 2}, "none"),
        (2, {"name": "iwin", "window_size": "auto"}, "sincos"),
        (2, {"name": "global"}, "rope"),
        (2, {"name": "swin", "window_size": 4}, "sincos+rope"),
        (2, {"name": "neighborhood", "window_size": 3}, "none"),
        (3, {"name": "iwin", "window_size": 2}, "time"),
    ],
)
def test_the_middle_is_a_model_of_a_coarser_grid(rank, mixer, positions, value_residual):
    """Image by image: blocks of the middle on the tokens that a loop has gathered, with their own angles."""
    options = dict(mixer=mixer, position_embedding=positions, value_residual=value_residual)
    model, inputs = model_and_inputs(rank, **options)
    found = model(*inputs, kept=CHOICE).sample
    seen = {}

    def remember(name):
        def hook(module, arguments, output):
            _, condition, rope, values = arguments
            seen[name] = output if isinstance(output, tuple) else (output, values), condition, rope

        return hook

    for i, block in enumerate(model.blocks):
        block.register_forward_hook(remember(i))
    with torch.no_grad():
        model(*inputs)
    ((x, values), condition, rope) = seen[0]
    grid = tuple(x.shape[1:-1])

    middles = []
    for k, choice in enumerate(CHOICE.tolist()):
        half, places = kept_places(choice, grid)

        def gather(tokens, places=places, half=half):
            return torch.stack([tokens[place] for place in places.values()]).view(*half, -1)

        y = gather(x[k])[None]
        mine = None if rope is None else gather(rope)
        first = None if values is None else gather(values[k])[None]
        for i in (1, 2):
            y = model.blocks[i](y, condition[k : k + 1], mine, first)
        full = model.sparse.mask.expand_as(x[k]).clone()
        for corner, place in places.items():
            full[place] = y[(0, *corner)]
        middles.append(full)
    y = model.sparse.fuse(torch.cat([x, torch.stack(middles)], -1))
    whole = None if rope is None else seen[3][2]
    y = model.blocks[3](y, condition, whole, values)
    torch.testing.assert_close(found, model._predict(model, y, condition), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rank", [2, 3])
def test_all_tokens_and_a_fusion_of_the_middle_alone_are_a_model_without(rank):
    model, inputs = model_and_inputs(rank)
    plain, _ = model_and_inputs(rank, dense_blocks=None)
    state = {name: t for name, t in model.state_dict().items() if not name.startswith("sparse")}
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    assert not torch.allclose(model(*inputs).sample, plain(*inputs).sample)
    with torch.no_grad():
        model.sparse.fuse.weight.copy_(torch.eye(16, 32).roll(16, 1))
        model.sparse.fuse.bias.zero_()
    torch.testing.assert_close(model(*inputs).sample, plain(*inputs).sample)
    without = torch.zeros(2, dtype=torch.bool)
    torch.testing.assert_close(model(*inputs, skip_middle=without).sample, plain(*inputs).sample)


def test_a_middle_that_is_left_out_runs_no_block():
    model, inputs = model_and_inputs(base_block=1)
    expected = model(*inputs, skip_middle=torch.tensor([True, True]), with_base=True)
    for block in model.blocks[1:3]:
        block.forward = None  # to be called would be an error
    output = model(*inputs, skip_middle=True, with_base=True)
    torch.testing.assert_close(output.sample, expected.sample)
    torch.testing.assert_close(output.base, expected.base)


@pytest.mark.parametrize("base_block", [1, 5])
def test_a_head_inside_sees_all_tokens(base_block):
    model, inputs = model_and_inputs(num_layers=6, dense_blocks=(1, 2), base_block=base_block)
    output = model.train()(*inputs, kept=CHOICE)
    assert output.base.shape == output.sample.shape


def test_low_bits_are_uniform_and_tell_nothing_of_the_time():
    u = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0))
    choice, drop = low_bits(u)
    for numbers in (choice, drop):
        assert 0 <= numbers.min() <= numbers.max() < 1
        torch.testing.assert_close(numbers.mean(), torch.tensor(0.5), atol=2e-3, rtol=0)
        torch.testing.assert_close(numbers.var(), torch.tensor(1 / 12), atol=2e-3, rtol=0)
    pairs = torch.corrcoef(torch.stack([u, choice, drop, (choice * 8).floor()]))
    assert (pairs[0, 1:].abs() < 5e-3).all()
    assert pairs[2, 3].abs() < 5e-3, "whether the middle is left out is apart from which token is kept"
    assert ((drop < 0.05).float().mean() - 0.05).abs() < 2e-3


def test_gradient_checkpointing_changes_nothing():
    model, inputs = model_and_inputs(value_residual=True)
    model.train()

    def gradients():
        model.zero_grad()
        output = model(*inputs, kept=CHOICE, skip_middle=torch.tensor([True, False]))
        output.sample.square().sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = gradients()
    assert all(gradient is not None for gradient in expected.values()), "or processes would wait for it"
    model.enable_gradient_checkpointing()
    torch.testing.assert_close(gradients(), expected)


def test_a_compiled_block_has_one_graph_for_each_grid():
    model, inputs = model_and_inputs()
    expected = model(*inputs, kept=CHOICE).sample
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    for block in model.blocks:
        block.compile(dynamic=False, backend=counter)
    for _ in range(3):
        torch.testing.assert_close(model(*inputs, kept=CHOICE).sample, expected)
    assert counter.frame_count == 2
    torch._dynamo.reset()


def draw(pipeline, **options):
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return pipeline([0, 1], latents=noise, num_inference_steps=3, output_type="latent", **options).images


@torch.no_grad()
def test_path_drop_guidance_follows_its_equation():
    """Euler's steps with w v(x, c) + (1 - w) v(x, no class, no middle) written out."""
    model, (x, *_) = model_and_inputs(prediction_type="flow_prediction")
    pipeline = IwinDiTPipeline(model, make_vae(), FlowMatching().scheduler())
    pipeline.set_progress_bar_config(disable=True)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for i in range(3):
        times = torch.full((2,), 1000 * (1 - i / 3))
        better = model(x, times, torch.tensor([0, 1])).sample
        worse = model(x, times, torch.tensor([3, 3]), skip_middle=torch.tensor([True, True])).sample
        x = x - (2.5 * better - 1.5 * worse) / 3
    found = draw(pipeline, guidance_scale=2.5, path_drop=True)
    torch.testing.assert_close(found, x, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, draw(pipeline, guidance_scale=2.5))
    with pytest.raises(
        ValueError, match="path_drop leaves out blocks in the middle, but a guide is the worse"
    ):
        draw(pipeline, path_drop=True, guide=model)
    pipeline = IwinDiTPipeline(make_model(prediction_type="flow_prediction"), make_vae(), pipeline.scheduler)
    with pytest.raises(ValueError, match=r"path_drop leaves out .*, but the model has none \(dense_blocks\)"):
        draw(pipeline, path_drop=True)


def test_path_drop_guidance_and_guidance_from_inside_go_together():
    """Internal guidance comes first, on both."""

    class Model:
        def __call__(self, latents, timestep, labels, with_base, skip_middle=False):
            value = 1.0 + labels.float() + 10 * skip_middle
            sample = value.view(-1, 1, 1, 1).expand_as(latents)
            return type("Output", (), {"sample": sample, "base": 0.5 * sample})

    guidance = Guidance(3.0, internal_scale=1.5, path_drop=True)
    x = torch.zeros(1, 4, 2, 2)
    found = guidance.predict(Model(), x, torch.tensor(500.0), torch.tensor([2]), 3, 0.5)
    better, worse = 1.25 * 3, 1.25 * 14
    torch.testing.assert_close(found, torch.full_like(x, worse + 3 * (better - worse)))


SMALL = dict(depth=4, width=32, heads=2, patch_size=1, sample_size=8, in_channels=4, num_classes=3)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            dict(dense_blocks=(2, 2)),
            r"dense_blocks is \[2, 2\], expected two numbers from 1 that leave some of 4",
        ),
        (dict(dense_blocks=(0, 1)), "model.dense_blocks is .*, expected a number above 0"),
        (
            dict(dense_blocks=(1, 1), base_block=2),
            "base_block 2 stands between .*; take at most 1 or at least 4",
        ),
        (
            dict(dense_blocks=(1, 1), sample_size=7),
            "thins tokens out along even sides, 7 x 7 tokens have none",
        ),
        (dict(dense_from_step=10), "model.dense_from_step is 10, but is not read without model.dense_blocks"),
        (dict(middle_dropout=0.2), "model.middle_dropout is 0.2, but is not read without model.dense_blocks"),
        (
            dict(dense_blocks=(1, 1), middle_dropout=0.0),
            "model.middle_dropout is 0.0, expected a number above 0",
        ),
    ],
)
def test_what_does_not_fit_is_refused(model, message):
    with pytest.raises(ConfigError, match=message):
        check(Config(model=ModelConfig(**SMALL | model)))


def test_the_budget_counts_the_tokens_that_blocks_see():
    """Blocks on a quarter of the tokens take a quarter of their operations, and keep a quarter."""

    def budget(**options):
        return Budget(Config(model=ModelConfig(**SMALL | dict(depth=6) | options)))

    plain, sparse = budget(), budget(dense_blocks=(1, 1))
    fusion = 64 * 2 * 32 * 32
    blocks = plain.multiply_adds - budget(depth=2).multiply_adds  # four of them
    assert sparse.multiply_adds == plain.multiply_adds + fusion
    saved = 1 - (sparse.training_flops / 6 - fusion - budget(depth=2).multiply_adds) / blocks
    assert 0.7 < saved < 0.8, "windows of other sizes take other numbers of operations"
    late = budget(dense_blocks=(1, 1), dense_from_step=1)
    assert sparse.memory().activations < 0.6 * plain.memory().activations < late.memory().activations


def test_the_last_steps_see_all_tokens(recipe, train_here, tmp_path):
    """Which steps do is a function of the step: a resumed run ends with the bits of the whole one."""
    model = dict(depth=3, dense_blocks=[1, 1], middle_dropout=0.3)
    train = dict(max_steps=4, save_every_steps=1, keep_checkpoints=9)
    runs = {}
    for name, dense_from in {"never": None, "late": 2, "always": 0}.items():
        config = recipe(model=model | {"dense_from_step": dense_from}, train=train)
        runs[name] = tmp_path / name
        code, output = train_here("--config", config, "--output_dir", runs[name])
        assert code == 0, output
    never, late, always = (
        [read_checkpoint(run, step)["model"] for step in range(1, 5)] for run in runs.values()
    )
    name = "blocks.1.mlp.down.weight"
    assert torch.equal(never[1][name], late[1][name])
    assert not torch.equal(never[2][name], late[2][name])
    assert not torch.equal(never[1][name], always[1][name])


LEARNS = dict(model=dict(depth=3, dense_blocks=[1, 1], middle_dropout=0.3, value_residual=True))
LEARNS |= dict(train={"max_steps": 3}, optimizer={"learning_rate": 1e-4, "eps": 1e-5})


def test_micro_batches_train_the_same(recipe, train_here, tmp_path):
    """Which tokens are dropped belongs to the image, not to its micro-batch."""
    config = recipe(**LEARNS)
    for images in (8, 2):
        more = ("--output_dir", tmp_path / str(images), "--train.micro_batch", images)
        code, output = train_here("--config", config, *more)
        assert code == 0, output
    whole, split = (read_checkpoint(tmp_path / str(images), 3) for images in (8, 2))
    assert_equal(split, whole, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_two_processes_train_the_same(sharding, recipe, tmp_path):
    config = recipe(**LEARNS)
    assert_two_processes_train_the_same(config, sharding, tmp_path)


def test_a_pipeline_draws_by_the_command(recipe, train_here, run_here, refused_here, tmp_path):
    model, train = dict(depth=3, dense_blocks=[1, 1]), dict(max_steps=2)
    code, output = train_here("--config", recipe(model=model, train=train, sample={"path_drop": True}))
    assert code == 0, output
    arguments = ("sample.py", "--checkpoint", tmp_path / "run" / "pipeline", "--class", 1, "--num-images", 1)
    pictures = []
    for option in ((), ("--path-drop",), ("--no-path-drop",)):
        out = tmp_path / f"{len(pictures)}.png"
        run_here(*arguments, *option, "--out", out)
        pictures.append((json.loads(out.with_suffix(".json").read_text())["path_drop"], out.read_bytes()))
    assert [drops for drops, _ in pictures] == [True, True, False]
    assert pictures[0][1] == pictures[1][1] != pictures[2][1]


def test_the_network_has_three_more_tensors():
    """What a recipe alone says is not of the network."""
    plain, sparse = (
        build_model(Config(model=ModelConfig(**SMALL, **options)))
        for options in ({}, dict(dense_blocks=(1, 1), middle_dropout=0.2, dense_from_step=7))
    )
    state = sparse.state_dict()
    assert state.keys() - plain.state_dict().keys() == {
        "sparse.mask",
        "sparse.fuse.weight",
        "sparse.fuse.bias",
    }
    assert "middle_dropout" not in sparse.config
    assert Kept(torch.tensor([0.9]), (4, 4)).chosen.sum() == 1


def test_a_model_without_refuses_to_drop():
    model, inputs = model_and_inputs(dense_blocks=None)
    for options in (dict(kept=CHOICE), dict(skip_middle=True)):
        with pytest.raises(ValueError, match="kept and skip_middle are for models with dense_blocks"):
            model(*inputs, **options)


@pytest.mark.parametrize("found", ["ab", [1], [1, 10**6], [0, 1], [1.5, 1], {"1": 1}, True])
def test_odd_configs_of_strangers_are_refused(found, tmp_path):
    model, _ = model_and_inputs()
    model.save_pretrained(tmp_path)
    assert check_model_folder(tmp_path) is type(model)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dense_blocks": found}))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        check_model_folder(tmp_path)


def test_a_teacher_has_all_tokens():
    model = ModelConfig(**SMALL, dense_blocks=(1, 1))
    with pytest.raises(ConfigError, match=r"teacher self and model.dense_blocks exclude each other"):
        check(Config(model=model, alignment=AlignmentConfig(teacher="self")))
