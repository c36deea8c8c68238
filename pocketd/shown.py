"""What a pocket sees of files: detached trees, each with the place where its worker attaches it."""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from nsutil import processes
from nsutil.beneath import open_as_named
from pocketd import events, paths, permissions, trees, wire
from pocketd.definitions import Pocket
from pocketd.identities import Identities
from pocketd.wire import Error, Message

MOST = 22  # each is a descriptor of a launch's messages, which have some ten others (nsutil.messages.MAX_FDS)


@dataclass
class _Shown:
    """What a pocket sees, as trees with the place of each."""

    identities: Identities
    uid: int | None  # whose its owner's files are shown as
    stack: ExitStack
    found: list[tuple[int, Message]] = field(default_factory=list)

    def add(self, tree: trees.Tree, target: str, writable: bool, alias: str | None = None) -> None:
        self.stack.callback(os.close, tree.fd)
        if len(self.found) == MOST:
            raise Error(
                "mount", f"a pocket is shown at most {MOST} files and directories, its own directory one of them"
            )
        if self.uid is not None:
            trees.show_as(tree, self.uid, self.identities)
        place = {"target": target, "alias": alias, "directory": tree.directory, "writable": writable}
        self.found.append((tree.fd, place))


async def callers_files(
    identities: Identities,
    uid: int | None,
    peer: processes.Peer,
    request: Message,
    given: dict[str, Any],
    stack: ExitStack,
) -> list[tuple[int, Message]]:
    """What an ad hoc run's caller sent, its directory first. `uid`: whose its owner's files are shown as."""
    shown = _Shown(identities, uid, stack)
    if "dir" not in given:
        raise Error("bad-request", "an ad hoc run sends its directory")
    foreign = not _same_mounts(peer)
    directory = str(request.get("path")) if foreign else os.readlink(f"/proc/self/fd/{given['dir']}")
    _refuse(directory)
    shown.add(await trees.make_of(peer, given["dir"], writable=True), directory, True, "/pocket")
    for fd, mount in zip(given["mount"], wire.field(request, "mounts", list, []), strict=False):
        target = os.fsdecode(wire.field(mount, "target", bytes))
        writable = wire.field(mount, "writable", bool, False)
        source = target if foreign else os.readlink(f"/proc/self/fd/{fd}")
        try:
            paths.parse_mount(f"{source}:{target}{':rw' if writable else ''}")
        except ValueError as e:
            raise Error("mount", f"--mount {source}:{target} {e}") from None
        shown.add(await trees.make_of(peer, fd, writable=writable), target, writable)
    return shown.found


def defined_files(
    identities: Identities, definition: Pocket, uid: int | None, stack: ExitStack
) -> list[tuple[int, Message]]:
    """The same of a pocket that has a definition, whoever runs it."""
    shown = _Shown(identities, uid, stack)
    fd = _open(definition.dir, os.O_PATH | os.O_DIRECTORY)
    stack.callback(os.close, fd)
    top, owner = os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd).st_uid
    shown.add(trees.make(fd, writable=False), str(definition.dir), False, "/pocket")
    for name in definition.allow.write:
        path = permissions.writable(fd, name)
        stack.callback(os.close, path)
        name = os.path.relpath(os.readlink(f"/proc/self/fd/{path}"), top)  # where links beneath it lead
        tree = trees.make(path, writable=True)
        if uid is not None and tree.uid not in (uid, owner):
            os.close(tree.fd)
            text = f"{name} in {definition.dir} does not belong to that directory's owner, so it is not the pocket's"
            raise Error("directory", f"{text} to write; change its owner")
        shown.add(tree, f"{definition.dir}/{name}", True, f"/pocket/{name}")
    for m in definition.mounts:
        source = _open(m.source, os.O_PATH)
        stack.callback(os.close, source)
        shown.add(trees.make(source, writable=m.writable), str(m.target), m.writable)
    return shown.found


def _open(path: os.PathLike[str], flags: int) -> int:
    """What the operator's definition names, its links resolved when it was read: one that is there now is not meant."""
    try:
        return open_as_named(path, flags)
    except OSError as e:
        if e.errno != errno.ELOOP:
            raise
        events.emit("link-not-followed", "warning", path=os.fspath(path), hint="mend it, or the definition, and reload")
        text = (
            "what its definition names is behind a symbolic link by now, which is not followed; pocketd's log names it"
        )
        raise Error("directory", text) from None


def _refuse(directory: str) -> None:
    why = paths.refuse_directory(directory)
    if why:
        raise Error("directory", f"{directory} cannot be a pocket's directory: it {why}. Choose another by --dir")


def _same_mounts(peer: processes.Peer) -> bool:
    try:
        theirs, ours = os.stat(f"/proc/{peer.pid}/ns/mnt"), os.stat("/proc/self/ns/mnt")
        if processes.pid_of(peer.pidfd) == peer.pid:  # still there, so the pid was its own when it was looked at
            return theirs.st_ino == ours.st_ino
    except (OSError, processes.Gone):
        pass
    raise Error("gone", "the caller has ended")
