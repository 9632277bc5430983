"""The example that measures receptive fields agrees with what the index arithmetic of windows tells."""

import argparse
import sys

import pytest
import torch
from conftest import ROOT

sys.path.append(str(ROOT / "examples"))
import receptive_field as example

from iwin_dit.runtime.errors import ConfigError

SIDE, WINDOW = 12, 4  # three groups per axis, as many as the convolution's side


def connections(kind, depth):
    """True where output token i depends on input token j, by index arithmetic: (N, N)."""
    place = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE))
    total = torch.eye(SIDE**2)
    for block in range(depth):
        if kind == "iwin":
            window = place % (SIDE // WINDOW)
            near = ((place[:, None] - place[None]).abs() <= 1).all(-1)
        else:
            shift = WINDOW // 2 if block % 2 else 0
            window = (place - shift).div(WINDOW, rounding_mode="floor")
            near = torch.eye(SIDE**2, dtype=torch.bool)
        step = (window[:, None] == window[None]).all(-1) | near
        total = (step.float() @ total).bool().float()
    return total.bool()


@pytest.mark.parametrize("kind", ["iwin", "swin"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_tokens_reached_are_those_of_the_windows(kind, depth):
    tokens = [(row, column) for row in range(SIDE) for column in range(SIDE)]
    stack = example.build(kind, depth, SIDE, WINDOW, seed=0)
    found = example.reached(example.influence(stack, SIDE, tokens, seed=0)).flatten(1)
    assert torch.equal(found, connections(kind, depth))


def measured(kind, depth, side=SIDE, window=WINDOW):
    options = dict(side=side, window=window, token=(1, 2), inputs=1, initialisations=1, seed=0)
    return example.measure(kind, depth, argparse.Namespace(**options))


@pytest.mark.parametrize(("side", "window"), [(12, 4), (15, 5)])
def test_two_iwin_blocks_connect_nearly_all_tokens_and_three_all(side, window):
    assert 97 <= round(100 * measured("iwin", 2, side, window)[2]) <= 99
    assert measured("iwin", 3, side, window)[2] == 1
    assert measured("swin", 3, side, window)[2] < 0.75


def test_the_map_is_the_mean_gradient_of_the_token():
    sizes, part, _ = measured("iwin", 1)
    assert sizes.shape == (SIDE, SIDE)
    assert sizes.argmax() == 1 * SIDE + 2  # the residual connection
    assert part == connections("iwin", 1)[1 * SIDE + 2].double().mean()


def test_the_picture_and_the_table(tmp_path, capsys):
    command = ["--side", "6", "--window", "2", "--token", "1", "2", "--inputs", "1", "--initialisations", "1"]
    example.main([*command, "--out", str(tmp_path / "field.png")])
    assert (tmp_path / "field.png").read_bytes().startswith(b"\x89PNG")
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--window", "8"], "--window is 8, expected a proper divisor of the side, 21"),
        (["--token", "3", "21"], r"--token is \(3, 21\), expected 0 to 20"),
        (["--blocks", "0"], "--blocks is 0, expected at least 1"),
        (["--window", "x"], "invalid int value: 'x'; see --help"),
    ],
)
def test_wrong_options_are_told(options, message):
    with pytest.raises(ConfigError, match=message):
        example.main(options)
