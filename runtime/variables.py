"""TensorFlow's variables, wherever they are: what they hold is kept, and put back after a rehearsal."""

from __future__ import annotations

import gc
import sys
import weakref
import zlib
from typing import Any, Dict, List, Optional, Tuple

_COPIED = 64 << 20  # bytes of them that are kept to be put back; of others a checksum


class Variables:
    """What all of them hold: Keras' weights, statistics and metrics among them."""

    def __init__(self) -> None:
        self._known: Dict[int, Tuple[Any, Any, int]] = {}  # a weak reference, a copy where it is kept, a checksum
        copied = 0
        for variable in _variables():
            value = _value(variable)
            copied += 0 if value is None else value.nbytes
            kept = value.copy() if value is not None and copied <= _COPIED else None
            self._known[id(variable)] = weakref.ref(variable), kept, _sum(value)

    def restore(self) -> Optional[str]:
        changed = made = 0
        for variable in _variables() if self._known else ():
            known = self._known.get(id(variable))
            if known is None or known[0]() is not variable:
                made += 1
                continue
            if _sum(_value(variable)) == known[2]:
                continue
            changed += 1
            if known[1] is None:
                return f"the variable {variable.name} of TensorFlow"
            variable.assign(known[1])
        if changed and made:
            return f"{changed} variables of TensorFlow, and makes {made} new ones beside them, as an optimizer does"
        return None


def _variables() -> List[Any]:
    module = sys.modules.get("tensorflow.python.ops.resource_variable_ops")
    if module is None:
        return []
    gc.collect()
    return [o for o in gc.get_objects() if issubclass(type(o), module.BaseResourceVariable)]


def _sum(value: Any) -> int:
    return -1 if value is None else zlib.crc32(value.data if value.flags.c_contiguous else value.tobytes())


def _value(variable: Any) -> Any:
    """As an array, without the copy that numpy() makes; None where it has none, or it does not lie in memory here."""
    try:
        value = sys.modules["numpy"].asarray(variable.read_value()._numpy())
        return None if value.dtype.hasobject else value
    except Exception:
        return None
