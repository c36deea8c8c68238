"""A pocketd with one service, for a while."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from bench import own
from bench.launch import Service

SERVICE = "tensorflow"


@contextmanager
def service_with(
    work: Path, models: Mapping[str, Path | str] | None = None, runtime: str = "tensorflow"
) -> Iterator[Service]:
    """That is on and holds these models: files, or factories. Its configuration is pocketd.conf in `work`."""
    path = work / "pocketd.conf"
    lines = [f"[service.{SERVICE}]", f"runtime = {json.dumps(runtime)}"]
    if models:
        named = [f"{name} = {json.dumps(str(model))}" for name, model in models.items()]
        lines.append(f"models = {{ {', '.join(named)} }}")
    path.write_text("\n".join([*lines, ""]))
    with own.OwnPocketd(work, path) as pocketd:
        pocketd.turn_on(SERVICE)
        scope = own.cgroup2() / pocketd.cgroup / f"pocketd-{SERVICE}.scope"
        yield Service(pocketd.runtime, SERVICE, runtime, scope, pocketd.pid)


def say(words: str) -> None:
    print(f"-- {words} ...", file=sys.stderr, flush=True)
