"""Rights of pockets at run time: `pocket allow` and `pocket deny`.

What is changed holds for launches from then on, until the configuration is read again; `--persist` writes it beside the
limits of `pocket set` (pocketd.tuning). What runs keeps what it was born with: a mount or a namespace that a process
has cannot be taken from it, so the answer says how many sessions go on with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pocketd import events, schema, tuning
from pocketd.definitions import Pocket
from pocketd.paths import Mount, parse_mount
from pocketd.wire import Error, Message

if TYPE_CHECKING:
    from pocketd.daemon import Daemon

# A right as it is said (model=NAME), and the list of the definition that holds it.
_LISTS: dict[str, tuple[str, Callable[[object], Any]]] = {
    "model": ("models", schema.text),
    "write": ("write", schema.beneath),
    "device": ("devices", schema.device),
}
FORMS = "network=host, model=NAME, write=PATH, device=/dev/NAME, mount=SRC[:DST][:rw]"


def change(daemon: Daemon, name: str, words: list[str], allow: bool, persist: bool) -> Message:
    """Give a pocket rights, or take them. All of `words` are right, or nothing is changed. Raises Error."""
    pocket = daemon.config.pockets.get(name)
    if pocket is None:
        raise Error("not-found", f"there is no pocket {name!r} with a definition; rights stand in one")
    changed = pocket
    for word in words:
        changed = _apply(daemon, changed, word, allow)
    if persist:
        lists = {key: list(getattr(changed.allow, key)) for key, _ in _LISTS.values()}
        rights = {"network": changed.allow.network, **lists}
        tuning.persist(daemon, name, "pocket", {"allow": rights, "mounts": [_text(m) for m in changed.mounts]})
    daemon.change_rights(name, changed.allow, changed.mounts)
    events.emit("rights-changed", pocket=name, allow=allow, what=" ".join(words), persist=persist)
    sessions = sum(1 for _, s in daemon.sessions() if s.pocket == name)
    return {"sessions": sessions, "allow": tuning.plain(changed.allow), "mounts": [_text(m) for m in changed.mounts]}


def _apply(daemon: Daemon, pocket: Pocket, word: str, allow: bool) -> Pocket:
    kind, _, text = word.partition("=")
    try:
        if kind == "network":
            network = schema.network(text or "none") if allow else "none"
            if allow and not text:
                raise schema.Invalid("names no network; write network=host")
            return replace(pocket, allow=replace(pocket.allow, network=network))  # type: ignore[arg-type]
        if kind == "mount":
            mount = schema.mount(text) if allow else parse_mount(text)  # what is taken back need not be there any more
            return replace(pocket, mounts=_with(pocket.mounts, mount, word, allow))
        if kind in _LISTS:
            key, parse = _LISTS[kind]
            value = parse(text)
            if kind == "model" and allow:
                _check_model(daemon, pocket, value)
            held: Any = {key: _with(getattr(pocket.allow, key), value, word, allow)}
            return replace(pocket, allow=replace(pocket.allow, **held))
    except ValueError as e:
        raise Error("bad-request", f"{word} {e}") from None
    raise Error("bad-request", f"{word!r} is no right; rights are {FORMS}")


def _with(held: tuple[Any, ...], value: Any, word: str, allow: bool) -> tuple[Any, ...]:
    if allow:
        return held if value in held else (*held, value)
    if value not in held:
        raise Error("not-found", f"it is not allowed {word} as it is")
    return tuple(other for other in held if other != value)


def _check_model(daemon: Daemon, pocket: Pocket, model: str) -> None:
    service = daemon.config.services.get(pocket.service or "")
    if service and model not in service.models:
        known = ", ".join(service.models) or "none"
        raise Error("not-found", f"service {service.name} has no model {model!r}; it has {known}")


def _text(mount: Mount) -> str:
    return f"{mount.source}:{mount.target}{':rw' if mount.writable else ''}"
