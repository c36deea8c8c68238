"""What a process holds that a live fork of it would not carry over, in words for the author of its program."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from typing import Any, Set, Tuple

from nsutil import clone, obstacles


def find(keep: Set[int]) -> Tuple[str, Tuple[int, ...]]:
    """What cannot be carried over, "" for nothing; and the descriptors that are to be renewed in each child. `keep`:
    those that are not looked at."""
    if "asyncio" in sys.modules and sys.modules["asyncio"]._get_running_loop() is not None:
        return "a running asyncio loop", ()
    settle_children()
    if has_children():
        return f"child processes ({children()})", ()
    if any(signal.getitimer(which)[0] for which in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)):
        return "a running timer (setitimer, alarm)", ()
    timers = [thread.name for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    if timers:
        return f"a running timer ({', '.join(timers)[:200]})", ()
    if _open_loops():
        return "an asyncio event loop that is not closed", ()
    found = clone.inspect(keep)
    those = [o for o in found if o.remedy == "refuse"]
    refused = [obstacles.named(those)] if those else []
    for o in found:
        if o.remedy == "reopen" and o.fd is not None and obstacles.is_written(o.fd) and not obstacles.is_copied(o):
            what = " (memory of a Value or Array of multiprocessing)" if "/pym-" in str(o) else ""
            refused.append(f"{o}{what}, open for writing")
    return "; ".join(refused), tuple(o.fd for o in found if o.remedy in ("reopen", "remake") and o.fd is not None)


def _open_loops() -> bool:
    base: Any = sys.modules.get("asyncio.base_events")
    # A weak reference's proxy says that it is of the class of what it stands for, or raises.
    return base is not None and any(
        issubclass(type(o), base.BaseEventLoop) and not o.is_closed() for o in gc.get_objects()
    )


def settle_children(seconds: float = 1.0) -> None:
    """Wait for those that subprocess has still to wait for, of which nobody asked how they ended: os.popen(...).read()
    leaves one that is about to end."""
    subprocess: Any = sys.modules.get("subprocess")
    end = time.monotonic() + seconds
    while subprocess and getattr(subprocess, "_active", None) and time.monotonic() < end:
        subprocess._cleanup()
        time.sleep(0.01)


def has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def children() -> str:
    """The command lines of this process's children, shortened."""
    names = []
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/children") as f:
                pids = f.read().split()
        except OSError:
            continue
        for pid in pids:
            try:
                with open(f"/proc/{pid}/cmdline", "rb") as f:
                    names.append(f.read(200).replace(b"\0", b" ").decode(errors="replace").strip() or pid)
            except OSError:
                pass
    return "; ".join(names)[:400] or "ended, and not waited for"
