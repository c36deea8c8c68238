"""Init's part in what its processes write: templates on their standard error, workers in client mode on their standard
output. It goes to the service's log, a bounded part at a time, as all pockets' launches wait meanwhile."""

from __future__ import annotations

import os
import time
from typing import Callable, Dict

from pocketd.wire import Message
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

    def hear_errors(self, t: Template) -> None:
        t.resting = NEVER
        self.watch(t.stderr, lambda: self.drain(t))

    def drain(self, t: Template) -> bool:
        """Pass on what a template wrote. Its workers may hold the other end too, until they have their own."""
        try:
            text = os.read(t.stderr, _READ)
        except BlockingIOError:
            return False
        if not text:
            self.unwatch(t.stderr)
            return False
        t.tail = (t.tail + text.splitlines())[-40:]
        if t.kind != "pocket":
            self.log.write(f"template-{t.number}", text)
            return True
        t.resting = self.record(f"template-{t.number} of {t.note.get('pocket')}", t.note, text)
        if t.resting < NEVER:
            self.unwatch(t.stderr)
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
        assert s.output is not None
        try:
            text = os.read(s.output, _READ)
        except BlockingIOError:
            return False
        if not text:
            self.unwatch(s.output)
            return False
        s.resting = self.record(f"pocket {s.note.get('pocket', s.id)}", s.note, text)
        if s.resting < NEVER:
            self.unwatch(s.output)
        return True

    def record(self, source: str, note: Message, text: bytes) -> float:
        """Write down what a pocket's process wrote. Returns when it may write more; NEVER where that is now."""
        uid, now = note.get("uid", -1), time.monotonic()
        if uid not in self.said:
            self.said = {other: until for other, until in self.said.items() if until > now}
        written = self.log.write(source, text)
        self.said[uid] = max(self.said.get(uid, now), now) + written / LOG_RATE
        return self.rested(note)

    def rested(self, note: Message) -> float:
        again = self.said.get(note.get("uid", -1), 0.0) - LOG_BURST
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
            last = left[-_LAST[self.rested(s.note) < NEVER] :]
            self.record(f"pocket {s.note.get('pocket', s.id)}", s.note, last)
