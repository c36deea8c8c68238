"""Standard streams of a process that is held: output goes into files, and later the same objects are each run's own.

A program may have kept sys.stdout, or its buffer, by another name, so neither is ever replaced.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import Any, Dict, List, Mapping, Optional, Tuple

from runtime import interpreter

PRINTED = 1 << 20  # bytes that may be printed before the fork, to each stream
_STREAMS = ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w"))


class Streams:
    """`printed`: two files for what is printed, taken over. `reconfigured`: what was asked of each by reconfigure(), as
    it is noted (runtime.recorded). `has_input`: there will be some to read, which is each run's own."""

    def __init__(self, printed: List[int], reconfigured: Mapping[str, List[Dict[str, Any]]], has_input: bool):
        self._into = [-1, *printed]
        self.printed: Dict[int, Tuple[bytes, bytes]] = {}  # what had been written, and what a buffer held
        self._reconfigured = reconfigured
        self._has_input = has_input
        self._objects: Dict[str, Tuple[Any, Any]] = {}
        self._files: Dict[int, int] = {}  # inodes of what 0, 1 and 2 are up to the fork

    def take(self) -> None:
        """Nothing to read, and output into files."""
        for number, name, mode in _STREAMS:
            if mode == "w":
                fd = self._into[number]
            elif not self._has_input:
                fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
            else:
                fd = os.memfd_create(name, os.MFD_CLOEXEC)
            if number == 0 and self._has_input:
                os.write(fd, b"\n")  # so that whoever reads moves the offset
                os.lseek(fd, 0, os.SEEK_SET)
            os.dup2(fd, number)
            os.close(fd)
            self._files[number] = os.fstat(number).st_ino
        interpreter.set_streams()
        for _, name, _ in _STREAMS:
            stream: Any = getattr(sys, name)
            self._objects[name] = (stream, stream.buffer)

    def read(self, fd: int) -> bytes:
        """What was printed so far, and no more than is too much."""
        try:
            return os.pread(fd, PRINTED + 1, 0)
        except OSError:
            return b""  # it was closed

    def keep(self) -> None:
        """Note what was printed."""
        written = {fd: len(self.read(fd)) for fd in (1, 2)}
        interpreter.flush_quietly()
        for text, buffer in self._objects.values():
            for stream in (text, buffer):  # either may be beneath another by now
                with suppress(OSError, ValueError):
                    stream.flush()
        for fd, size in written.items():
            printed = self.read(fd)
            self.printed[fd] = printed[:size], printed[size:]

    def too_much(self) -> bool:
        return any(len(written) + len(held) > PRINTED for written, held in self.printed.values())

    def replaced(self) -> Optional[int]:
        """The first of the three descriptors that is another file by now."""
        return next(
            (fd for fd, i in self._files.items() if not interpreter.is_open(fd) or os.fstat(fd).st_ino != i), None
        )

    def is_read(self) -> bool:
        return os.lseek(0, 0, os.SEEK_CUR) > 0

    def open_ones(self) -> List[str]:
        """Names of those that nobody has closed."""
        found = []
        for name, (text, buffer) in self._objects.items():
            with suppress(ValueError):  # detached
                if not (text.closed or buffer.closed):
                    found.append(name)
        return found

    def open_again(self, names: List[str]) -> None:
        """The same stream objects, where a rehearsal has closed them."""
        encoding = interpreter.stream_encoding()
        for fd, name, mode in _STREAMS:
            text, buffer = self._objects[name]
            if name in names and name not in self.open_ones():
                interpreter.open_stream(text, buffer, fd, name, mode, encoding)
                for how in self._reconfigured.get(name, ()):
                    text.reconfigure(**how)

    # -- in a child

    def restore(self) -> None:
        """The same stream objects, made anew over the descriptors that are there now."""
        encoding = interpreter.stream_encoding()
        for fd, name, mode in _STREAMS:
            text, buffer = self._objects[name]
            if not interpreter.is_open(fd):
                for holder in (name, f"__{name}__"):
                    if getattr(sys, holder) is text:
                        setattr(sys, holder, None)
                continue
            try:
                below = text.buffer
            except ValueError:
                below = None
            if below is None:  # detached: another has been made of its buffer
                if not buffer.closed:
                    buffer.__init__(io.FileIO(fd, mode + "b", closefd=False))
            elif not below.closed:
                interpreter.open_stream(text, buffer, fd, name, mode, encoding)
                for how in self._reconfigured.get(name, ()):
                    text.reconfigure(**how)

    def replay(self) -> None:
        """Print again what was printed, and have in the buffers again what was there."""
        for name, fd in (("stdout", 1), ("stderr", 2)):
            written, held = self.printed[fd]
            text, buffer = self._objects[name]
            try:
                while written:
                    written = written[os.write(fd, written) :]
                if not held:
                    continue
                if buffer.closed or os.environ.get("PYTHONUNBUFFERED"):
                    os.write(fd, held)
                else:
                    buffer.write(held)
                    if text is getattr(sys, name) and text.line_buffering:
                        buffer.flush()
            except (OSError, ValueError):
                pass  # nobody takes it
