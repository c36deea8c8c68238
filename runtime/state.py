"""What a program has made by its checkpoint: what a rehearsal changes in it is put back, or else named.

Seen is what can be reached from the program's own names through containers, objects of its own classes, functions and
classes; arrays, and TensorFlow's variables wherever they are. Objects of libraries are left as the rehearsal has warmed
them, and so is what a library keeps in those of classes that derive from its own (derived.py); whether they have been
changed say fingerprints.py.
"""

from __future__ import annotations

import array
import collections
import enum
import functools
import gc
import itertools
import operator
import sys
import threading
import types
import weakref
import zlib
from contextlib import suppress
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Set, Tuple

from runtime import derived, variables

MOST = 200_000  # objects, and items of one of them that are kept to be put back; of others a checksum
_COPIED = 64 << 20  # bytes of arrays that are kept to be put back; of others a checksum
_DEEP = 3  # levels at which a library's object is looked for in what a cache holds

Names = Dict[str, Any]


class _Kind(NamedTuple):
    look: Callable[[Any], Any]  # what it holds now, shallow
    same: Callable[[Any, Any], bool]
    put: Optional[Callable[[Any, Any], object]] = None  # None: it cannot be put back


class State:
    """`own(name)`: whether a module of that name is the program's; `roots`: its namespaces, by what they are called."""

    def __init__(self, own: Callable[[str], bool], roots: Iterable[Tuple[str, Names]]):
        self._own = own
        self._pieces: List[Tuple[str, Any, _Kind, Any]] = []
        self._seen: Set[int] = set()
        self._copied = 0
        self._kinds: Dict[type, _Kind] = {}
        self.others: List[Tuple[str, Any]] = []  # objects of libraries, which are not looked into here
        self.lazy: List[str] = []  # by what names a library's objects were loaded at their first use
        self._variables = variables.Variables()
        self.whole = True  # all of it has been looked at
        waiting = [(name, value) for _, names in roots for name, value in list(names.items())]
        while waiting and len(self._seen) < MOST:
            label, thing = waiting.pop()
            if id(thing) in self._seen or type(thing) in _PLAIN:
                continue
            self._seen.add(id(thing))
            with suppress(Exception):  # what an object's own methods raise: it is not looked into
                waiting += [(label, inner) for inner in self._take(label, thing) if type(inner) not in _PLAIN]
        self.whole &= not waiting

    def _take(self, label: str, thing: Any) -> Iterator[Any]:
        """Note what it holds; gives what is to be looked at next."""
        kind = type(thing)
        if issubclass(kind, (tuple, frozenset)):
            yield from (tuple if issubclass(kind, tuple) else frozenset).__iter__(thing)
        elif kind is functools.partial:
            yield from (thing.func, *thing.args, *thing.keywords.values())
        elif kind is types.MethodType:
            yield from (thing.__self__, thing.__func__)
        elif kind is types.FunctionType:
            if self._own(thing.__module__ or ""):
                self._keep(label, thing, _FUNCTION)
                yield from (*vars(thing).values(), *(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values())
                yield from thing.__closure__ or ()
        elif kind in (staticmethod, classmethod):
            yield thing.__func__
        elif kind is property:
            yield from (thing.fget, thing.fset, thing.fdel)
        elif kind is functools._lru_cache_wrapper:
            self._keep(label, thing, _CACHE)
            yield thing.__wrapped__
        elif kind is types.MappingProxyType:
            yield from gc.get_referents(thing)
        elif kind is types.ModuleType:
            if self._is_made(thing):
                yield from self._keep(label, thing, _MODULE).values()
        elif kind is types.CellType:
            yield from self._keep(label, thing, _CELL)
        elif issubclass(kind, type):
            if self._own(thing.__module__):
                yield from self._keep(label, thing, _CLASS).values()
        elif issubclass(kind, _array_type()):
            yield from self._take_array(label, thing)
            if hasattr(thing, "__dict__"):
                yield from self._keep(label, thing, _ATTRIBUTES).values()
        else:
            yield from self._take_object(label, thing)

    def _take_object(self, label: str, thing: Any) -> Iterator[Any]:
        if any(base.__module__ == "_ctypes" for base in type(thing).__mro__):
            self._keep(label, thing, _OF_C)
            return
        for base, piece in _CONTAINERS.items():
            if issubclass(type(thing), base) and (type(thing) in _CONTAINERS or self._is_plain(type(thing))):
                if base in _BYTES:
                    self._copied += len(thing) * getattr(thing, "itemsize", 1)
                    self._keep(label, thing, piece if self._copied <= _COPIED else _LARGE_BYTES)
                    continue
                if len(thing) > MOST:
                    self._keep(label, thing, _LARGE)
                    self.whole = False
                    continue
                held = self._keep(label, thing, piece)
                yield from itertools.chain.from_iterable(held.items()) if isinstance(held, dict) else held
        if self._own(type(thing).__module__):
            yield type(thing)
        if self._is_plain(type(thing)):
            if hasattr(thing, "__dict__"):
                yield from self._keep(label, thing, _ATTRIBUTES).values()
            slots = _slots(type(thing))
            if slots:
                yield from self._keep(label, thing, _SLOTS).values()
        elif self._is_derived(type(thing)) and hasattr(thing, "__dict__"):
            self.others.append((label, thing))
            yield from self._keep(label, thing, self._derived(type(thing))).values()
        elif _is_wrapper(type(thing)):
            yield from self._keep(label, thing, _WRAPPERS[type(thing).__name__])
        elif _place(thing) is not None:
            self._keep(label, thing, _ITERATOR)
        elif type(thing) is memoryview:
            yield thing.obj
        elif type(thing).__module__ != "builtins":
            self.others.append((label, thing))

    def _keep(self, label: str, thing: Any, kind: _Kind) -> Any:
        held = kind.look(thing)
        self._pieces.append((label, thing, kind, held))
        return held

    def _take_array(self, label: str, thing: Any) -> Iterator[Any]:
        if not thing.flags.writeable or type(thing).__name__ == "memmap":
            return
        if thing.dtype.hasobject:
            if thing.dtype == object and thing.size <= MOST:
                yield from self._keep(label, thing, _OBJECT_ARRAY)
            return
        self._copied += thing.nbytes
        self._keep(label, thing, _ARRAY if self._copied <= _COPIED else _LARGE_ARRAY)

    def _is_plain(self, kind: type) -> bool:
        """Whether all of its objects is the program's, or of the standard library's classes that only hold things."""
        if kind in _HOLDERS:
            return True
        bases = [base for base in kind.__mro__ if not self._own(base.__module__)]
        if threading.Condition in bases:
            return False  # see _holders
        return self._own(kind.__module__) and all(is_standard(base.__module__) for base in bases)

    def _is_derived(self, kind: type) -> bool:
        """Whether it is the program's, and a library's too."""
        return self._own(kind.__module__) and not all(self._own(m) or is_standard(m) for m in _modules(kind))

    def _derived(self, kind: type) -> _Kind:
        if kind not in self._kinds:
            names = derived.stored(kind, self._own)
            self._kinds[kind] = _Kind(
                lambda thing: derived.attributes(thing, names),
                identical,
                lambda thing, held: derived.restore(thing, names, held, lambda value: _is_warm(value, self._own)),
            )
        return self._kinds[kind]

    def _is_made(self, module: Any) -> bool:
        """Whether it was made by hand, and nobody imported it."""
        spec = getattr(module, "__spec__", None)
        return spec is None and getattr(module, "__file__", None) is None and not is_standard(module.__name__)

    def restore(self) -> Optional[str]:
        """Put back what is not as it was. What cannot be, in words; None where there is nothing."""
        failed = None
        for label, thing, kind, held in self._pieces:
            try:
                now = kind.look(thing)
                if kind.same(held, now):
                    continue
                if kind.put is None:
                    raise TypeError
                if kind is _CACHE and any(_is_warm(value, self._own) for value in _cached(thing)):
                    self.lazy.append(thing.__name__)
                elif type(held) is dict and kind not in self._kinds.values() and loaded(held, now, self._own):
                    self.lazy.append(label)
                kind.put(thing, held)
            except Exception:
                failed = failed or f"{label}, or what it holds, of type {type(thing).__name__}"
        return failed or self._variables.restore()


def loaded(held: Dict[Any, Any], now: Dict[Any, Any], own: Callable[[str], bool]) -> List[Any]:
    """Names for nothing, or None, that are for a library's object now."""
    return [k for k, v in now.items() if held.get(k) is None and v is not None and _is_warm(v, own)]


def _is_warm(value: Any, own: Callable[[str], bool], deep: int = _DEEP) -> bool:
    """Whether it is a library's object, or holds one; an array or a tensor is no more than a result."""
    kind = type(value)
    if kind in _PLAIN or hasattr(kind, "__array__") or hasattr(kind, "__array_interface__") or not deep:
        return False
    if kind in (list, tuple):
        return any(_is_warm(item, own, deep - 1) for item in value[:100])
    if kind is dict:
        return any(_is_warm(item, own, deep - 1) for item in itertools.islice(value.values(), 100))
    if own(kind.__module__):
        return any(_is_warm(item, own, deep - 1) for item in list(getattr(value, "__dict__", {}).values()))
    return not is_standard(kind.__module__) and not isinstance(value, (type, types.ModuleType))


def _modules(kind: type) -> Iterator[str]:
    return (base.__module__ for base in kind.__mro__)


def _is_wrapper(kind: type) -> bool:
    """Whether Keras or TensorFlow puts it in the place of a list or dict that is made an attribute."""
    return kind.__name__ in _WRAPPERS and kind.__module__ in _TRACKING


def is_standard(module: str) -> bool:
    top = module.partition(".")[0]
    return top in getattr(sys, "stdlib_module_names", ()) or top in sys.builtin_module_names or top == "builtins"


# -- kinds of things


def _identical(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


def identical(a: Dict[Any, Any], b: Dict[Any, Any]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b)) and all(map(operator.is_, a.values(), b.values()))


def _put_list(thing: Any, held: Any) -> None:
    list.__setitem__(thing, slice(None), held)


def _put_by(clear: Any, fill: Any) -> Callable[[Any, Any], None]:
    def put(thing: Any, held: Any) -> None:
        clear(thing)
        fill(thing, held)

    return put


def _put_attributes(thing: Any, held: Names) -> None:
    there, attributes = thing.__dict__, dict(held)
    kind = attributes.pop("(class)", None)
    there.clear()
    there.update(attributes)
    if kind not in (None, type(thing)):
        object.__setattr__(thing, "__class__", kind)


def _cached(function: Any) -> List[Any]:
    """What a functools.lru_cache holds by now: one without a limit in a dict."""
    found: List[Any] = []
    for place in gc.get_referents(function):
        found += place.values() if type(place) is dict and place is not function.__dict__ else [place]
    return [value for value in found if type(value) not in (dict, tuple, types.FunctionType)]


def _clear_cache(function: Any, held: int) -> None:
    """One that held something keeps what has been added: it cannot be taken out alone."""
    if not held:
        function.cache_clear()


def _put_objects(thing: Any, held: List[Any]) -> None:
    flat = thing.flat
    for n, value in enumerate(held):
        flat[n] = value


def _slots(kind: type) -> Dict[str, Any]:
    """Members that lie in its objects, by name."""
    found = {}
    for base in kind.__mro__:
        found.update({k: v for k, v in vars(base).items() if type(v) is types.MemberDescriptorType})
    return found


def _look_slots(thing: Any) -> Names:
    found = {}
    for name, member in _slots(type(thing)).items():
        try:
            found[name] = member.__get__(thing)
        except AttributeError:
            pass
    return found


def _put_slots(thing: Any, held: Names) -> None:
    for name, member in _slots(type(thing)).items():
        if name in held:
            member.__set__(thing, held[name])
        elif name in _look_slots(thing):
            member.__delete__(thing)


def look_class(kind: Any) -> Names:
    return {k: v for k, v in vars(kind).items() if type(v) not in _DESCRIPTORS}


def _look_attributes(thing: Any) -> Names:
    return {**thing.__dict__, "(class)": type(thing)}


def put_class(kind: Any, held: Names) -> None:
    now = look_class(kind)
    for name in [name for name in now if name not in held]:
        type.__delattr__(kind, name)
    for name, value in held.items():
        if now.get(name, held) is not value:
            type.__setattr__(kind, name, value)


def _look_function(function: Any) -> Names:
    given = {"(defaults)": function.__defaults__, "(keywords)": function.__kwdefaults__, "(code)": function.__code__}
    return {**vars(function), **given}


def _put_function(function: Any, held: Names) -> None:
    attributes = dict(held)
    function.__defaults__, function.__kwdefaults__ = attributes.pop("(defaults)"), attributes.pop("(keywords)")
    function.__code__ = attributes.pop("(code)")
    _put_attributes(function, attributes)


def _look_cell(cell: Any) -> Tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()


def _put_cell(cell: Any, held: Tuple[Any, ...]) -> None:
    if held:
        cell.cell_contents = held[0]
    else:
        del cell.cell_contents


def _place(thing: Any) -> Any:
    """How far an iterator is; None of what is none, or does not tell."""
    if type(thing) is itertools.count:
        return repr(thing)
    if type(thing) is types.GeneratorType:
        frame = thing.gi_frame
        return -1 if frame is None else (frame.f_lasti, *map(id, frame.f_locals.values()))
    if type(thing) in (enumerate, zip, map, filter, itertools.chain):
        return repr([_place(inner) for inner in _within(thing)]) + repr(_numbers(thing))
    return thing.__length_hint__() if type(thing) in _ITERATORS else None


def _within(iterator: Any) -> Iterator[Any]:
    """Iterators that it goes through."""
    for inner in gc.get_referents(iterator):
        yield from gc.get_referents(inner) if type(inner) is tuple else [inner]


def _numbers(iterator: Any) -> Any:
    return iterator.__reduce__()[1][1:] if type(iterator) is enumerate else ()


def _put_array(thing: Any, held: Any) -> None:
    thing[...] = held


def _checksum(thing: Any) -> int:
    return zlib.crc32(thing.data if thing.flags.c_contiguous else thing.tobytes())


def _identities(thing: Any) -> int:
    """A checksum of which items there are."""
    items, found = iter(thing.items() if isinstance(thing, dict) else thing), 0
    while part := list(itertools.islice(items, 1 << 14)):
        if isinstance(thing, dict):
            part = list(itertools.chain.from_iterable(part))
        found = zlib.crc32(array.array("Q", map(id, part)), found)
    return found


def _array_type() -> Tuple[type, ...]:
    numpy = sys.modules.get("numpy")
    return (numpy.ndarray,) if numpy else ()


_PLAIN = {int, float, bool, complex, str, bytes, type(None), type(Ellipsis), range, slice}
_FUNCTION = _Kind(_look_function, identical, _put_function)
_CELL = _Kind(_look_cell, _identical, _put_cell)
_CLASS = _Kind(look_class, identical, put_class)
_ATTRIBUTES = _Kind(_look_attributes, identical, _put_attributes)
_MODULE = _Kind(lambda thing: dict(thing.__dict__), identical, _put_attributes)
_CACHE = _Kind(lambda thing: thing.cache_info().currsize, operator.eq, _clear_cache)
_OBJECT_ARRAY = _Kind(lambda thing: list(thing.flat), _identical, _put_objects)
_SLOTS = _Kind(_look_slots, identical, _put_slots)
_OF_C = _Kind(bytes, operator.eq)  # there may be pointers in it
_ITERATOR = _Kind(_place, operator.eq)
_ARRAY = _Kind(lambda thing: thing.copy(), lambda a, b: a.tobytes() == b.tobytes(), _put_array)
_LARGE = _Kind(_identities, operator.eq)
_LARGE_BYTES = _Kind(zlib.crc32, operator.eq)
_BYTES = (bytearray, array.array)
_LARGE_ARRAY = _Kind(_checksum, operator.eq)
_PAIRS = _Kind(lambda thing: dict(dict.items(thing)), identical, _put_by(dict.clear, dict.update))
_OD = collections.OrderedDict
_ORDERED = _Kind(lambda thing: dict(_OD.items(thing)), identical, _put_by(_OD.clear, _OD.update))
_CONTAINERS: Dict[type, _Kind] = {
    list: _Kind(lambda thing: list(list.__iter__(thing)), _identical, _put_list),
    collections.OrderedDict: _ORDERED,
    dict: _PAIRS,
    collections.defaultdict: _PAIRS,
    collections.Counter: _PAIRS,
    set: _Kind(lambda thing: list(set.__iter__(thing)), _identical, _put_by(set.clear, set.update)),
    collections.deque: _Kind(list, _identical, _put_by(collections.deque.clear, collections.deque.extend)),
    array.array: _Kind(lambda thing: thing[:], operator.eq, lambda thing, held: thing.__setitem__(slice(None), held)),
    bytearray: _Kind(bytes, operator.eq, lambda thing, held: bytearray.__setitem__(thing, slice(None), held)),
}
# Those of TensorFlow keep what they hold elsewhere: they are named. A wrapped dict is one by its methods only.
_WRAPPERS = {
    "TrackedList": _CONTAINERS[list],
    "TrackedDict": _PAIRS,
    "TrackedSet": _CONTAINERS[set],
    "ListWrapper": _Kind(list, _identical),
    "_DictWrapper": _Kind(lambda thing: [*thing.keys(), *thing.values()], _identical),
}
_TRACKING = ("keras.src.utils.tracking", "tensorflow.python.trackable.data_structures")
_MADE: Tuple[Any, ...] = ([], (), {}, set(), b"", range(0), collections.deque())
_ITERATORS = {type(iter(made)) for made in _MADE}
_DESCRIPTORS = (types.GetSetDescriptorType, types.MemberDescriptorType)


def _holders() -> Set[type]:
    """Of the standard library, whose objects hold what a program gives them. A Condition's waiting threads are no such
    thing: they wait by locks that are where they have come to since."""
    import argparse
    import queue

    return {
        *(types.SimpleNamespace, argparse.Namespace, enum.Enum),
        *(collections.UserDict, collections.UserList, collections.ChainMap),
        *(queue.Queue, queue.LifoQueue, queue.PriorityQueue),
        *(threading.Event, threading.Semaphore, threading.BoundedSemaphore, threading.local),
        *(weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet),
    }


_HOLDERS = _holders()
