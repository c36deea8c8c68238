"""A template: a process held ready to be forked, and the loop in which it waits.

Started by init with one SEQPACKET socket. First `begin` says what to load; then each `fork` becomes a worker and each
`template` a warmer template, both by live fork: threads, models and all. What a template has once held every later
worker of every pocket inherits, so nothing of a caller ever comes here: a fork message carries descriptors and a few
numbers, and the child reads the rest from the session's own socket.
"""

from __future__ import annotations

import gc
import os
import socket
import time
import traceback
from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, List, Optional, Tuple

from nsutil import arenas, clone, namespaces, pages, privileges
from nsutil.messages import Fds, MessageError
from nsutil.obstacles import LARGEST_COPY, is_written, named
from pocketd import wire
from pocketd.wire import Error, Message
from runtime import cold, confinement, imported, interpreter, models, randomness, runtimes, threads, worker, workingset
from runtime.trace import Trace

# What its pause has already, ahead of time: making a network namespace takes as long as all others (docs/design.md).
OF_PAUSE = namespaces.CLONE_NEWIPC | namespaces.CLONE_NEWUTS | namespaces.CLONE_NEWNET


@dataclass
class Template:
    """What a template is; a child that becomes a warmer one starts from a copy of its parent's."""

    talk: socket.socket
    begin: Message
    runtime: Any
    ancestors: Tuple[int, ...] = ()  # pids that no worker may have, since many libraries detect a fork by getpid
    models: Dict[str, Any] = field(default_factory=dict)

    reopen: Tuple[int, ...] = ()
    pools: List[threads.Setter] = field(default_factory=list)
    masks: confinement.Masks = field(default_factory=confinement.Masks)
    pages: workingset.WorkingSet = field(default_factory=workingset.WorkingSet)  # of a first call of each model

    def say(self, message: Message, fds: Iterable[int] = ()) -> None:
        wire.send(self.talk, message, fds)


def main(talk: socket.socket) -> None:
    """Load what `begin` names, then serve until the socket closes. Never returns in a template."""
    interpreter.set_up()
    arenas.on_huge_pages()
    begin, fds = wire.receive(talk)
    fds.close()
    template = Template(talk, begin, runtimes.get(begin["runtime"]))
    if begin.get("bounding", True):
        privileges.drop_bounding_set()
    while True:  # each turn is one template: this process's first, then what its live forks become
        warm(template)
        successor = serve(template)
        if successor is None:
            os._exit(0)
        template = successor


def warm(template: Template) -> None:
    """Load, settle and say that we are ready; or say what went wrong, on the socket and on standard error, and end."""
    start, clock = time.monotonic(), time.time()
    begin = template.begin
    try:
        if begin.get("models") is None:
            template.say({"op": "progress", "text": f"loading {', '.join(begin['preload']) or begin['runtime']}"})
            template.runtime.preload(begin["preload"])
        else:
            for name, source in begin["models"].items():
                said = begin.get("named", {}).get(name, source)
                template.say({"op": "progress", "text": f"loading model {name} ({said})"})
                template.models[name] = models.load(template.runtime, name, source, said)
        # What an import itself set (TF2_BEHAVIOR) a caller that imported it too has as well, and what it goes by where
        # nothing is set a caller may say: no difference.
        begin["environment"] = {**template.runtime.defaults(), **os.environ}
        privatized = clone.privatize_shared_mappings()
        obstacles = clone.inspect({0, 1, 2, template.talk.fileno()})
        refused = [o for o in obstacles if o.remedy == "refuse"]
        if refused:
            raise Error("template", f"what was loaded holds something that a fork cannot carry over: {named(refused)}")
        open_files = {o.fd: o for o in obstacles if o.remedy in ("reopen", "remake") and o.fd is not None}
        large = [o for fd, o in open_files.items() if is_written(fd) and os.fstat(fd).st_size > LARGEST_COPY]
        if large:
            what = f"{named(large)}, open for writing and larger than {LARGEST_COPY >> 20} MiB"
            raise Error("template", f"what was loaded holds {what}: each worker would have to have a copy of its own")
        template.reopen = tuple(open_files)
        seen = imported.snapshot(clock)
        cold.expression(template.runtime)
        template.pools = threads.find()
        randomness.prepare()
        if not template.ancestors:  # in a warmer one such a name is what its models' own modules have imported
            interpreter.leave_modules()
        gc.collect()
        pages.trim()  # what loading needed is not to be carried by every worker
        if not template.ancestors:
            pages.collapse()  # a warmer one shares these pages, and would have them twice
        pages.unmap_files()
        pages.prepare_heap()
        gc.freeze()
        gc.disable()
        clone.attempt()  # else each launch would say why not
        if template.models:
            template.pages = models.pages_of_first_calls(template.models, template.reopen).on_huge_pages()
    except BaseException as e:
        if not isinstance(e, Error):
            traceback.print_exc()
            e = Error("template", f"{type(e).__name__}: {e}")
        template.say({"op": "failed", "error": e.wire()})
        os._exit(1)
    template.say(
        {
            "op": "ready",
            "seconds": time.monotonic() - start,
            "threads": len(os.listdir("/proc/self/task")),
            "privatized": privatized,
            "models": sorted(template.models),
        },
        [seen],
    )
    os.close(seen)


def serve(template: Template) -> Optional[Template]:
    """Fork as asked. Returns, in a child, the warmer template that it is to be; None when the socket has closed."""
    avoid = (*template.ancestors, os.getpid())
    while True:
        try:
            message, fds = wire.receive(template.talk)
        except (EOFError, OSError, MessageError):
            return None
        with fds:
            if message["op"] == "fork":
                fork_worker(template, message, fds, avoid)
            elif message["op"] == "template":
                successor = fork_template(template, message, fds, avoid)
                if successor:
                    return successor


def fork_worker(template: Template, message: Message, fds: Fds, avoid: Tuple[int, ...]) -> None:
    """One launch. The child never returns from here."""
    trace = Trace(message.get("marks"))
    trace.mark("the template has the request")
    leaf, pause, session, orders = fds.take(), fds.take(), fds.take(), fds.take()
    handed = fds.rest()
    child, refused = None, ""
    try:
        child = clone.live_fork(
            flags=namespaces.CLONE_NEWNS,
            cgroup=leaf,
            pid_namespace=pause,
            set_tid=[clone.free_pid(avoid)],
            parent=True,
        )
        if child is None:
            try:
                trace.mark("the worker is born")
                template.ancestors = avoid
                kinds = OF_PAUSE & ~(namespaces.CLONE_NEWNET if message["host_network"] else 0)
                worker.run(template, session, orders, handed, (pause, kinds), trace)
            finally:
                os._exit(worker.FAILED)  # whatever happens: nothing of a launch goes on as a second template
    except OSError as e:
        refused = f"the template could not fork: {e}"
    # Closed before anything is said: until then others keep the caller's sockets open; the last to close may wait.
    for fd in (leaf, pause, session, orders, *handed):
        os.close(fd)
    if child is None:
        template.say({"op": "refused", "launch": message["launch"], "error": Error("fork", refused).wire()})
        return
    template.say({"op": "forked", "launch": message["launch"], "pid": child.pid}, [child.pidfd])
    os.close(child.pidfd)


def fork_template(template: Template, message: Message, fds: Fds, avoid: Tuple[int, ...]) -> Optional[Template]:
    """A warmer template: a live fork that goes on here with a socket and a standard error of its own."""
    leaf, talk, err = fds.take(), fds.take(), fds.take()
    try:
        child = clone.live_fork(cgroup=leaf, parent=True)
        if child is not None:
            template.say({"op": "forked", "template": message["template"], "pid": child.pid})
            os.close(child.pidfd)
            return None
        clone.revive()
        template.talk.close()
        os.dup2(err, 1)
        os.dup2(err, 2)
        own = socket.socket(fileno=os.dup(talk))
    finally:
        for fd in (leaf, talk, err):
            os.close(fd)
    begin, none = wire.receive(own)
    none.close()
    gc.enable()
    return Template(own, begin, template.runtime, avoid, dict(template.models))


if __name__ == "__main__":
    main(socket.socket(fileno=3))
