"""What follows a checkpoint, as code that can be run a second time: for a rehearsal, in the held process.

That is the rest of the top level, or of a function; blocks of `if` that the checkpoint is in go on with what comes
after them. A loop, `with` and `try` have a state that no second run could have, and so have closures and generators.
"""

from __future__ import annotations

import ast
import dis
import inspect
import types
import warnings
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Set

Body = List[ast.stmt]
_CLASS = "__class__"  # a name of each method that says super(), by which that finds its class
_NOT_A_SECOND_TIME = (
    inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR | inspect.CO_ITERABLE_COROUTINE
)


class CannotRepeat(Exception):
    """What follows cannot be run a second time; the text says what could."""


class Found(NamedTuple):
    """Where a checkpoint is: the statements after it, and the function and class that these are of."""

    rest: Body
    function: Optional[ast.FunctionDef] = None
    of: Optional[ast.ClassDef] = None


def find(tree: ast.Module, is_it: Callable[[ast.stmt], bool]) -> Optional[Found]:
    """What is executed after the statement for which `is_it` holds, where that can be told from the text."""
    return _after(tree.body, is_it, None, None)


def _after(
    body: Body,
    is_it: Callable[[ast.stmt], bool],
    function: Optional[ast.FunctionDef],
    of: Optional[ast.ClassDef],
) -> Optional[Found]:
    for i, statement in enumerate(body):
        if is_it(statement):
            return Found(body[i + 1 :], function, of)
        if isinstance(statement, ast.If):
            for block in (statement.body, statement.orelse):
                found = _after(block, is_it, function, of)
                if found:
                    return Found([*found.rest, *body[i + 1 :]], *found[1:])
        elif isinstance(statement, ast.FunctionDef) and function is None:
            found = _after(statement.body, is_it, statement, of)
            if found:
                return found
        elif isinstance(statement, ast.ClassDef) and function is None and of is None:
            found = _after(statement.body, is_it, None, statement)
            if found and found.function:
                return found
    return None


def code(body: Body, path: str, flags: int) -> Any:
    """The code object of statements that a program has been compiled of already."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there were some already, of the same lines
        return compile(ast.Module(body, []), path, "exec", flags, dont_inherit=True)


def of_frame(found: Optional[Found], frame: Any, path: str, flags: int) -> Callable[[], object]:
    """What follows in the program at `path`, with the names that `frame`, which stands at the checkpoint, has now.
    Raises CannotRepeat."""
    running = frame.f_code
    if not found or running.co_filename != path or not _is_of(running, found.function):
        raise CannotRepeat(
            "only what follows a statement of the top level or of a function, not within a loop, with or try, can be "
            "rehearsed"
        )
    if set(running.co_freevars) - {_CLASS} or running.co_flags & _NOT_A_SECOND_TIME:
        raise CannotRepeat("what follows in a generator, or in a function with names of another one, is not rehearsed")
    if found.function and _shares_names(frame, found.rest):
        raise CannotRepeat("what follows a function made in the same one, which changes names of it, is not rehearsed")
    try:
        if not found.function:
            rest = found.rest
            while rest and isinstance(rest[0], ast.Expr) and isinstance(rest[0].value, ast.Constant):
                rest = rest[1:]  # it would become the docstring
            whole = code(rest, path, flags)
            return lambda: exec(whole, frame.f_globals)
        known = names(frame)
        of = known.pop(_CLASS, None) if _CLASS in running.co_freevars else None
        made = _function(found, list(known), of, path, flags, frame.f_globals)
    except Exception as e:  # what a part of a function's text can be, there are many rules for
        raise CannotRepeat(f"what follows cannot be run by itself, so it is not rehearsed: {e}") from None
    return lambda: made(**known)


def _shares_names(frame: Any, rest: Body) -> bool:
    """Whether a function that is there by now has names of this one, and it or the rest binds them anew: the rest, run
    by itself, has names of its own."""
    shared: Set[str] = set()
    bound = {n.id for s in rest for n in ast.walk(s) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    for function in names(frame).values():
        if type(function) is types.FunctionType:
            shared |= set(function.__code__.co_freevars) & set(frame.f_code.co_cellvars)
            bound |= {i.argval for i in dis.get_instructions(function) if i.opname in ("STORE_DEREF", "DELETE_DEREF")}
    return bool(shared & bound)


def names(frame: Any) -> Dict[str, Any]:
    """Those of a function, by now; none of the top level, whose names are its module's."""
    there = frame.f_locals
    if there is frame.f_globals:
        return {}
    known = dict(there)
    if type(there) is dict:  # before Python 3.13 the frame keeps it, and with it what each run lets go of
        for name in frame.f_code.co_varnames:
            there.pop(name, None)
    return known


def _is_of(running: types.CodeType, function: Optional[ast.FunctionDef]) -> bool:
    if function is None:
        return running.co_name == "<module>"
    lines = [function.lineno, *(decorator.lineno for decorator in function.decorator_list)]
    return running.co_name == function.name and running.co_firstlineno == min(lines)


def _function(
    found: Found, names: List[str], of: Optional[type], path: str, flags: int, namespace: Any
) -> Callable[..., object]:
    """A function of the rest of one, with all that is bound by now as its parameters. `of`: the class whose super() it
    means."""
    assert found.function
    made = ast.parse("def rest(): pass").body[0]
    assert isinstance(made, ast.FunctionDef)
    made.args.args = [ast.arg(name) for name in names]
    said = [node for node in _own(found.function) if isinstance(node, ast.Global)]
    made.body = [*said, *found.rest, ast.Pass()]
    outer: ast.stmt = made
    if of is not None:
        if any(_is_private(node) for node in ast.walk(made)):
            raise CannotRepeat("what follows in a method with super() and names of its class's own is not rehearsed")
        outer = ast.parse(f"def around({_CLASS}):\n pass\n return rest").body[0]
        assert isinstance(outer, ast.FunctionDef)
        outer.body[0] = made
    elif found.of:  # names of its class's own (__name) are what they were
        outer = ast.parse("class C: pass").body[0]
        assert isinstance(outer, ast.ClassDef)
        outer.name, outer.body = found.of.name, [made]
    ast.fix_missing_locations(outer)
    own: Any = {"__name__": namespace.get("__name__")}
    exec(code([outer], path, flags), own)
    if of is not None:
        function = own["around"](of)
    else:
        function = vars(own[found.of.name])[made.name] if found.of else own[made.name]
    return types.FunctionType(function.__code__, namespace, made.name, None, function.__closure__)


def _is_private(node: ast.AST) -> bool:
    name = getattr(node, "attr", None) or getattr(node, "id", None) or ""
    return isinstance(name, str) and name.startswith("__") and not name.endswith("__")


def _own(node: ast.AST) -> Iterator[ast.AST]:
    """What is in a function, and in none within it."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            yield from _own(child)
