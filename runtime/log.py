"""A bounded log file: one line an event, `TIME SOURCE TEXT`; when it is full its older half goes."""

from __future__ import annotations

import os
import time

LIMIT = 1 << 20
_LONGEST = 4096


class Log:
    """Writes to `fd`, a regular file opened for reading and writing, which stays open for good."""

    def __init__(self, fd: int):
        self.fd = fd
        self.size = os.lseek(fd, 0, os.SEEK_END)

    def write(self, source: str, text: bytes) -> int:
        """Add each line of `text`, of less than half a LIMIT, as one event; how many bytes that were.

        A disk that is full loses lines, not the service.
        """
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        head = f"{stamp} {source} ".encode()
        lines = b"".join(head + line[:_LONGEST] + b"\n" for line in text.splitlines())
        try:
            if self.size + len(lines) > LIMIT:
                self.shorten()
            self.size += os.write(self.fd, lines)
        except OSError:
            pass
        return len(lines)

    def shorten(self) -> None:
        kept = os.pread(self.fd, LIMIT // 2, self.size - LIMIT // 2)
        kept = kept[kept.find(b"\n") + 1 :]
        os.pwrite(self.fd, kept, 0)
        os.ftruncate(self.fd, len(kept))
        self.size = os.lseek(self.fd, len(kept), os.SEEK_SET)
