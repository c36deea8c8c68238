"""Where a pocket's program is held: one call put into its syntax tree, and nothing else of it changed.

A checkpoint is written as the start of one top-level statement ("image = load("), which may be in a block of `if` such
as `if __name__ == "__main__":`, as a function's name ("main": before it is first called), as a place ("detect.py:14"),
or as `pocketd.checkpoint()`, which the program calls itself. The call stands on the line of what it precedes, so that
line numbers, tracebacks and the names in them are the program's own.
"""

from __future__ import annotations
import __future__

import ast
import functools
import re
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Tuple, Union

# What the inserted call is named among the builtins; no name that a program can write.
NAME = "<checkpoint>"
OWN = "pocketd.checkpoint()"
_FUTURES = functools.reduce(
    lambda flags, name: flags | getattr(__future__, name).compiler_flag, __future__.all_feature_names, 0
)
_PLACE = re.compile(r"(?P<file>[^:]+\.py):(?P<line>[1-9][0-9]{0,6})")

Function = Union[ast.FunctionDef, ast.AsyncFunctionDef]
Body = List[ast.stmt]


class CheckpointError(Exception):
    """The program has no such place, or more than one; the text says what to write instead."""


class Compiled(NamedTuple):
    """A program that calls the builtin `NAME` at its checkpoint, once it gets there."""

    code: Any
    tree: ast.Module
    call: Optional[ast.stmt]  # that call; None where the program has one of its own
    path: str

    @property
    def flags(self) -> int:
        """Those of its `from __future__`, for compile()."""
        return int(self.code.co_flags & _FUTURES)

    def is_at(self, line: int) -> Callable[[ast.stmt], bool]:
        """Whether a statement is the checkpoint, which has been reached in `line`."""
        if self.call:
            return lambda statement: statement is self.call
        return lambda statement: (
            isinstance(statement, ast.Expr) and statement.lineno <= line <= (statement.end_lineno or 0)
        )


def compile_held(source: bytes, path: str, where: str) -> Compiled:
    """`where` as a pocket's definition has it; `path` as the program is run by. Raises CheckpointError, and what
    compile() raises for a program that is none."""
    tree = ast.parse(source, path)
    call = None
    if where != OWN:
        call = insert(*find(tree, source, path, where))
    return Compiled(compile(tree, path, "exec", dont_inherit=True), tree, call, path)


def find(tree: ast.Module, source: bytes, path: str, where: str) -> Tuple[Body, int]:
    """The list of statements and the index in it before which the program is held. Raises CheckpointError."""
    place = _PLACE.fullmatch(where)
    if place:
        if not f"/{path}".endswith(f"/{place['file']}"):
            raise CheckpointError(f"{where} is not in the program, {path}: only its own file can be held in")
        return at_line(tree, int(place["line"]), path)
    if where.isidentifier():
        found = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        named = [node for node in found if node.name == where]
        if named:
            return in_function(named[-1])  # a later definition is the one that is called
    return at_statement(tree, source, path, where)


def at_line(tree: ast.Module, line: int, path: str) -> Tuple[Body, int]:
    for body in bodies(tree):
        for i, statement in enumerate(body):
            if first_line(statement) == line:
                return body, i
    raise CheckpointError(f"no statement begins in line {line} of {path}")


def in_function(function: Function) -> Tuple[Body, int]:
    if isinstance(function, ast.AsyncFunctionDef):
        raise CheckpointError(
            f"{function.name} is a coroutine, and a running event loop cannot be forked: "
            "hold the program before the statement that starts the loop"
        )
    first = function.body[0]
    described = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return function.body, 1 if described and len(function.body) > 1 else 0


def at_statement(tree: ast.Module, source: bytes, path: str, where: str) -> Tuple[Body, int]:
    """The one top-level statement, or else of a block of `if` there, whose text begins with `where`, blanks aside."""
    wanted = squeeze(where)
    lines = source.splitlines(keepends=True)
    every = [
        (body, i)
        for body in top_level(tree.body)
        for i, statement in enumerate(body)
        if squeeze(text_of(statement, lines)).startswith(wanted) and not is_future(statement)
    ]
    found = [(body, i) for body, i in every if body is tree.body] or every
    if not wanted or not found:
        raise CheckpointError(f"no top-level statement of {path} begins with {where!r}, and it has no such function")
    if len(found) > 1:
        numbers = ", ".join(str(first_line(body[i])) for body, i in found)
        raise CheckpointError(f"{where!r} begins {len(found)} top-level statements of {path}, in lines {numbers}")
    return found[0]


def top_level(body: Body) -> Iterator[Body]:
    """The statements of the top level, and those of blocks of `if` there."""
    yield body
    for statement in body:
        if isinstance(statement, ast.If):
            yield from top_level(statement.body)
            yield from top_level(statement.orelse)


def squeeze(text: str) -> str:
    return "".join(text.split())


def text_of(statement: ast.stmt, lines: List[bytes]) -> str:
    end = statement.end_lineno or statement.lineno
    part = lines[first_line(statement) - 1 : end]
    if part and first_line(statement) == statement.lineno:
        part[0] = part[0][statement.col_offset :]
    return b"".join(part).decode("utf-8", "replace")


def first_line(statement: ast.stmt) -> int:
    """Its decorators' first, where it has some."""
    decorators: List[ast.expr] = getattr(statement, "decorator_list", [])
    return min([statement.lineno, *(d.lineno for d in decorators)])


def is_future(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.ImportFrom) and statement.module == "__future__"


def bodies(tree: ast.AST) -> Iterator[Body]:
    """Every list of statements, outer ones first."""
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            body = getattr(node, name, None)
            if isinstance(body, list) and body and isinstance(body[0], ast.stmt):
                yield body


def insert(body: Body, at: int) -> ast.stmt:
    where = body[at] if at < len(body) else body[-1]
    call = ast.Expr(ast.Call(ast.Name(NAME, ast.Load()), [], []))
    if at == 0 and isinstance(where, ast.Expr) and isinstance(where.value, ast.Constant):
        at = 1  # a docstring stays one; it does nothing
    while at < len(body) and is_future(body[at]):
        at += 1
    for node in ast.walk(call):
        node.lineno = node.end_lineno = first_line(where)  # type: ignore[attr-defined]
        node.col_offset = node.end_col_offset = where.col_offset  # type: ignore[attr-defined]
    body.insert(at, call)
    return call
