"""What follows a checkpoint, run once in the template on a sample, so that all it needs is warm, and leaves no trace.

What the run bound in the program's own modules, set in the interpreter, or wrote to files is undone. What cannot be
seen, such as an item in a list that was there before, shows in the proof: the sample is run by a child of the template
as it was before, and by one as it is afterwards, and both must do the same to the byte. For a program of which no two
runs do, that is tried again with more children before.
"""

from __future__ import annotations

import atexit
import hashlib
import math
import os
import re
import select
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

from nsutil import clone
from runtime import recorded

TIMEOUT = 60.0  # seconds for a run of the sample
BARE = 10.0  # seconds for one without arguments, which most programs end at once
_PRINTED = 1 << 20  # bytes of output that are compared
_FILE = 16 << 20  # bytes of a written file that are compared
_FILES = 1000


class Over(recorded.Ours):
    """The rehearsal has got as far as it was to: raised in the midst of it, past every `except Exception`."""


class Failed(Exception):
    """The sample cannot be rehearsed; the text says why. `unlike`: a run was not as one before it, maybe by itself."""

    def __init__(self, why: str, unlike: bool = False):
        super().__init__(why)
        self.unlike = unlike


class Outcome(NamedTuple):
    """What a run of the sample did."""

    status: int
    out: bytes
    err: bytes
    files: Dict[str, Tuple[int, str]]  # mode and digest of what it wrote


# Times, as programs print them: dates, clocks, "45ms/step", heads of lines of absl's log, with its thread's number; and
# addresses, as an object without a text of its own has one.
_TIMES = re.compile(
    rb"[IWEF][0-9]{4} [0-9]{2}:[0-9]{2}:[0-9]+\.[0-9]+ +[0-9]+"
    rb"|[0-9]{4}-[0-9]{2}-[0-9]{2}|[0-9]{1,2}:[0-9]{2}:[0-9]{2}(?:[.,][0-9]+)?"
    rb"|(?<![0-9])[0-9]+(?:\.[0-9]+)? ?(?:ns|us|\xc2\xb5s|ms|s|sec|seconds?)(?:/[a-z]+)?(?![A-Za-z0-9])"
    rb"|\bat 0x[0-9a-f]{8,16}\b"
)
_WORD = re.compile(rb"[ \t]*[\w.+-]+|[ \t]*.", re.DOTALL)


class Proof(NamedTuple):
    """What a run of the sample must do: as the runs before the rehearsal did. Where there were several, words and files
    in which they differ, times and random numbers for one, differ by themselves and are not compared."""

    before: List[Outcome]
    endless: bool = False  # each run was ended after some seconds, and has come as far as it could

    def difference(self, after: Outcome) -> Optional[str]:
        """The first thing in which a run from the rehearsed template is not as from the other one."""
        first = self.before[0]
        if after.status != first.status:
            said = after.err.strip().splitlines()[-1:] if after.status else []
            words = f"; the last that it said is {_shown(said[0])}" if said else ""
            return f"its exit status is {after.status} instead of {first.status}{words}"
        for name in ("out", "err"):
            given = [getattr(outcome, name) for outcome in (*self.before, after)]
            if not _alike(given, self.endless):
                stream = {"out": "standard output", "err": "standard error"}[name]
                return f"its {stream} is not the same: {_unlike(given[0], given[-1])}"
        of_all = [path for path in first.files if all(path in o.files for o in self.before)]
        for path in of_all:
            known = [o.files[path] for o in self.before]
            found = after.files.get(path)
            varies = self.endless or len(set(known)) > 1
            if found is None or found[0] != known[0][0] or not (varies or found in known):
                return f"it does not write the same to {path}"
        others = [[path for path in sorted(o.files) if path not in of_all] for o in (first, after)]
        if [os.path.dirname(path) for path in others[0]] != [os.path.dirname(path) for path in others[1]]:
            return f"it does not write the same to {(others[1] or others[0])[0]}"
        return None

    @property
    def shows_chance(self) -> bool:
        """Whether more runs before the rehearsal may show more that differs by itself: one shows nothing of that, and
        of several that are the same it can be said that there is none."""
        return len(self.before) == 1 or any(outcome != self.before[0] for outcome in self.before)

    def left_out(self, after: Outcome) -> Optional[str]:
        """What was not compared, in words; None where all was."""
        if len(self.before) > 1:
            return "no two runs of its sample do the same: where they differ, the rehearsal's proof could not look"
        if (after.out, after.err) != (self.before[0].out, self.before[0].err):
            return "its output has times or addresses in it, which the rehearsal's proof left out"
        return None


def _alike(outputs: List[bytes], endless: bool) -> bool:
    """Whether the last says the same as all others, but for times, and for words in which those differ; endless, as far
    as all have come."""
    if len(set(outputs)) == 1:
        return True
    if endless:
        outputs = [text[: text.rfind(b"\n") + 1] or text for text in outputs]
    *before, after = [_words(text, len(outputs) > 2) for text in outputs]
    least = min(map(len, before)) // 2  # a run that hangs after its rehearsal says nothing more
    if len(after) < least if endless else any(len(words) != len(after) for words in before):
        return False
    return all(words[-1] in words[:-1] or len(set(words[:-1])) > 1 for words in zip(*before, after))


def _words(text: bytes, loose: bool) -> List[bytes]:
    """Loose: without blanks, of which a column has more or less beside what differs."""
    words = _WORD.findall(_TIMES.sub(b"TIME", text))
    return [bare for bare in (word.strip(b" \t") for word in words) if bare] if loose else words


def _unlike(a: bytes, b: bytes) -> str:
    for x, y in zip(a.splitlines() + [b""], b.splitlines() + [b""]):
        if _TIMES.sub(b"TIME", x) != _TIMES.sub(b"TIME", y):
            return f"{_shown(y)} instead of {_shown(x)}"
    return f"{len(b)} bytes instead of {len(a)}"


def _shown(line: bytes) -> str:
    return repr(line[:100].decode(errors="replace"))


# -- files


class Places:
    """Directories in which runs may write: what is there, so that what they wrote is seen and removed. What is mounted
    beneath them, such as a pocket's directory in /tmp, is another place."""

    def __init__(self, directories: Tuple[str, ...]):
        self.directories = directories
        self.before = dict(self._all())

    def _all(self) -> Iterator[Tuple[str, Tuple[int, int, int, int]]]:
        for top in self.directories:
            device = _device(top)
            for here, directories, files in os.walk(top):
                directories[:] = [name for name in directories if _device(os.path.join(here, name)) == device]
                for name in (*directories, *files):
                    path = os.path.join(here, name)
                    try:
                        s = os.lstat(path)
                    except OSError:
                        continue
                    of_file = (0, 0, 0) if name in directories else (s.st_ino, s.st_mtime_ns, s.st_size)
                    yield path, (s.st_mode, *of_file)

    def written(self) -> Dict[str, Tuple[int, str]]:
        """What is new or changed: mode and digest by path. Bytecode that Python keeps of what it imported does not
        count: a run after a rehearsal need not import, and so not write, what AutoGraph for one makes in /tmp."""
        found: Dict[str, Tuple[int, str]] = {}
        for path, known in self._all():
            if self.before.get(path) != known and len(found) < _FILES and "__pycache__" not in path.split("/"):
                found[path] = (known[0], _digest(path))
        for path in set(self.before) - {path for path, _ in self._all()}:
            found[path] = (0, "removed")
        return found

    def clear(self, until: float = math.inf) -> None:
        """Remove what is new and was changed before `until`, by the clock of files' times (CLOCK_REALTIME_COARSE)."""
        new = sorted((path for path, _ in self._all() if path not in self.before), reverse=True)
        for path in [path for path in new if _changed(path) < until]:  # all are looked at before one is removed
            try:
                os.rmdir(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)
            except OSError:
                pass


def _device(path: str) -> int:
    """Of the mount that has a directory; of a bind mount it is its file system's, and what holds scratch is a tmpfs."""
    try:
        return os.lstat(path).st_dev
    except OSError:
        return -1


def _changed(path: str) -> float:
    try:
        return os.lstat(path).st_ctime
    except OSError:
        return math.inf


def _digest(path: str) -> str:
    if os.path.islink(path):
        return os.readlink(path)
    if not os.path.isfile(path):
        return ""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as f:
            digest.update(f.read(_FILE))
    except OSError:
        return "unreadable"
    return digest.hexdigest()


# -- runs


def capture() -> Tuple[int, int]:
    """Two files for a run's output, the caller's."""
    return os.memfd_create("stdout", os.MFD_CLOEXEC), os.memfd_create("stderr", os.MFD_CLOEXEC)


def trial(places: Places, become: Callable[[int, int], None], seconds: float = TIMEOUT) -> Optional[Outcome]:
    """Run the sample in a child: None there, once `become(out, err)` has made it the run; in the template, what it did.

    Raises Failed when it takes too long.
    """
    out, err = capture()
    noticed = unnoticed()
    try:
        child = clone.live_fork()
    except OSError as e:
        noticed()
        raise Failed(f"the template could not fork: {e}") from None
    if child is None:
        noticed()
        become(out, err)
        return None
    try:
        try:
            status = _wait(child, seconds)
        except Failed as e:
            raise Failed(f"{e}{_last(out)}{_last(err)}") from None
        code = os.waitstatus_to_exitcode(status)
        return Outcome(code, os.pread(out, _PRINTED, 0), os.pread(err, _PRINTED, 0), places.written())
    finally:
        for fd in (out, err, child.pidfd):
            os.close(fd)
        noticed()
        places.clear()


def unnoticed() -> Callable[[], object]:
    """Let children of ours end without a word to a handler of the program's; gives what undoes that."""
    handler = signal.getsignal(signal.SIGCHLD)
    if handler in (None, signal.SIG_DFL):
        return lambda: None
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return lambda: signal.signal(signal.SIGCHLD, handler)


def _last(fd: int) -> str:
    """The last of what a run printed, as lines."""
    size = os.fstat(fd).st_size
    said = os.pread(fd, 2000, max(0, size - 2000)).decode(errors="replace")
    return f"\n{said}" if said else ""


def _wait(child: clone.Child, seconds: float) -> int:
    try:
        return _ended(child, seconds)
    except ChildProcessError:
        raise Failed("a thread of the program waits for all children: how the sample ended is lost") from None


def _ended(child: clone.Child, seconds: float) -> int:
    if not select.select([child.pidfd], [], [], seconds)[0]:
        os.kill(child.pid, signal.SIGKILL)
        os.waitpid(child.pid, 0)
        raise Failed(
            f"the sample did not end within {seconds:.0f} s, nor come to what rehearse_until may name: when a "
            "rehearsal is over, if it does not end by itself (by a BaseException, which no `except` may keep)"
        )
    return os.waitpid(child.pid, 0)[1]


class Until:
    """When a rehearsal is over before the program ends: at its first output, after some seconds, or when it says so."""

    def __init__(self, until: Optional[str]):
        self.until = until
        self._undo: List[Callable[[], object]] = []
        self._seconds = float(until) if until and until not in ("output", "rehearsed") else 0.0

    @property
    def is_a_time(self) -> bool:
        return self._seconds > 0

    def begin(self) -> None:
        if self.until == "output":
            for name in ("stdout", "stderr"):
                self._tap(getattr(sys, name))
        elif self._seconds:
            before = signal.signal(signal.SIGALRM, _over)
            signal.setitimer(signal.ITIMER_REAL, self._seconds)
            self._undo += [
                lambda: signal.setitimer(signal.ITIMER_REAL, 0),
                lambda: signal.signal(signal.SIGALRM, before),
            ]

    def _tap(self, stream: Any) -> None:
        plain = stream.write

        def write(text: str) -> Any:
            done = plain(text)
            stream.flush()
            if "\n" in text and threading.current_thread() is threading.main_thread() and _has_a_caller():
                raise Over
            return done

        stream.write = write
        self._undo.append(lambda: stream.__dict__.pop("write", None))

    def end(self) -> None:
        for undo in self._undo:
            undo()
        self._undo.clear()


def _has_a_caller() -> bool:
    """Whether a line of the program printed it: the interpreter, which shows a traceback, is not interrupted."""
    try:
        return os.path.dirname(sys._getframe(2).f_code.co_filename) != os.path.dirname(__file__)
    except ValueError:
        return False


def _over(*_: object) -> None:
    raise Over


class Exits:
    """What the pocket's own code registers by atexit during a rehearsal, or takes back, each run does again: it is
    dropped.

    It is there from `begin`, before the program may keep the function by another name, to `end`.
    """

    def __init__(self, tops: Tuple[str, ...]):
        self._tops = tops
        self._plain: Any = atexit.register
        self._plain_unregister: Any = atexit.unregister
        self.dropping = False

    def begin(self) -> None:
        atexit.register = self._register  # type: ignore[assignment]
        atexit.unregister = self._unregister

    def end(self) -> None:
        atexit.register = self._plain
        atexit.unregister = self._plain_unregister

    def _register(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        if self.dropping and sys._getframe(1).f_code.co_filename.startswith(self._tops):
            return function
        return self._plain(function, *args, **kwargs)

    def _unregister(self, function: Any) -> None:
        if not self.dropping:
            self._plain_unregister(function)


def settle_threads(before: Set[threading.Thread], tops: Tuple[str, ...], seconds: float = 2.0) -> None:
    """Let threads that the run started and that end by themselves end. One that goes on in the pocket's own code would
    be in each run, beside that which it starts; pools of libraries only wait. Raises Failed."""
    end = time.monotonic() + seconds
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(max(0.0, end - time.monotonic()))
    for thread in set(threading.enumerate()) - before:
        frame = sys._current_frames().get(thread.ident or 0)
        lines = [f for f in frames(frame) if f.f_code.co_filename.startswith(tops)]
        if lines:
            where = f"{lines[0].f_code.co_filename}, line {lines[0].f_lineno}"
            raise Failed(f"the thread {thread.name} that it starts goes on in {where}, and would in each run")


def frames(frame: Optional[FrameType]) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
