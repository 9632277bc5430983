"""Recipes: text that is no YAML, values of every wrong type and size, overrides of the command line."""

import copy
from pathlib import Path

import yaml
from conftest import ROOT
from mutate import ODD, fuzz, mutate_bytes, mutate_json, mutate_text

from iwin_dit.build.budget import Budget
from iwin_dit.build.describe import describe_classifier, describe_run
from iwin_dit.config.classifier import ClassifierConfig
from iwin_dit.config.parse import parse_arguments
from iwin_dit.config.schema import Config
from iwin_dit.config.types import types_of

SIGNS = """{ } [ ] : - , | > % @ ` " ' # ~ &a *a !!int !!float !!bool !!null !!set !!omap !!binary !x
    0b_ 0o9 0x
    1_0 .inf -.inf .nan 1e999 2001-99-99 2001-01-01 1:30 010 null '\\x00' "\\ud800" !!timestamp"""
PIECES = [
    *(f"{sign}{space}" for sign in SIGNS.split() for space in ("", " ")),
    *("!!python/object:os.system ", "%YAML 1.1\n", "<<: ", "<<: *a", "? ", "[1]: 2", "{a: b}: c"),
    *("\t", "\n", "  ", "\x07", "\x85", "\ufeff", "\u2028", "---\n", "...\n", "9" * 30, "9" * 5000),
    *("[" * 30, "[" * 1200, "{a: " * 300),
]
KINDS = {
    Config: [*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs" / "compare").glob("*.yaml")],
    ClassifierConfig: [*(ROOT / "configs" / "classifier").glob("*.yaml")],
}
RECIPES = [(kind, path.read_text()) for kind, paths in KINDS.items() for path in sorted(paths)]
RECIPES = [(kind, text, yaml.safe_load(text)) for kind, text in RECIPES]


def all_keys(kind, above=()):
    for name, hint in types_of(kind).items():
        yield (*above, name)
        if hasattr(hint, "__dataclass_fields__"):
            yield from all_keys(hint, (*above, name))


KEYS = {kind: list(all_keys(kind)) for kind in KINDS}


def with_odd_values(rng, kind, recipe):
    """One to three keys, known or nearly so, with values that are odd."""
    recipe = copy.deepcopy(recipe)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        *sections, name = rng.choice(KEYS[kind])
        node = recipe
        for section in sections:
            if not isinstance(node.get(section), dict):
                node[section] = {}
            node = node[section]
        kept = rng.random()
        if kept < 0.1:
            node.pop(name, None)
        else:
            node[name + ("s" if kept > 0.97 else "")] = copy.deepcopy(rng.choice(ODD))
    return recipe


def dumped(value):
    return yaml.safe_dump(value, allow_unicode=True).encode(errors="surrogatepass")


def test_configs(tmp_path):
    path, accepted = tmp_path / "c.yaml", []

    def read(rng):
        kind, text, recipe = rng.choice(RECIPES)
        arguments, what = ["--config", str(path)], rng.randrange(10)
        if what < 5:
            path.write_bytes(dumped(with_odd_values(rng, kind, recipe)))
        elif what == 5:
            path.write_bytes(dumped(mutate_json(rng, recipe)))
        elif what == 6:
            path.write_bytes(mutate_bytes(rng, text.encode()))
        elif what == 7:
            path.write_text(text)
            for _ in range(rng.choice((1, 2))):
                value = rng.choice(ODD)
                words = yaml.safe_dump(value, default_flow_style=True, width=10**6).partition("\n")[0]
                name = f"--{'.'.join(rng.choice(KEYS[kind]))}"
                arguments += rng.choice(
                    ([name, words], [f"{name}={words}"], [name[:-1], words], [name], [words])
                )
        else:
            path.write_bytes(mutate_text(rng, text, PIECES).encode(errors="surrogatepass"))
        config, _ = parse_arguments(arguments, Path("nowhere"), kind)
        assert parse_again(config, path) == config, "a config that is stored is another one"
        accepted.append(config)
        return "accepted"

    ends = fuzz("configs", read, full=12_000, short=200)
    assert min(ends["accepted"], ends["refused"]) > 5

    def dry_run(rng):
        config = accepted[rng.randrange(len(accepted))]
        if isinstance(config, ClassifierConfig):
            describe_classifier(config)
        else:
            budget = Budget(config)
            describe_run(budget)
            budget.check()
        return "said"

    fuzz("dry runs", dry_run, full=150, short=1)


def parse_again(config, path):
    path.write_bytes(dumped(config.to_dict()))
    return parse_arguments(["--config", str(path)], path, type(config))[0]
