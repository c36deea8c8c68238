"""Uids: one for each pocket, never root's, and the id maps that show its files as its own."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path

from nsutil import namespaces
from pocketd.wire import Error

# Above systemd's container range (524288 to 1879048191, systemd's UIDS-GIDS document) and below 2**31.
FIRST, COUNT = 1_900_000_000, 1 << 16
# Of these, named pockets have the lower half, for good; ad hoc ones take what is free in the upper.
_NAMED = COUNT // 2


class Identities:
    """Gives out ids. `path` keeps those of named pockets; a broken file is an error, as ids own files."""

    def __init__(self, path: Path):
        self._path = path
        self._named: dict[str, int] = {}
        self._maps: dict[tuple[int, int, int], int] = {}
        if path.exists():
            try:
                read = json.loads(path.read_text())
                self._named = {str(k): int(v) for k, v in read.items() if FIRST <= int(v) < FIRST + _NAMED}
            except (ValueError, AttributeError, TypeError, OverflowError, RecursionError) as e:
                raise Error(
                    "state", f"{path} is damaged ({e}); mend it, or remove it if no pocket owns files"
                ) from None

    def named(self, name: str) -> int:
        """The id of a named pocket: the same for ever."""
        if name not in self._named:
            taken = set(self._named.values())
            given = {**self._named, name: next(i for i in range(FIRST, FIRST + _NAMED) if i not in taken)}
            self._keep(given)
            self._named = given
        return self._named[name]

    def _keep(self, named: dict[str, int]) -> None:
        """An id that could be given to another pocket after a crash is not given at all. Raises Error."""
        temporary = self._path.with_suffix(".new")
        try:
            with open(temporary, "w") as file:
                file.write(json.dumps(named, indent=1, sort_keys=True))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)
        except OSError as e:
            raise Error("state", f"{self._path} cannot be written: {e.strerror}; make room there") from None

    def ad_hoc(self, used: Collection[int]) -> int:
        """The lowest id that no running pocket has: its id maps are at hand, and no file is its own any more."""
        for uid in range(FIRST + _NAMED, FIRST + COUNT):
            if uid not in used:
                return uid
        raise Error("full", f"all {_NAMED} ids of ad hoc pockets are in use")

    def id_map(self, owner: tuple[int, int], uid: int) -> int:
        """A user namespace that shows files of `owner` (uid, gid) as `uid`'s. The descriptor stays ours; it is made
        once."""
        key = (*owner, uid)
        if key not in self._maps:
            while len(self._maps) >= 256:
                os.close(self._maps.pop(next(iter(self._maps))))
            self._maps[key] = namespaces.id_map(owner, (uid, uid))
        return self._maps[key]
