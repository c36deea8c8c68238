"""Tables for people: `pocket ps`; and how what a pocket said is shown to an operator."""

from __future__ import annotations

import time
from typing import Any


def slots(p: dict[str, Any]) -> str:
    """How many wait, of how many, and how many could be made anew in a second."""
    if not p.get("warm"):
        return "-"
    rate = f", {1 / p['slot_seconds']:.0f}/s" if p.get("slot_seconds") else ""
    return f"{p['slots']} of {p['warm']}{rate}"


def table(reply: dict[str, Any]) -> str:
    """Services, their templates, pockets and workers, each with a heading line."""
    parts = [
        columns(
            ("SERVICE", "RUNTIME", "STATE", "PID", "AGE", "MODELS"),
            [
                (s["name"], s["runtime"], s["state"], s["pid"] or "-", age(s["age"]), ",".join(s["models"]) or "-")
                for s in reply["services"]
            ],
        ),
        columns(
            ("TEMPLATE", "SERVICE", "KIND", "STATE", "PID", "AGE", *_MEMORY),
            [
                (t["number"], t["service"], t["kind"], t["state"], t["pid"], age(t["age"]), *memory(t))
                for t in reply["templates"]
            ],
        ),
        columns(
            ("POCKET", "SERVICE", "STATE", "WORKERS", "CHARGED", "HELD", "SLOTS"),
            [
                (
                    *(p["name"], p["service"] or "-", p["state"], p["workers"], size(p.get("charged"))),
                    held(p),
                    slots(p),
                )
                for p in reply["pockets"]
            ],
        ),
        columns(
            ("WORKER", "POCKET", "SERVICE", "GEN", "MODE", "STATE", "PID", "AGE", *_MEMORY),
            [
                (
                    w["session"][:12],
                    w["pocket"],
                    w["service"],
                    w["generation"],
                    w["mode"],
                    w["state"],
                    w["pid"],
                    age(w["age"]),
                    *memory(w),
                )
                for w in reply["workers"]
            ],
        ),
    ]
    failed = [f"{block(s['name'] + ': ' + s['why'])}\n" for s in reply["services"] if s.get("why")]
    failed += [
        f"{printable(p['name'] + ': ' + p['last']['why'])}, {age(time.time() - p['last']['at'])} ago\n"
        for p in reply["pockets"]
        if p.get("last")
    ]
    for key in ("why_not_held", "why_not_rehearsed"):
        failed += [printable(p[key].partition("\n")[0]) + "\n" for p in reply["pockets"] if p.get(key)]
    return "\n".join(part for part in parts if part) + ("\n" + "".join(failed) if failed else "")


def held(row: dict[str, Any]) -> str:
    """Whether a pocket is held, and what of its memory is its template's own."""
    if row.get("held") in ("held", "rehearsed"):
        return f"{row['held']}, {size(row['template_private'])}"
    return row.get("held") or "-"


def inspection(reply: dict[str, Any]) -> str:
    """`pocket inspect`: the definition's keys, then each cgroup with the limits that hold."""
    lines = [f"{reply['kind']} {reply['name']}"]
    for key, value in (reply["definition"] or {}).items():
        if value not in (None, "", [], {}, 0, False) and key != "name":
            lines.append(f"  {key} = {value}")
    for part in (*reply["cgroups"], *reply.get("sessions", ())):
        who = f"session {part['session'][:12]} pid {part['pid']}" if "session" in part else "limits"
        lines.append(f"{who} in {part['cgroup']}")
        for level in part["levels"]:
            for name, value in level["limits"].items():
                held = part["holds"].get(name, {}).get("cgroup") == level["cgroup"]
                lines.append(f"  {name} = {value}  {level['cgroup']}{'  holds' if held else ''}")
    return "".join(f"{printable(line)}\n" for line in lines)


def privileges(reply: dict[str, Any]) -> str:
    """`pocket inspect --privileges`: the kernel's word on each worker."""
    lines = []
    for worker in reply["workers"]:
        lines.append(f"{worker['pocket']} session {worker['session'][:12]} pid {worker['pid']}")
        for status in worker["status"]:
            count = status.pop("threads")
            lines.append(f"  {count} thread{'' if count == 1 else 's'}:")
            lines += [f"    {key:<16}{value}" for key, value in status.items()]
        lines.append("  namespaces:")
        for kind, link in worker["namespaces"].items():
            lines.append(f"    {kind:<20}{link}{'  as the host' if kind in worker['shared'] else ''}")
        for key in ("uid_map", "cgroup", "limits", "mountinfo"):
            lines += [f"  {key}:", *(f"    {line}" for line in worker[key])]
        lines += ["  descriptors:", *(f"    {fd:<4}{path}" for fd, path in worker["descriptors"].items())]
        lines += [f"  left out: {what}" for what in worker.get("left_out", ())]  # none of a pocketd before
    lines += [f"left out: {what}" for what in reply.get("left_out", ())]
    return "".join(f"{printable(line)}\n" for line in lines)


_MEMORY = ("CHARGED", "PRIVATE", "SHARED", "CPU")


def memory(row: dict[str, Any]) -> tuple[str, ...]:
    return size(row["charged"]), size(row["private"]), size(row["shared"]), f"{row['cpu']:.2f}s"


def size(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / (1 << 20):.1f}M" if count < 1 << 30 else f"{count / (1 << 30):.2f}G"


def age(seconds: float) -> str:
    whole = max(0, int(seconds))
    if whole < 120:
        return f"{whole}s"
    return f"{whole // 60}m" if whole < 7200 else f"{whole // 3600}h" if whole < 172800 else f"{whole // 86400}d"


def columns(heading: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """Left-aligned columns; nothing when there are no rows."""
    if not rows:
        return ""
    lines = [heading, *(tuple(printable(str(cell)) for cell in row) for row in rows)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(heading))]
    return "".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() + "\n" for line in lines)


def printable(text: str) -> str:
    """One line of what is shown, in which a pocket's own words may be: a terminal would obey their control characters,
    so these are written as Python writes them ("\\x1b"). Tabs stay."""
    return "".join(c if c.isprintable() or c == "\t" else repr(c)[1:-1] for c in text)


def block(text: str) -> str:
    """The same of several lines, which line feeds alone end."""
    return "\n".join(map(printable, text.split("\n")))
