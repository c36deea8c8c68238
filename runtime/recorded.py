"""What a program looks at before it is held: what each of its runs would have to find the same.

Its arguments and standard input belong to one run alone, so looking at them is refused, by line. Environment variables,
files, the working directory and whether output goes to a terminal are noted: a run for which one of them is otherwise
does not come from this template. Seen is what goes through Python; a library that reads a file or a variable by C alone
is not.
"""

from __future__ import annotations

import gc
import io
import locale
import os
import re
import select
import sys
from functools import partial
from types import FrameType
from typing import Any, Callable, Dict, List, Optional, Set, Tuple

from runtime.interface import TOLD

Identity = Tuple[int, int, int]  # of a file: mtime_ns, size, inode
_WATCHED = 4096  # files whose state is compared at each launch; a program that reads more is refused
_active: Optional["Recorder"] = None
_rehearsing: Optional["Recorder"] = None
_hooked = False


class Ours(BaseException):
    """Raised through a program, for us. Not an Exception: no library is to swallow it."""


class Refused(Ours):
    """The program did what it may not do before it is held."""


class Recorder:
    """Notes from `begin` to `end`. `tops`: directories of the pocket's own files, for the lines in messages. `scratch`:
    directories that were empty at first, such as its own /tmp; `shown`: what is shown of others' beneath them all the
    same; `written`: what of that the pocket may write. `advice`: how a refusal goes on. `program`: it will have
    arguments and an input of its own, which a client's session has not."""

    def __init__(
        self,
        tops: Tuple[str, ...],
        scratch: Tuple[str, ...],
        shown: Tuple[str, ...],
        written: Tuple[str, ...],
        advice: str,
        program: bool,
    ):
        self.tops = tops
        self.scratch = scratch
        self.shown = shown
        self.written = written
        self.advice = advice
        self.program = program
        self.variables: Dict[bytes, Optional[bytes]] = {}  # name -> what the program saw
        self.changes: Dict[bytes, Optional[bytes]] = {}  # what the program itself set, or took away (None)
        self.files: Dict[str, Identity] = {}
        self.libraries: Dict[str, Identity] = {}  # those of the service: they change when something is installed
        self.arguments: List[Tuple[str, List[str]]] = []  # lists that are sys.argv or sys.orig_argv
        self.directory = False  # it asked for the working directory, or went by it
        self.terminal: Set[int] = set()  # descriptors that it asked about
        self.reconfigured: Dict[str, List[Dict[str, Any]]] = {}
        self.made: List[str] = []  # directories that it made
        self.temporary: Dict[str, str] = {}  # what it made by tempfile, and where
        self.noted: List[str] = []  # what may be another thing in a run, and cannot be compared
        self.refused: Optional[str] = None
        self._imported: Set[str] = set()  # before it began
        self._own: Set[bytes] = set()  # variables that a rehearsal has set itself
        self._undo: List[Callable[[], object]] = []
        self._watched: Dict[str, "_Arguments"] = {}

    # -- its beginning and end

    def begin(self) -> None:
        global _active, _hooked
        if not _hooked:
            sys.addaudithook(_heard)  # for good: nothing takes it away again
            _hooked = True
        self._environment()
        if self.program:
            self._arguments()
        self._streams()
        self._functions()
        self._imported = set(sys.modules)
        _active = self

    def begin_rehearsal(self) -> None:
        """From now on what the pocket's own lines read of the environment is noted: they may keep it."""
        global _rehearsing
        self._own.clear()
        self._environment()
        _rehearsing = self

    def end_rehearsal(self) -> None:
        global _rehearsing
        _rehearsing = None
        self._undo_all()

    def _undo_all(self) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def end(self) -> None:
        global _active
        _active = None
        self._undo_all()
        self.made = [path for path in self.made if os.path.isdir(path)]
        for path in list(self.files):  # its own are as it has left them
            if path.startswith(self.scratch) and not path.startswith(self.shown):
                self.files[path] = identity(path)
                if not any(self.files[path]):
                    del self.files[path]
        self._plain_arguments()
        self._forget_generated()
        self._libraries()

    def _forget_generated(self) -> None:
        """Modules that the program itself wrote into its scratch and has imported. A run may remove their files at its
        end, as TensorFlow does with what autograph generated; all others have them in memory."""
        for module in list(sys.modules.values()):
            name = getattr(module, "__file__", None)
            if isinstance(name, str) and name.startswith(self.scratch) and not name.startswith(self.shown):
                self.files.pop(name, None)

    def _libraries(self) -> None:
        """What it imported of the service's: with bytecode that is valid no source is opened."""
        for name in set(sys.modules) - self._imported:
            file = getattr(sys.modules[name], "__file__", None)
            if isinstance(file, str) and file.startswith(_LIBRARIES) and not file.startswith(self.tops):
                if len(self.libraries) < 4 * _WATCHED:
                    self.libraries.setdefault(file, identity(file))

    def _set(self, holder: Any, name: str, value: Any) -> Any:
        """Replace an attribute until the end. Returns what it was."""
        old = getattr(holder, name)
        setattr(holder, name, value)
        self._undo.append(lambda: setattr(holder, name, old) if getattr(holder, name, None) is value else None)
        return old

    # -- what is noted

    def _environment(self) -> None:
        for mapping in (os.environ, os.environb):
            plain: Any = type(mapping)
            mapping.__class__ = _watched(plain)
            self._undo.append(partial(setattr, mapping, "__class__", plain))

    def saw_variable(self, name: bytes, value: Optional[bytes]) -> None:
        if name in self.changes or (name in _SIZE and _only_for_checks(sys._getframe(2))):
            return
        self.variables.setdefault(name, value)

    def saw_in_rehearsal(self, name: bytes, value: Optional[bytes]) -> None:
        if name not in self._own and self.line(sys._getframe(2), near=True):
            self.saw_variable(name, value)

    def sets_in_rehearsal(self, name: bytes) -> None:
        self._own.add(name)  # each run does

    def saw_environment(self) -> None:
        """All of it: a program that looks at it as a whole depends on everything. Libraries do so for subprocesses, and
        a few for what they go by."""
        frame = sys._getframe(2)
        line = self.line(frame, near=True)
        if line:
            self.refuse(f"it reads the whole environment{line}")
        while os.path.basename(frame.f_code.co_filename) in (*_BETWEEN, "<frozen _collections_abc>") and frame.f_back:
            frame = frame.f_back
        if os.path.basename(frame.f_code.co_filename) != "subprocess.py":
            self.noted.append(f"{frame.f_code.co_filename}, line {frame.f_lineno}, reads the whole environment")

    def _arguments(self) -> None:
        for name in ("argv", "orig_argv"):
            watched = self._watched[name] = _Arguments(getattr(sys, name))
            setattr(sys, name, watched)

    def _plain_arguments(self) -> None:
        """A plain list in the place of each that was watched, also where the program has kept it by a name: one of our
        own type could not be pickled, as multiprocessing does."""
        for name, watched in self._watched.items():
            plain = list(watched)
            if getattr(sys, name) is watched:
                setattr(sys, name, plain)
            for holder in gc.get_referrers(watched):
                if isinstance(holder, dict) and holder is not self._watched:
                    holder.update({key: plain for key, value in holder.items() if value is watched})
            self.arguments += [(name, plain), (name, watched)]
        self._watched.clear()

    def fill(self, name: str, words: List[str]) -> None:
        """Set sys.argv or sys.orig_argv, whatever else the program may have them by."""
        for known, kept in self.arguments:
            if known == name:
                kept[:] = words

    def _streams(self) -> None:
        for fd, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
            stream: Any = getattr(sys, name)
            for layer in (stream, stream.buffer, getattr(stream.buffer, "raw", stream.buffer)):
                layer.isatty = partial(self.asked, fd)
                self._undo.append(partial(layer.__dict__.pop, "isatty", None))
            if name == "stdin" and self.program:
                for method in ("read", "readline", "readlines"):
                    setattr(stream, method, partial(self._reads_input, getattr(stream, method)))
                    self._undo.append(partial(stream.__dict__.pop, method, None))
            elif name != "stdin":
                done = self.reconfigured.setdefault(name, [])
                stream.reconfigure = _noting(stream, done)
                self._undo.append(partial(stream.__dict__.pop, "reconfigure", None))

    def asked(self, fd: int) -> bool:
        if _active is not self:  # a program may have kept what asks
            return _isatty(fd)
        if not _only_for_checks(sys._getframe(1)):
            self.terminal.add(fd)
        return False

    def _reads_input(self, plain: Any = None, *args: Any, **kwargs: Any) -> Any:
        if _active is not self:
            return plain(*args, **kwargs)
        self.refuse(f"it reads standard input{self.line(sys._getframe(1))}")

    def _functions(self) -> None:
        size, getcwd, setlocale = os.get_terminal_size, os.getcwd, locale.setlocale

        def tty(fd: int) -> bool:
            return self.asked(fd) if fd in (0, 1, 2) else _isatty(fd)

        def terminal(fd: int = 1) -> os.terminal_size:
            if fd in (0, 1, 2):
                self.asked(fd)
            return size(fd)

        def directory() -> str:
            self.directory = True
            return getcwd()

        self._set(os, "isatty", tty)
        self._set(os, "get_terminal_size", terminal)

        def localized(category: int, name: Any = None) -> str:
            if name == "" and _active is self:  # by the environment, which C reads
                for variable in _LOCALE:
                    os.environb.get(variable)
            return setlocale(category, name)

        self._set(os, "getcwd", directory)
        for name in ("stat", "lstat", "access", "fstat", "readlink"):
            self._looks(name)
        self._waits()
        self._terminals()
        self._set(locale, "setlocale", localized)

    def _looks(self, name: str) -> None:
        """Whether there is something of a relative name, and what, depends on the directory; and what a standard stream
        is, on its caller. (No audit event tells.)"""
        plain = getattr(os, name)

        def looks(*args: Any, **kwargs: Any) -> Any:
            path = args[0] if args else kwargs.get("path", kwargs.get("fd"))
            if _active is self and (_STREAM.fullmatch(path) if isinstance(path, str) else path in (0, 1, 2)):
                self.looks_at_stream(path, sys._getframe(1))
            elif _active is self and not isinstance(path, int) and kwargs.get("dir_fd") is None:
                self._named(path if path is None else os.fspath(path))
            return plain(*args, **kwargs)

        self._set(os, name, looks)
        for able in (os.supports_dir_fd, os.supports_fd, os.supports_follow_symlinks, os.supports_effective_ids):
            if plain in able:
                able.add(looks)

    def looks_at_stream(self, which: Any, frame: FrameType) -> None:
        """By a line of the pocket's own. A library that does so makes a stream of its own, as logging does."""
        while os.path.basename(frame.f_code.co_filename) in _OF_PATHS and frame.f_back:
            frame = frame.f_back
        line = self.line(frame, near=True)
        if line and self.program:
            self.refuse(f"it looks at what its descriptor {str(which)[-1]} is{line}")

    def _waits(self) -> None:
        """For standard input, with something in it or at its end by then."""
        plain = select.select

        def selects(readable: Any, *others: Any) -> Any:
            readable = list(readable)
            if _active is self and self.program and any(_number(f) == 0 for f in readable):
                self.refuse(f"it waits for standard input{self.line(sys._getframe(1))}")
            return plain(readable, *others)

        self._set(select, "select", selects)

    def _terminals(self) -> None:
        try:
            import termios
        except ImportError:
            return
        for name in ("tcgetattr", "tcsetattr"):
            self._asks(termios, name, getattr(termios, name))

    def _asks(self, termios: Any, name: str, plain: Any) -> None:
        def asks(fd: Any, *args: Any) -> Any:
            if _active is self and _number(fd) in (0, 1, 2):
                self.asked(int(_number(fd)))
            return plain(fd, *args)

        self._set(termios, name, asks)

    def listed(self, path: Any) -> None:
        """A directory's names: those of the one that it is in, if it says none."""
        self._named("." if path is None else path)

    def made_temporary(self, path: Any) -> None:
        """By tempfile, and by a line of the pocket's own: what a library needs of that kind all runs can share."""
        line = self.line(sys._getframe(2), near=True)
        if line and isinstance(path, str):
            self.temporary[path] = line

    def left_temporary(self) -> Optional[str]:
        """Of what is made in each run, the first that is there at the checkpoint."""
        return next((f"{path}{line}" for path, line in self.temporary.items() if os.path.lexists(path)), None)

    def opened(self, path: Any, flags: int) -> None:
        """A file is about to be opened: its state is what the program will have seen."""
        if self.program and is_input(path):
            self._reads_input()
        if path in _ARGUMENTS:
            self.refuse(f"it reads {path}{self.line(sys._getframe(1))}")
        name = self._named(path)
        if name is None or _is_bytecode(name):
            return
        if flags & os.O_ACCMODE != os.O_RDONLY:
            self.changed(name, "writes")
        if name in self.files or flags & os.O_ACCMODE == os.O_WRONLY or name.startswith(_NOT_FILES):
            return
        if name.startswith(_LIBRARIES) and not name.startswith(self.tops):
            if name not in self.libraries and len(self.libraries) < 4 * _WATCHED:
                self.libraries[name] = identity(name)
            return
        if len(self.files) >= _WATCHED:
            self.refuse(f"it reads more than {_WATCHED} files")
        self.files[name] = identity(name)

    def changed(self, path: Any, does: str) -> None:
        """What the pocket is shown is not to be changed: each run would do it anew, and this is done once."""
        name = self._named(path)
        if name is not None and name.startswith(self.shown):
            self.refuse(f"it {does} {name}{self.line(sys._getframe(1))}")

    def entered(self, path: Any) -> None:
        """It changes its directory, each run again (runtime.carried)."""
        self._named(path)

    def made_directory(self, path: Any) -> None:
        name = self._named(path)
        if name is None or os.path.basename(name) == "__pycache__":
            return
        if name.startswith(self.shown) or (name.startswith(self.scratch) and self.line(sys._getframe(2), near=True)):
            self.made.append(name)  # makedirs(exist_ok=True) is what programs do; each run would find it there

    def connected(self, path: Any) -> None:
        """sqlite3: what is done in a database is done once."""
        name = self._named(path)
        if name is not None and name.startswith(self.written):
            self.refuse(f"it opens the database {name}{self.line(sys._getframe(1))}")

    def _named(self, path: Any) -> Optional[str]:
        if not isinstance(path, (str, bytes)):
            return None  # a descriptor
        name = os.fsdecode(path)
        if not name.startswith("/"):
            self.directory = True
            name = os.path.join(_getcwd(), name)
        return name

    # -- words

    def refuse(self, what: str) -> None:
        self.refused = self.refused or f"{what} {self.advice}"
        raise Refused(self.refused)

    def line(self, frame: Optional[FrameType], near: bool = False) -> str:
        """ " in detect.py, line 5": the innermost of the pocket's own lines. `near`: only if it calls us itself."""
        own = own_frame(frame, self.tops, near)
        return f" in {own.f_code.co_filename}, line {own.f_lineno}" if own else ""

    # -- later, in a child

    def libraries_outdated(self) -> Optional[str]:
        """The first file of the service's that is another by now. There may be thousands, so they are not looked at
        before a fork but after one."""
        return next((path for path, known in self.libraries.items() if identity(path) != known), None)

    def outdated(self) -> Optional[str]:
        """The first file that is not any more what the program read."""
        for path, known in self.files.items():
            if identity(path) != known:
                return path
        return next((path for path in self.made if not os.path.isdir(path)), None)

    def differing(self, environment: Dict[bytes, bytes]) -> Optional[str]:
        """The first variable that the program read and that a caller has otherwise."""
        for name, value in self.variables.items():
            if environment.get(name) != value:
                return os.fsdecode(name)
        return None


_getcwd, _isatty = os.getcwd, os.isatty
# Between whoever does something and us.
_BETWEEN = ("os.py", "<frozen os>", "_collections_abc.py", "recorded.py", "observed.py", "tempfile.py")
_SIZE = (b"COLUMNS", b"LINES")
_LOCALE = (b"LC_ALL", b"LC_CTYPE", b"LC_COLLATE", b"LC_TIME", b"LC_MONETARY", b"LC_NUMERIC", b"LC_MESSAGES", b"LANG")
_INPUT = ("/dev/stdin", "/proc/self/fd/0")
_STREAM = re.compile(r"/dev/fd/[012]|/proc/(?:self|thread-self|[0-9]+)/fd/[012]")
_OF_PATHS = ("posixpath.py", "<frozen posixpath>", "genericpath.py", "<frozen genericpath>", "pathlib.py")
_ARGUMENTS = ("/proc/self/cmdline", "/proc/self/environ")
# What Python itself does on the way from a pocket's line to us.
_NOT_FILES = ("/proc/", "/dev/", "/sys/", "/run/pocketd/")
_LIBRARIES = tuple(f"{p}/" for p in dict.fromkeys((sys.prefix, sys.base_prefix, sys.exec_prefix, "/usr", "/lib")))
# sys.audit's events of what changes files, with what the program does then.
_CHANGES = {
    "os.remove": "removes", "os.rename": "renames", "os.rmdir": "removes", "os.link": "makes", "os.symlink": "makes",
    "os.truncate": "truncates", "os.chmod": "changes", "os.utime": "changes",
}  # fmt: skip


def _only_for_checks(frame: Optional[FrameType]) -> bool:
    """Whether argparse asks how wide its help would be, which it asks anew when it is to print some: its parser makes a
    formatter to check each argument that it is told of."""
    while frame is not None and os.path.basename(frame.f_code.co_filename) in _OF_SIZE:
        if frame.f_code.co_name in ("add_argument", "add_subparsers"):
            return True
        frame = frame.f_back
    return False


_OF_SIZE = ("argparse.py", "shutil.py", *_BETWEEN)


def own_frame(frame: Optional[FrameType], tops: Tuple[str, ...], near: bool = False) -> Optional[FrameType]:
    """The innermost frame of the pocket's own lines, from `frame` on. `near`: only if it calls us itself."""
    steps = 0
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(tops):
            return frame
        if near and os.path.basename(name) not in _BETWEEN:
            steps += 1
            if steps > 1:
                return None
        frame = frame.f_back
    return None


def _number(file: Any) -> int:
    """Of a descriptor or of what has one; -1 where there is none."""
    try:
        return file if isinstance(file, int) else int(file.fileno())
    except Exception:
        return -1


def is_input(path: Any) -> bool:
    """Whether what is opened by this is standard input: its descriptor, or a name of it."""
    return path in _INPUT or (path == 0 and not isinstance(path, bool))


def _is_bytecode(path: str) -> bool:
    """Made by whoever runs the program first, and no more than its sources say."""
    return os.path.basename(os.path.dirname(path)) == "__pycache__"


def identity(path: str) -> Identity:
    try:
        s = os.stat(path)
    except OSError:
        return (0, 0, 0)
    return (s.st_mtime_ns, s.st_size, s.st_ino)


def _heard(event: str, arguments: Tuple[Any, ...]) -> None:
    recorder = _active
    if recorder is None:
        return
    if event == "open":
        path, _, flags = arguments
        recorder.opened(path, flags if isinstance(flags, int) else 0)
    elif event == "os.chdir":
        recorder.entered(arguments[0])
    elif event == "os.mkdir":
        recorder.made_directory(arguments[0])
    elif event in ("os.listdir", "os.scandir"):
        recorder.listed(arguments[0])
    elif event in ("tempfile.mkdtemp", "tempfile.mkstemp"):
        recorder.made_temporary(arguments[0])
    elif event == "sqlite3.connect":
        recorder.connected(arguments[0])
    elif event in ("os.link", "os.symlink"):  # of the two names the one that is made
        recorder.changed(arguments[1], _CHANGES[event])
    elif event in _CHANGES:
        recorder.changed(arguments[0], _CHANGES[event])


def _noting(stream: io.TextIOWrapper, done: List[Dict[str, Any]]) -> Callable[..., None]:
    plain = type(stream).reconfigure

    def reconfigure(**how: Any) -> None:
        plain(stream, **how)
        done.append(how)

    return reconfigure


class _Arguments(list):  # type: ignore[type-arg]
    """sys.argv: the program's own name may be asked for, and nothing else. Filled in place in each child."""

    def _look(self, key: Any = None) -> None:
        if _active is not None and key != 0:
            _active.refuse(f"it reads its arguments{_active.line(sys._getframe(2))}")

    def __getitem__(self, key: Any) -> Any:
        self._look(key)
        return super().__getitem__(key)

    __hash__ = None


def _looking(plain: Any) -> Any:
    def method(self: _Arguments, *args: Any, **kwargs: Any) -> Any:
        self._look()
        return plain(self, *args, **kwargs)

    return method


# What of a list looks at its items, or changes them; __getitem__ is not one of these, as an item may be looked at.
LOOKS = (
    "__add__ __contains__ __delitem__ __eq__ __ge__ __gt__ __iadd__ __imul__ __iter__ __le__ __len__ __lt__ __mul__ "
    "__ne__ __repr__ __reversed__ __setitem__ append clear copy count extend index insert pop remove reverse sort"
).split()
for _name in LOOKS:
    setattr(_Arguments, _name, _looking(getattr(list, _name)))


def _watched(plain: Any) -> Any:
    class Environment(plain):  # type: ignore[misc]
        def __getitem__(self, key: Any) -> Any:
            recorder = _active
            try:
                value = super().__getitem__(key)
            except KeyError:
                value = None
            if recorder is not None:
                recorder.saw_variable(os.fsencode(key), None if value is None else os.fsencode(value))
                if value is None and os.fsdecode(key) in TOLD:  # polars adds to what there is, and puts it here
                    told = TOLD[os.fsdecode(key)]
                    return told if isinstance(key, str) else os.fsencode(told)
            elif _rehearsing is not None:
                _rehearsing.saw_in_rehearsal(os.fsencode(key), None if value is None else os.fsencode(value))
            if value is None:
                raise KeyError(key) from None
            return value

        def __setitem__(self, key: Any, value: Any) -> None:
            super().__setitem__(key, value)
            if _active is not None:
                said = os.fsencode(value)
                if os.fsdecode(key) in TOLD:
                    said = said.removesuffix(os.fsencode(f",{TOLD[os.fsdecode(key)]}"))
                _active.changes[os.fsencode(key)] = said
            elif _rehearsing is not None:
                _rehearsing.sets_in_rehearsal(os.fsencode(key))

        def __delitem__(self, key: Any) -> None:
            super().__delitem__(key)
            if _active is not None:
                _active.changes[os.fsencode(key)] = None
            elif _rehearsing is not None:
                _rehearsing.sets_in_rehearsal(os.fsencode(key))

        def __iter__(self) -> Any:
            if _active is not None:
                _active.saw_environment()
            return super().__iter__()

        def __len__(self) -> int:
            if _active is not None:
                _active.saw_environment()
            return len(self._data)

        def __repr__(self) -> str:
            if _active is not None:
                _active.saw_environment()
            return str(super().__repr__())

        def copy(self) -> Any:
            if _active is not None:
                _active.saw_environment()
            return super().copy()

    Environment.__name__ = plain.__name__
    Environment.__qualname__ = plain.__qualname__
    return Environment
