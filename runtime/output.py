"""Init's part in what its processes write: templates on their standard error, workers in client mode on their standard
output. It goes to the service's log, a bounded part at a time, as all pockets' launches wait meanwhile."""

from __future__ import annotations

import os
import time
from typing import Callable, Dict

from runtime.children import NEVER, Session, Template
from runtime.log import Log
from runtime.sockets import readable

# What workers of one uid may write to the log: bytes in a second, and seconds of these at once. More waits in its pipe.
LOG_RATE, LOG_BURST = 64 << 10, 4.0
_READ, _PIPE = 4 << 10, 64 << 10  # bytes: in one turn, and what a pipe holds (pipe(7))
_LAST = 16 << 10, 1 << 10  # bytes of what a worker left in its pipe; where it has written too much already


class Output:
    """Those methods of Init that are about what is written."""

    log: Log
    said: Dict[int, float]  # by uid, when all that it wrote would have been written at LOG_RATE
    watch: Callable[..., None]
    unwatch: Callable[[int], None]

    def drain(self, t: Template) -> bool:
        """Pass on what a template wrote. Its workers may hold the other end too, until they have their own."""
        try:
            text = os.read(t.stderr, _READ)
        except BlockingIOError:
            return False
        if not text:
            self.unwatch(t.stderr)
            return False
        self.log.write(f"template-{t.number}", text)
        t.tail = (t.tail + text.splitlines())[-40:]
        return True

    def drain_all(self, t: Template) -> None:
        """What is left in the pipe of one that has failed; no more, as its workers may write there for ever."""
        for _ in range(_PIPE // _READ):
            if not readable(t.stderr) or not self.drain(t):
                break

    def hear_worker(self, s: Session) -> None:
        assert s.output is not None
        s.resting = NEVER
        self.watch(s.output, lambda: self.drain_worker(s))

    def drain_worker(self, s: Session) -> bool:
        """Pass on what a worker wrote; a bounded part of it, as all pockets' launches wait meanwhile."""
        assert s.output is not None
        try:
            text = os.read(s.output, _READ)
        except BlockingIOError:
            return False
        if not text:
            self.unwatch(s.output)
            return False
        self.record(s, text)
        s.resting = self.rested(s)
        if s.resting < NEVER:
            self.unwatch(s.output)
        return True

    def record(self, s: Session, text: bytes) -> None:
        uid, now = s.note.get("uid", -1), time.monotonic()
        if uid not in self.said:
            self.said = {other: until for other, until in self.said.items() if until > now}
        written = self.log.write(f"pocket {s.note.get('pocket', s.id)}", text)
        self.said[uid] = max(self.said.get(uid, now), now) + written / LOG_RATE

    def rested(self, s: Session) -> float:
        """When it may write more; NEVER where it has not written too much."""
        again = self.said.get(s.note.get("uid", -1), 0.0) - LOG_BURST
        return again if again > time.monotonic() else NEVER

    def last_words(self, s: Session) -> None:
        assert s.output is not None
        left = b""
        while len(left) < _PIPE and readable(s.output):  # no more: others may have its end, and write for ever
            more = os.read(s.output, _PIPE)
            if not more:
                break
            left += more
        if left:
            self.record(s, left[-_LAST[self.rested(s) < NEVER] :])
