"""The comparison of mixers and the transfer to larger images, from configs to pages."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml
from conftest import ROOT

from iwin_dit import IwinDiTTransformer2DModel
from iwin_dit.build import network
from iwin_dit.build.budget import Budget
from iwin_dit.build.classifier_network import LoadedClassifier
from iwin_dit.config.parse import load_config
from iwin_dit.data import digits
from iwin_dit.layers.specs import MIXERS, BlockSpec, MixerSpec
from iwin_dit.runtime.errors import ConfigError, DataError
from studies import ablate, compare, compare_report, connectivity, costs, digits_report, runs, transfer
from studies.judge import Judge

RECIPES = sorted((ROOT / "configs" / "compare").glob("*.yaml"))


def spec(**mixer):
    return BlockSpec(8, 2, mixer=MixerSpec(**mixer))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_rows_differ_in_one_line_and_are_built(path):
    lines, first = (p.read_text().splitlines() for p in (path, path.with_name("iwin.yaml")))
    assert len(lines) == len(first)
    assert sum(a != b for a, b in zip(lines, first, strict=True)) == (path.stem != "iwin")
    assert "output_dir" not in path.read_text()
    config = load_config(path)
    with torch.device("meta"):
        model = network.build_model(config)
        assert model(torch.empty(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.long)).sample.shape


def test_rows_have_every_mixer_and_one_budget(tmp_path):
    configs = {path: load_config(path) for path in RECIPES}
    assert {c.model.mixer.name for c in configs.values()} == {*MIXERS} - {"factorised"}
    models = [str(config.model) for config in configs.values()]
    assert len(set(models)) == len(models) >= 10
    compare.check_budgets(configs)
    other = tmp_path / "other.yaml"
    other.write_text(RECIPES[0].read_text().replace("batch_images: 32", "batch_images: 64"))
    with pytest.raises(ConfigError, match=r"other.yaml and .* differ in train"):
        compare.check_budgets(configs | {other: load_config(other)})


@pytest.mark.parametrize(
    ("mixer", "side", "expected"),
    [
        (dict(name="global"), 8, 1),
        (dict(window_size=4), 8, 2),  # G = 2 <= (K + 1) / 2
        (dict(window_size=4), 12, 3),  # G = 3 = K: all but pairs near opposite borders in two
        (dict(window_size=2), 8, 4),  # G = 4 > K
        (dict(window_size=2, kernel_size=7), 8, 2),  # G = 4 = (7 + 1) / 2
        (dict(window_size=4, convolution=False), 8, None),
    ],
)
def test_blocks_to_connect_in_closed_form(mixer, side, expected):
    assert connectivity.blocks_to_connect(spec(**mixer), (side, side)) == expected


def reach(seen_by, side, limit=20):
    """Blocks until each token of an axis has reached each other: by sets, from what it sees.

    On a square grid of windows it takes as many: what is reached is a product of what each axis reaches.
    """
    reached = [{i} for i in range(side)]
    for block in range(limit):
        reached = [set().union(*(reached[j] for j in seen_by(block, i))) for i in range(side)]
        if all(len(tokens) == side for tokens in reached):
            return block + 1
    return None


@pytest.mark.parametrize(("side", "window"), [(8, 4), (8, 2), (12, 4), (6, 6)])
def test_blocks_to_connect_of_windows_by_their_definition(side, window):
    def swin(block, i):
        shift = window // 2 if block % 2 and window < side else 0
        return [j for j in range(side) if (j - shift) // window == (i - shift) // window]

    def neighbors(block, i):
        first = min(max(i - size // 2, 0), side - size)
        return range(first, first + size)

    for name in ("swin", "swin_v2"):
        found = connectivity.blocks_to_connect(spec(name=name, window_size=window), (side, side))
        assert found == reach(swin, side)
    size = max(3, window - (window % 2 == 0))
    found = connectivity.blocks_to_connect(spec(name="neighborhood", window_size=window), (side, side))
    assert found == reach(neighbors, side)


def test_memory_of_a_step_holds_what_autograd_saves():
    for name in ("iwin", "swin"):
        config = load_config(ROOT / "configs" / "compare" / f"{name}.yaml")
        config = replace(config, model=replace(config.model, depth=2))
        found, saved = costs.training_memory(config), Budget(config).memory().activations
        assert saved < found < 1.6 * saved, name
    assert found == costs.training_memory(config)


def test_names_in_the_plot_stand_apart():
    places = compare_report.spread_out([0.1, 0.11, 0.12, 0.9, 0.99, 0.995], gap=0.05)
    assert all(b - a > 0.05 - 1e-9 for a, b in itertools.pairwise(places))
    assert places[0] == 0.1
    assert places[-1] <= 1
    assert compare_report.with_spread([1.0, 3.0], 2) == "2.00 ± 1.41"
    assert compare_report.with_spread([0.5], 1, scale=100) == "50.0"


def test_the_steps_that_are_logged_count(tmp_path):
    """A line that is being written, and one of an evaluation, do not."""
    lines = [{"step": 20, "images_per_second": 2.0}, {"step": 30, "images_per_second": 2.0}]
    lines += [{"step": 40, "evaluated": 30, "fd": 1.0}]
    (tmp_path / "run").mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 50, "images_per'
    (tmp_path / "run" / "log.jsonl").write_text(text)
    assert runs.Run(RECIPES[0], tmp_path / "run").step() == 30


def test_steps_are_timed_in_turn(monkeypatch):
    """By a clock that each step moves on: 1 s, and 3 s; the first round, which is slower, does not count."""
    now, calls = [0.0], []

    def step_of(seconds):
        def step():
            calls.append(seconds)
            now[0] += seconds * (10 if len(calls) <= 2 else 1)

        return step

    monkeypatch.setattr(costs, "training_step", step_of)
    monkeypatch.setattr(costs.time, "perf_counter", lambda: now[0])
    assert costs.train_in_turn({"fast": 1, "slow": 3}, rounds=3) == {"fast": 1, "slow": 3}
    assert calls == [1, 3] * 4


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import sys; print('error: no such device'); sys.exit(2)", "no such device"),
        ("", "it stopped at step 0"),
    ],
)
def test_why_a_run_was_not_trained(tmp_path, monkeypatch, program, reason):
    (tmp_path / "trainer.py").write_text(program)
    monkeypatch.setattr(runs, "TRAINER", tmp_path / "trainer.py")
    first, second = runs.runs_of(RECIPES[0], [0, 1], 5, tmp_path / "runs")
    failures = runs.train_all([first, second])
    assert list(failures) == [first.path, second.path]
    assert all(found.startswith(reason) for found in failures.values())


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import sys; print('error: no room'); sys.exit(3)", "no room"),
        ("raise RuntimeError", "the trainer ended with 1, see "),
    ],
)
def test_what_is_no_fault_of_the_config_stops(tmp_path, monkeypatch, program, reason):
    (tmp_path / "trainer.py").write_text(program)
    monkeypatch.setattr(runs, "TRAINER", tmp_path / "trainer.py")
    with pytest.raises(ConfigError, match=f"{RECIPES[0].stem}-seed-0 could not be trained: {reason}"):
        runs.train_all(runs.runs_of(RECIPES[0], [0, 1], 5, tmp_path / "runs"))


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory):
    """Fewer digits, an autoencoder of two steps."""
    patch, scans = pytest.MonkeyPatch(), digits.scans
    fewer = {"train": 60, "test": 30}
    patch.setattr(digits, "scans", lambda seed: {k: v[: fewer[k]] for k, v in scans(seed).items()})
    patch.setattr(digits, "train_vae", partial(digits.train_vae, steps=2))
    root = tmp_path_factory.mktemp("data") / "digits"
    digits.prepare(root)
    patch.undo()
    return root


@pytest.fixture
def setup(digits_folder, tmp_path, monkeypatch):
    """Tiny recipes, a classifier with random weights, and ``call(tool, *arguments)``."""
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    for path in RECIPES:
        recipe = yaml.safe_load(path.read_text())
        recipe["data"]["path"] = str(digits_folder)
        recipe["model"] |= {"depth": 2, "width": 16, "heads": 2}
        recipe["train"] |= {"max_steps": 40, "batch_images": 8, "log_every_steps": 1}
        recipe["sample"]["num_inference_steps"] = 2
        (recipes / path.name).write_text(yaml.safe_dump(recipe))
    torch.manual_seed(0)
    options = {
        "patch_size": 4,
        "embed_dim": 8,
        "depths": [1],
        "num_heads": [1],
        "window_size": 4,
        "img_size": 32,
    }
    network = timm.create_model("iwin_tiny_patch4_window7_224", num_classes=10, **options)
    loaded = LoadedClassifier(network, (32, 32), (0.5,) * 3, (0.5,) * 3, [str(i) for i in range(10)], "abc")
    monkeypatch.setattr(digits_report, "load_classifier", lambda run: loaded)
    monkeypatch.setattr(compare, "ROUNDS", 1)
    monkeypatch.setattr(transfer, "CONFIGS", recipes)
    monkeypatch.setattr(runs, "POLL_SECONDS", 0.02)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "classifier").mkdir()

    def call(tool, *arguments):
        common = ["--num-images", "20", "--classifier", tmp_path / "classifier", "--seeds", "0"]
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, [*arguments, *common])])
        tool.main()

    call.recipes = recipes
    return call


def steps_of(folder):
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_compare_is_interrupted_and_goes_on(setup, tmp_path, monkeypatch, capsys):
    out, folder = tmp_path / "page" / "compare.md", tmp_path / "runs"
    broken = tmp_path / "broken.yaml"  # a row that cannot be trained here
    broken.write_text((setup.recipes / "iwin.yaml").read_text().replace("window_size: 4", "window_size: 0"))
    recipes = [setup.recipes / "iwin.yaml", setup.recipes / "global_sincos.yaml", broken]
    arguments = (compare, "--configs", *recipes, "--out", out, "--runs", folder)

    step = runs.Run.step

    def interrupt(run):
        found = step(run)
        if 3 <= found < 40:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            setup(*arguments)
    checkpoint = max((folder / "iwin-seed-0" / "checkpoints").glob("step-*"))
    saved, stopped = checkpoint.stat().st_mtime_ns, int(checkpoint.name.removeprefix("step-"))
    assert 3 <= stopped < 40
    assert not out.exists()

    setup(*arguments)
    assert checkpoint.stat().st_mtime_ns == saved  # gone on from, not begun anew
    for name in ("iwin", "global_sincos"):
        assert steps_of(folder / f"{name}-seed-0") == list(range(1, 41))
    page = out.read_text()
    header, _, *rows = [line for line in page.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [len(row) for row in cells] == [len(compare_report.COLUMNS)] * 3
    assert all(name in header for name in compare_report.COLUMNS)
    assert cells[2][0] == "broken"
    assert cells[2][1].startswith("not trained: model: mixer.window_size is 0")
    by_name = {row[0]: row for row in cells[:2]}
    assert set(by_name) == {"iwin", "global_sincos"}
    for name, row in by_name.items():
        assert all(row), name
        assert float(row[1]) > 0
        assert int(row[6].replace(",", "")) == Budget(load_config(setup.recipes / f"{name}.yaml")).parameters
    assert (by_name["iwin"][-1], by_name["global_sincos"][-1]) == ("2", "1")
    assert float(cells[0][1]) <= float(cells[1][1])
    assert (out.parent / "compare.png").stat().st_size > 1000
    assert (out.parent / "compare_samples.png").stat().st_size > 1000

    def times():
        kept = [*folder.glob("*/log.jsonl"), *folder.glob("*/compare.json"), *folder.glob("*/pipeline/*")]
        return {path: path.stat().st_mtime_ns for path in kept}

    before = times()
    monkeypatch.setattr(runs, "_train", None)  # nothing is trained
    monkeypatch.setattr(Judge, "of_samples", None)  # nor judged
    setup(*arguments)
    assert times() == before
    assert len(before) >= 8
    assert out.read_text().count("broken") == page.count("broken")
    with pytest.raises(ConfigError, match="was trained to step 40, more than 20"):
        setup(*arguments, "--steps", 20)


def test_what_cannot_be_compared_is_said(setup, tmp_path, digits_folder):
    with pytest.raises(ConfigError, match="--num-images is 25, expected a multiple of 10"):
        Judge(digits_folder, str(tmp_path / "classifier"), 25)
    with pytest.raises(DataError, match=r"accelerate launch train_classifier.py makes both"):
        Judge(digits_folder, str(tmp_path / "nothing"), 20)
    with pytest.raises(ConfigError, match="does not exist; expected recipes"):
        setup(compare, "--configs", tmp_path / "nothing.yaml")
    with pytest.raises(ConfigError, match=f"--configs has {RECIPES[0].stem} twice"):
        setup(compare, "--configs", RECIPES[0], RECIPES[0])
    with pytest.raises(ConfigError, match="--tuning-steps is 0"):
        setup(transfer, "--tuning-steps", "0")
    other = tmp_path / "wide.yaml"
    text = RECIPES[0].read_text()
    assert "width: 128" in text
    other.write_text(text.replace("width: 128", "width: 64"))
    rows = [compare.Row(path, runs.runs_of(path, [0], 5, tmp_path)) for path in (RECIPES[0], other)]
    with pytest.raises(ConfigError, match="differ in the model's size"):
        compare.check_budgets(compare.valid_configs(rows))
    (tmp_path / "held").mkdir()
    held = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from iwin_dit.runtime.lock import hold\n"
            "held = hold(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()",
            tmp_path / "held",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    assert held.stdout.readline()
    with pytest.raises(ConfigError, match=f"is in use, held by pid {held.pid}"):
        runs.hold_runs(tmp_path / "held")
    held.communicate()
    with pytest.raises(ConfigError, match="--models sea is unknown, expected some of iwin"):
        setup(transfer, "--models", "sea")


def test_the_judge_knows_digits_at_every_size(setup, tmp_path, digits_folder):
    judge = Judge(digits_folder, str(tmp_path / "classifier"), 30)
    noise = torch.rand(30, 3, 64, 64) * 2 - 1
    for side in transfer.SIDES:
        assert judge.held_out(side).shape == (30, 3, side, side)
        assert judge.of_real(side)["recognised"] > 0.6
    assert judge(noise, judge.labels)["recognised"] < 0.4
    assert judge(noise, judge.labels)["fd"] > judge.of_real(64)["fd"]


def test_the_distance_is_of_looks_not_of_how_often_a_digit_occurs(setup, digits_folder):
    """Of real digits and of the same in another order, or with one digit three times as often."""
    known, known_labels, _ = digits_report.read_images(digits_folder / "train")
    real, labels, _ = digits_report.read_images(digits_folder / "test")
    distance = digits_report.Distance("classifier", real, labels)
    expected = distance(known, known_labels)
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))
    assert distance(known[order], known_labels[order]) == pytest.approx(expected, rel=0.3)
    often = torch.cat([torch.arange(len(known)), *2 * [(known_labels == 3).nonzero().flatten()]])
    assert distance(known[often], known_labels[often]) == pytest.approx(expected, rel=0.3)
    one = distance(known[known_labels == 3].repeat(10, 1, 1, 1), known_labels)  # threes alone
    assert one > 2 * expected


def test_halves_are_apart_and_have_as_many_of_each():
    labels = torch.tensor([0] * 7 + [1] * 4 + [2] * 2)
    counts = {0: 3, 1: 2, 2: 2}
    one, other = digits_report.halves(labels, counts, 0)
    for half in (one, other):
        assert torch.bincount(labels[half]).tolist() == [3, 2, 2]
    shared = set(one.tolist()) & set(other.tolist())
    assert {int(labels[i]) for i in shared} == {2}, "too few to be apart"
    assert [half.tolist() for half in digits_report.halves(labels, counts, 0)] == [
        one.tolist(),
        other.tolist(),
    ]
    assert digits_report.halves(labels, counts, 1)[0].tolist() != one.tolist()


@pytest.mark.slow
def test_transfer_writes_tables_and_a_picture(setup, tmp_path, monkeypatch, run_here):
    monkeypatch.setattr(runs, "_train", lambda run, report: run_here(runs.TRAINER, *run.arguments) and None)
    out = tmp_path / "page" / "transfer.md"
    arguments = ["--models", "iwin", "--steps", 3, "--tuning-steps", 2, "--out", out]
    arguments += ["--compared", tmp_path / "runs", "--runs", tmp_path / "tuned"]
    setup(transfer, *arguments)
    page = out.read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"
    ]
    names = [row[0] for row in rows]
    assert names.count("iwin") == names.count("iwin, window auto") == 2
    for row in rows:
        if row[0].startswith("iwin"):
            assert len(row) == 5
            assert all(float(cell) >= 0 for cell in row[1:])
    figures = {path.name for path in (tmp_path / "tuned" / "figures").glob("*-iwin-seed-0-*")}
    figures = {re.sub("-from-[0-9a-f]{8}", "", name) for name in figures}
    judged = ("runs", 32, 4), ("runs", 48, 4), ("runs", 64, 4), ("runs", 64, 8), ("tuned", 64, 4)
    assert figures == {f"{of}-iwin-seed-0-{side}px-window-{m}.json" for of, side, m in judged}
    (folder,) = (tmp_path / "tuned").glob("iwin-auto-seed-0-from-*")
    tuned = load_config(folder / "config.yaml").model
    assert tuned.grid == (16, 16)
    assert tuned.mixer.window(tuned.grid) == (8, 8)
    assert (out.parent / "transfer.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("early", "late", "words"), [(8, 2, "about 450"), (3, 2, "at most 300"), (8, 5, "more than 600")]
)
def test_the_steps_to_a_distance_are_read_off_a_line(early, late, words):
    """From 8 to 2 is two halvings, and to 4 is one of them."""

    def row(steps, fd):
        run = SimpleNamespace(config=SimpleNamespace(train=SimpleNamespace(max_steps=steps)))
        return ablate.Row("row", [run], [{"FD": fd - 0.5}, {"FD": fd + 0.5}])

    assert ablate.steps_to(4.0, row(300, early), row(600, late)) == words


@pytest.mark.slow
def test_ablate_judges_half_of_the_steps_and_the_end(setup, tmp_path, monkeypatch):
    levers = {"baseline": {}, "head inside": {"model.base_block": 1}}
    monkeypatch.setattr(ablate, "LEVERS", levers)
    monkeypatch.setattr(ablate, "RECIPE", setup.recipes / "iwin.yaml")
    drawn, judge = [], Judge.of_samples

    def judged(self, *arguments, **options):
        drawn.append(dict(options))
        return judge(self, *arguments, **options)

    monkeypatch.setattr(Judge, "of_samples", judged)
    out, folder = tmp_path / "page" / "ablate.md", tmp_path / "runs"
    arguments = (ablate, "--levers", *levers, "--steps", 4, "--out", out, "--runs", folder)
    setup(*arguments)
    page = out.read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    header, by_name = rows[0], {row[0]: row for row in rows[1:]}
    assert header[1:4] == ["FD after 2 steps", "FD after 4", "steps to the baseline's FD"]
    assert set(by_name) == {*levers, "guidance", "none", *ablate.KINDS}
    kept = json.loads(out.with_suffix(".json").read_text())
    for name, row in ((name, by_name[name]) for name in levers):
        figures = kept[f"{name.replace(' ', '_')}-seed-0, 4 steps"]["found"]
        assert float(row[2]) == pytest.approx(figures["FD"], abs=0.01)
        best = min(figures[f"guidance_scale {scale}"] for scale in ablate.SCALES)
        assert float(row[4].partition(" ")[0]) == pytest.approx(best, abs=0.01)
        assert bool(row[5]) == (name == "head inside"), "internal guidance needs a head inside"
    compared = drawn[-1 - sum(map(len, ablate.KINDS.values())) :]  # of the last run, "head inside"
    guides = [options.pop("guide") for options in compared if "guide" in options]
    without = [{k: v for k, v in o.items() if k != "guide"} for of in ablate.KINDS.values() for o in of]
    assert compared == [{}, *without]
    assert len(guides) == 2
    assert all(isinstance(guide, IwinDiTTransformer2DModel) for guide in guides)
    assert by_name["internal guidance"][2].startswith("internal_guidance ")
    assert "* head inside: `model.base_block 1`" in page
    monkeypatch.setattr(runs, "_train", None)  # nothing is trained
    monkeypatch.setattr(Judge, "of_samples", None)  # nor judged
    setup(*arguments)
    assert out.read_text().count("head inside") == page.count("head inside")
    setup(ablate, "--levers", "baseline", *arguments[-6:])
    assert "Kinds of guidance" not in out.read_text()
