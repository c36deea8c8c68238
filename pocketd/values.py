"""Values on a session's socket: msgpack, with tensors as handles and tuples kept apart from lists.

None, bool, int, float, str, bytes, list, tuple and dict travel as themselves, nested (to a limit). A tensor is an
extension of code 1 whose data is its handle (tensors.py); a tuple one of code 2 whose data is a packed array.
Nothing is pickled. `Format` belongs to one session; its owner says what a tensor is by two functions.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Tuple

import msgpack

from nsutil.messages import MessageError
from pocketd import wire

TENSOR = 1
TUPLE = 2
# Each nested tuple costs the unpacker some 50 KiB of C stack, of the 8 MiB that a main thread has.
MAX_TUPLES = 32
_PLAIN: Tuple[Any, ...] = (int, float, list, dict)
_KNOWN = (tuple, str, bytes, bytearray, *_PLAIN)
_SPOKEN = tuple(range(wire.OLDEST, wire.VERSION + 1))


def of_handle(handle: bytes) -> msgpack.ExtType:
    return msgpack.ExtType(TENSOR, handle)


class Format:
    """Packs and unpacks the messages of one session. Not for two threads at once.

    `export(value)` gives `of_handle` of a tensor, or a plain value instead of one, or raises TypeError for what cannot
    travel. `resolve(handle)` makes a tensor of a handle's bytes, or raises wire.Error.
    """

    def __init__(self, export: Callable[[Any], Any], resolve: Callable[[bytes], Any]):
        self._export = export
        self._resolve = resolve
        self._packer = msgpack.Packer(default=self._default, use_bin_type=True, strict_types=True)
        self._depth = 0
        self.faults: List[wire.Error] = []  # what was wrong with handles of the last message

    def pack(self, message: Dict[str, Any]) -> bytes:
        """The message's bytes. Raises wire.Error("bad-value") for what cannot travel."""
        self._depth = 0
        try:
            packed: bytes = self._packer.pack(message)
            return packed
        except wire.Error:
            raise
        except RecursionError:
            raise wire.Error("bad-value", "the value is nested too deeply") from None
        except (TypeError, ValueError, OverflowError) as e:
            raise wire.Error("bad-value", f"the value cannot travel: {e}") from None

    def unpack(self, body: bytes) -> Dict[str, Any]:
        """The message in `body`. Raises MessageError when it is none.

        A handle that cannot be used does not spoil the message: it is None there, and `faults` has its error.
        """
        self._depth = 0
        if self.faults:
            self.faults = []
        try:
            message = msgpack.unpackb(body, strict_map_key=False, ext_hook=self._hook)
        except Exception as e:  # ValueError, TypeError (unhashable keys), msgpack's own
            raise MessageError(f"not msgpack: {type(e).__name__}: {str(e)[:100]}") from None
        if type(message) is not dict or message.get("v") not in _SPOKEN:
            raise MessageError("not a message of this version of the protocol")
        return message

    def _default(self, value: Any) -> Any:
        if isinstance(value, _KNOWN):
            return self._plain(value)
        return self._export(value)

    def _plain(self, value: Any) -> Any:
        """A tuple, and subclasses of plain types: strict_types sends them here, so that a tuple is no list."""
        if isinstance(value, tuple):
            return msgpack.ExtType(TUPLE, self._pack_tuple(value))
        if isinstance(value, str):
            return str.__str__(value)
        for plain in _PLAIN:
            if isinstance(value, plain):
                return plain(value)
        return bytes(value)

    def _pack_tuple(self, value: Any) -> bytes:
        self._depth += 1
        if self._depth > MAX_TUPLES:
            raise wire.Error("bad-value", f"tuples nested more than {MAX_TUPLES} deep cannot travel")
        packed: bytes = msgpack.packb(list(value), default=self._default, use_bin_type=True, strict_types=True)
        self._depth -= 1
        return packed

    def _hook(self, code: int, data: bytes) -> Any:
        if code == TENSOR:
            try:
                return self._resolve(data)
            except wire.Error as e:
                self.faults.append(e)
                return None
        if code != TUPLE:
            raise ValueError(f"an extension of unknown code {code}")
        self._depth += 1
        if self._depth > MAX_TUPLES:
            raise ValueError("tuples nested too deeply")
        items = msgpack.unpackb(data, raw=False, strict_map_key=False, ext_hook=self._hook)
        self._depth -= 1
        if type(items) is not list:
            raise ValueError("a tuple that is no array")
        return tuple(items)
