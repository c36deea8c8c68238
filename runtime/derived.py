"""Objects of a program's own classes that derive from a library's, such as keras.Model: what the program keeps in them.

Told apart by who stores it: an attribute that a function of the library's classes stores is the library's, and so is
one with an underscore that no function of the program's classes stores.
"""

from __future__ import annotations

import opcode
import types
from typing import Any, Callable, Dict, Iterator, NamedTuple, Set

Names = Dict[str, Any]

_BUILT = "(built)"  # no attribute's name
_STORE, _EXTENDED = opcode.opmap["STORE_ATTR"], opcode.opmap["EXTENDED_ARG"]


class Stored(NamedTuple):
    """Names of attributes, by whose functions store them."""

    theirs: Set[str]  # the library's
    ours: Set[str]  # the program's alone
    building: Set[str]  # of those, its build()


def stored(kind: type, own: Callable[[str], bool]) -> Stored:
    """What is stored in its objects."""
    found = Stored(set(), set(), set())
    for base in kind.__mro__:
        for name, member in vars(base).items():
            for code in _codes(member):
                (found.ours if own(base.__module__) else found.theirs).update(_names(code))
                if own(base.__module__) and name == "build":
                    found.building.update(_names(code))
    found.ours.difference_update(found.theirs)
    return found


def attributes(thing: Any, stored: Stored) -> Names:
    theirs, ours, _ = stored
    found = {k: v for k, v in vars(thing).items() if k not in theirs and (k in ours or not k.startswith("_"))}
    return {**found, _BUILT: bool(vars(thing).get("built"))}


def restore(thing: Any, stored: Stored, held: Names, is_warm: Callable[[Any], bool]) -> None:
    """Put back what is not as it was, but for the library's objects that have been made since, and variables: they are
    known to the library by now. A layer or model that has been built keeps what is new, and what its build() stores."""
    now, there = attributes(thing, stored), vars(thing)
    built = now.pop(_BUILT) != held[_BUILT]
    for name, value in now.items():
        if built and (name not in held or name in stored.building):
            continue
        if held.get(name, held) is not value and not is_warm(value) and not hasattr(type(value), "assign"):
            del there[name]
    for name, value in held.items():
        if name != _BUILT:
            there.setdefault(name, value)


def _codes(member: Any) -> Iterator[types.CodeType]:
    if isinstance(member, property):
        for function in (member.fget, member.fset, member.fdel):
            yield from _codes(function)
        return
    seen = set()
    while member is not None and id(member) not in seen:
        seen.add(id(member))
        if isinstance(member, types.FunctionType):
            yield from _within(member.__code__)
        member = getattr(member, "__func__", None) or getattr(member, "__wrapped__", None)


def _within(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _within(constant)


def _names(code: types.CodeType) -> Iterator[str]:
    """What it stores as an attribute. dis(3) would take a second for those of Keras."""
    argument = 0
    pairs = iter(code.co_code)
    for operation, low in zip(pairs, pairs):
        argument = argument << 8 | low
        if operation == _EXTENDED:
            continue
        if operation == _STORE:
            yield code.co_names[argument]
        argument = 0
