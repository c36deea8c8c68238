"""What of others can be found in one's own memory, and what a write there comes to."""

from __future__ import annotations

import ctypes
import importlib
import os

_UNREADABLE = ("[vvar]", "[vvar_vclock]", "[vsyscall]")


def count(parts: list[str]) -> int:
    """How often the joined text, followed by "~", stands anywhere in this process's memory; as it is asked for, by its
    parts and without the "~", it does not count."""
    wanted = "".join(parts).encode()
    found = 0
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", buffering=0) as memory:
        for line in maps.read().splitlines():
            place, mode, *rest = line.split()
            if "r" not in mode or rest[-1] in _UNREADABLE:
                continue
            at, end = (int(n, 16) for n in place.split("-"))
            while at < end:
                memory.seek(at)
                try:
                    data = memory.read(min(end - at, 1 << 22))
                except OSError:
                    break
                if not data:
                    break
                place_of = data.find(wanted)
                while place_of >= 0:
                    after = place_of + len(wanted)
                    found += data[after : after + 1] == b"~"
                    place_of = data.find(wanted, after)
                at += len(data)
    return found


def places(wanted: dict[str, list[str]]) -> dict[str, list[int]]:
    """By name, where in this process's memory two byte strings (hexadecimal) stand side by side; here they never do."""
    halves = {name: (bytes.fromhex(first), bytes.fromhex(second)) for name, (first, second) in wanted.items()}
    found: dict[str, list[int]] = {name: [] for name in wanted}
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", buffering=0) as memory:
        for line in maps.read().splitlines():
            place, mode, *rest = line.split()
            if "r" not in mode or rest[-1] in _UNREADABLE:
                continue
            at, end = (int(n, 16) for n in place.split("-"))
            while at < end:
                memory.seek(at)
                try:
                    data = memory.read(min(end - at, 1 << 22))
                except OSError:
                    break
                for name, (first, second) in halves.items():
                    where = data.find(first)
                    while where >= 0:
                        after = where + len(first)
                        if data[after : after + len(second)] == second:
                            found[name].append(at + where)
                        where = data.find(first, after)
                at += max(len(data) - 64, 4096)  # one may lie across two pieces
                del data
    return found


def read_at(at: int) -> str:
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        memory.seek(at)
        return memory.read(16).hex()


def change(at: int) -> bool:
    """By /proc/self/mem, past every protection of the mapping."""
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        memory.seek(at)
        return memory.write(b"changed-") == 8


def weights() -> str:
    return bytes(importlib.import_module("resident").WEIGHTS[:8]).decode()


def change_weights() -> int:
    """By /proc/self/mem, past every protection of the mapping; returns where they stand."""
    buffer = importlib.import_module("resident").WEIGHTS
    at = ctypes.addressof((ctypes.c_char * len(buffer)).from_buffer(buffer))
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        memory.seek(at)
        memory.write(b"changed-")
    return at


def memfds() -> list[int]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("/memfd:arena"):
                found.append(int(name))
        except OSError:
            pass
    return sorted(found)
