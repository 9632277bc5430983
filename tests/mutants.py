"""The mutants of a Python file: small changes, one at a time, that a test ought to notice."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COMPARISONS = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}
KEPT = " (kept)"
SAID = {"print", "say", "warn", "warning", "info", "debug"}  # calls that only tell the user something
FIXED = {  # swapped arguments of which change nothing, or fail at once
    *("min", "max", "minimum", "maximum", "allclose", "equal"),
    *("isinstance", "issubclass", "hasattr", "getattr", "cast"),
}


@dataclass(frozen=True)
class Mutant:
    """One change of a file's text; ``start`` and ``end`` are offsets in its UTF-8 bytes."""

    path: str
    line: int
    start: int
    end: int
    old: str
    new: str

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.new.encode() + source[self.end :]

    def line_after(self, source: bytes) -> str:
        """The changed line, or lines, without indentation."""
        first = source.rfind(b"\n", 0, self.start) + 1
        after = source[first : self.start] + self.new.encode() + source[self.end :].split(b"\n")[0]
        return " ".join(after.decode().split())


def mutants(path: str, source: bytes) -> Iterator[Mutant]:
    """All mutants of a file, in its order."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node, replacement in _changes(ast.parse(source)):
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        new = ast.unparse(replacement)
        new = f"({new})" if isinstance(replacement, ast.expr) else new
        yield Mutant(path, node.lineno, start, end, source[start:end].decode(), new)


def _changes(tree: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Nodes, each with what takes its place."""
    for node in ast.iter_child_nodes(tree):
        yield from ((node, replacement) for replacement in _replacements(node))
        if isinstance(node, ast.If | ast.While | ast.IfExp | ast.comprehension):
            for test in getattr(node, "ifs", None) or [getattr(node, "test", None)]:
                if isinstance(test, ast.Name | ast.Call | ast.Attribute):
                    yield test, ast.UnaryOp(ast.Not(), test)
        if isinstance(node, ast.JoinedStr | ast.Raise) or _says(node):
            continue  # messages
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.arg | ast.AnnAssign):
            node = copy.copy(node)
            for name in ("returns", "annotation"):
                if hasattr(node, name):
                    setattr(node, name, None)
        yield from _changes(node)


def _says(node: ast.AST) -> bool:
    """Whether this is a call that only tells the user something."""
    return isinstance(node, ast.Call) and _name(node.func) in SAID


def _name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _with(node: ast.AST, **fields) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _replacements(node: ast.AST) -> Iterator[ast.AST]:
    match node:
        case ast.Compare():
            for at, op in enumerate(node.ops):
                for other in COMPARISONS[type(op)]:
                    yield _with(node, ops=[*node.ops[:at], other(), *node.ops[at + 1 :]])
        case ast.BinOp() if type(node.op) in ARITHMETIC and not _text(node):
            yield _with(node, op=ARITHMETIC[type(node.op)]())
        case ast.BoolOp():
            yield _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node.operand
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int() | float()):
            yield ast.Constant(node.value + 1 if abs(node.value) < 1e6 else 2 * node.value)
            if node.value:
                yield ast.UnaryOp(ast.USub(), node)
        case ast.Return(value=ast.expr()) if not _is_none(node.value):
            yield ast.Return(ast.Constant(None))
        case ast.Call(args=[first, second]) if not (_says(node) or _name(node.func) in FIXED):
            if not isinstance(first, ast.Starred) and not isinstance(second, ast.Starred):
                yield _with(node, args=[second, first])
        case ast.Raise() | ast.Delete() | ast.AugAssign() | ast.Continue() | ast.Break():
            yield ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield ast.Pass()
        case ast.Expr(value=ast.Call()) if not _says(node.value):
            yield ast.Pass()


def _text(node: ast.BinOp) -> bool:
    sides = (node.left, node.right)
    return any(isinstance(s, ast.JoinedStr | ast.Constant) and not _number(s) for s in sides)


def _number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float)


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def owners(source: bytes) -> dict[int, tuple[str, int]]:
    """``{line: (outermost function, line offset in it)}``: names that stay when other code moves.

    Names of functions whose results are kept for later calls end in KEPT: which test runs them is chance.
    """
    found = {}

    def visit(body, prefix):
        for node in body:
            name = f"{prefix}{getattr(node, 'name', '')}"
            kept = any("cache" in _name(getattr(d, "func", d)) for d in getattr(node, "decorator_list", ()))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                for line in range(node.body[0].lineno, node.end_lineno + 1):
                    found[line] = (name + KEPT * kept, line - node.lineno)
            elif isinstance(node, ast.ClassDef):
                visit(node.body, f"{name}.")

    visit(ast.parse(source).body, "")
    return found


def statement_lines(source: bytes) -> dict[int, range]:
    """For each line, those of the innermost simple statement, or of the compound statement's head."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt):
            body = [node.cases[0].pattern] if isinstance(node, ast.Match) else getattr(node, "body", None)
            lines = range(node.lineno, max(body[0].lineno if body else node.end_lineno + 1, node.lineno + 1))
            found.update((line, lines) for line in lines)
    return found


def in_folder(root: Path, folder: str, leave_out: tuple[str, ...] = ()) -> list[Mutant]:
    """All mutants of a folder's files, but of those whose names match a pattern to leave out."""
    files = sorted((root / folder).glob("*.py"))
    files = [path for path in files if not any(path.match(pattern) for pattern in leave_out)]
    return [m for path in files for m in mutants(str(path.relative_to(root)), path.read_bytes())]
