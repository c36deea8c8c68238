"""Launches in turn: however many one uid asks for, another's waits for a few of them only.

What makes workers, a service's init and its templates, makes one at a time, so a launch waits for those before it.
"""

from __future__ import annotations

import asyncio

AT_ONCE = 2  # of one uid: the next is prepared while a template forks


class Turns:
    def __init__(self) -> None:
        self._of: dict[int, tuple[int, asyncio.Semaphore]] = {}  # how many have or want one

    async def take(self, uid: int) -> None:
        """Return when a launch of `uid` may go on: at once where it is root's. To be given back however it ends."""
        if not uid:
            return
        count, turns = self._of.get(uid) or (0, asyncio.Semaphore(AT_ONCE))
        self._of[uid] = count + 1, turns
        try:
            await turns.acquire()
        except BaseException:
            self._leave(uid)
            raise

    def give(self, uid: int) -> None:
        if uid:
            self._of[uid][1].release()
            self._leave(uid)

    def _leave(self, uid: int) -> None:
        count, turns = self._of.pop(uid)
        if count > 1:
            self._of[uid] = count - 1, turns
