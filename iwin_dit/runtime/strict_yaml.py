"""YAML that means one thing: keys once, no objects, no dates, and small enough to be read at once.

Whole numbers are decimal (``010`` and ``1:30`` are text), and ``1e-4`` is a number, as in YAML 1.2.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from iwin_dit.runtime.errors import ConfigError

MAX_BYTES = 100_000  # a recipe has three thousand
MAX_NODES = 10_000  # with what aliases and merges repeat
_TAG = "tag:yaml.org,2002:"
_INT = re.compile(r"[-+]?(0|[1-9][0-9_]{0,40})$")
_FLOAT = re.compile(
    r"([-+]?(\.[0-9]+|[0-9][0-9_]*\.[0-9_]*)([eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
)


def load(path: str | Path) -> dict[str, Any]:
    """The keys and values of a file that anybody may have written.

    Raises:
        ConfigError: where it cannot be read, is too large, or is not one mapping in YAML.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise ConfigError(
            f"the config {path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"the config {path} has more than {MAX_BYTES:,} bytes; it is no recipe")
    try:
        content = parse(data.decode("utf-8-sig"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}, expected keys and values")
    return content


def parse(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: with the line, where it is not valid, too deep or too large.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(loader, node, {}, set())
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"line {mark.line + 1}: "
        raise ValueError(f"{where}{error.problem or error.context}") from None
    except yaml.YAMLError as error:  # of the reader, about single characters
        raise ValueError(" ".join(str(error).split())) from None


def dump(value: Any) -> str:
    """YAML that :func:`load` reads as the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """Knows the seven tags of JSON's values alone."""

    yaml_implicit_resolvers: dict[str, Any] = {}
    yaml_constructors = {
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(_TAG) in ("null", "bool", "int", "float", "str", "seq", "map")
    }


class _Dumper(yaml.SafeDumper):
    """Quotes text that :class:`_Loader` would take for a number, too."""


for _first, _resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items():
    _Loader.yaml_implicit_resolvers[_first] = [
        (tag, pattern) for tag, pattern in _resolvers if tag.removeprefix(_TAG) in ("null", "bool", "merge")
    ]
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(f"{_TAG}int", _INT, list("-+0123456789"))
    _kind.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789."))


def _check(loader: _Loader, node: yaml.Node, sizes: dict[int, int], above: set[int]) -> int:
    """The number of nodes below, aliases written out; refuses what has no value or more than one."""
    if id(node) in above:
        raise _problem(node, "an alias refers to what it is in")
    if id(node) in sizes:
        return sizes[id(node)]
    above.add(id(node))
    children = []
    if isinstance(node, yaml.ScalarNode):
        if node.tag not in (loader.resolve(yaml.ScalarNode, node.value, (True, False)), f"{_TAG}str"):
            raise _problem(node, f"{node.value[:40]!r} is not what its tag {node.tag[:60]} says")
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _problem(key, "a key is a list or a mapping, expected text")
            if key.value in seen:
                raise _problem(
                    key, f"the key {key.value[:40]} appears twice, again in line {key.start_mark.line + 1}"
                )
            seen.add(key.value)
            children += [key, value]
    else:
        children = node.value
    size = 1 + sum(_check(loader, child, sizes, above) for child in children)
    if size > MAX_NODES:
        raise _problem(node, f"it has more than {MAX_NODES:,} values")
    above.remove(id(node))
    sizes[id(node)] = size
    return size


def _problem(node: yaml.Node, words: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=words, problem_mark=node.start_mark)
