"""`pocket`: its verbs. Any other word is a service or a pocket: `pocket tensorflow on`, `pocket detect photo.jpg`."""

from __future__ import annotations

import os
import sys

if os.environ.get("PYTHONPATH") and not sys.flags.ignore_environment:
    # It is the program's, which gets it; modules in it must not take the place of ours and the standard library's here.
    os.execv(sys.executable, [sys.executable, "-I", "-m", "pocketd.command.main", *sys.argv[1:]])

import json
from collections.abc import Callable
from typing import Any, NoReturn

from pocketd.client import errors
from pocketd.client.control import Control
from pocketd.command import run, show, suggest

USAGE = """\
usage: pocket SERVICE on | off               switch a service on or off (also: pocket on SERVICE)
       pocket run [OPTIONS] PROGRAM [ARG...]  run a program in a pocket; see pocket run --help
       pocket NAME [ARG...]                   run a pocket that has a definition
       pocket ps                              what there is
       pocket logs NAME [-n LINES]            the log of a service or a pocket
       pocket stop NAME                       end a pocket's sessions
       pocket reload [SERVICE]                read the configuration again; make the service anew beside the old
       pocket set [--persist] NAME LIMIT=VALUE...
                                              change limits of a pocket or a service now, such as memory.max=200M
       pocket allow | deny [--persist] NAME RIGHT...
                                              rights of a pocket's next launches: network=host, model=NAME,
                                              write=PATH, device=/dev/NAME, mount=SRC[:DST][:rw]
       pocket warm NAME | cool NAME           hold a pocket at its checkpoint, or preloaded; give that up
       pocket suggest NAME [ARG...]           run it once, and say where it could be held
       pocket inspect [--privileges] NAME     a definition, and the limits that hold; or what its workers may do

Options of all but run: --json, --runtime-dir DIR (or POCKETD_RUNTIME_DIR)
"""


class Options:
    """What stands before or among a verb's words."""

    def __init__(self, words: list[str]):
        self.json = False
        self.runtime_dir: str | None = None
        self.lines = 200
        self.all = self.persist = self.privileges = False
        self.words: list[str] = []
        rest = list(words)
        while rest:
            word = rest.pop(0)
            if word == "--json":
                self.json = True
            elif word == "--persist":
                self.persist = True
            elif word == "--privileges":
                self.privileges = True
            elif word == "--all":
                self.all = True
            elif word == "--runtime-dir" and rest:
                self.runtime_dir = rest.pop(0)
            elif word.startswith("--runtime-dir="):
                self.runtime_dir = word.partition("=")[2]
            elif word in ("-n", "--lines") and rest and rest[0].isdigit():
                self.lines = int(rest.pop(0))
            elif word.startswith("-"):
                usage(f"there is no option {word}")
            else:
                self.words.append(word)


def usage(complaint: str = "") -> NoReturn:
    sys.stderr.write(f"pocket: {complaint}\n{USAGE}" if complaint else USAGE)
    sys.exit(run.FAILED)


def main() -> None:
    words = sys.argv[1:]
    directory = None
    while words and words[0].startswith("--runtime-dir"):
        word = words.pop(0)
        directory = (
            word.partition("=")[2] if "=" in word else words.pop(0) if words else usage("--runtime-dir needs a value")
        )
    if directory:
        os.environ["POCKETD_RUNTIME_DIR"] = directory
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(USAGE)
        sys.exit(0 if words else run.FAILED)
    first = words[0]
    try:
        if first == "run":
            run.main(words[1:])
        elif first == "--version":
            from pocketd import __version__

            print(f"pocket {__version__}")
        elif first in VERBS:
            VERBS[first](words[1:])
        elif first.startswith("-"):
            usage(f"there is no option {first}")
        elif len(words) >= 2 and words[1] in ("on", "off") and not is_pocket(first):
            VERBS[words[1]]([first, *words[2:]])
        else:
            run.main([], run.Request(name=first, pocket=True, arguments=words[1:]))
    except errors.PocketError as e:
        sys.stderr.write(f"pocket: {show.block(str(e))}\n")
        sys.exit(run.NOT_FOUND if e.code == "not-found" else run.FAILED)
    except BrokenPipeError:
        os._exit(run.FAILED)
    except OSError as e:
        sys.stderr.write(f"pocket: {show.block(str(e))}\n")
        sys.exit(run.FAILED)
    except KeyboardInterrupt:
        run.die_by(2)


def is_pocket(name: str) -> bool:
    """`pocket NAME on` switches a service; a pocket called so gets the word "on" as its argument."""
    with Control() as control:
        try:
            return bool(control.call("describe", name=name)["kind"] == "pocket")
        except errors.PocketError:
            return False


def progress(text: str) -> None:
    sys.stderr.write(f"{show.block(text)}\n")
    sys.stderr.flush()


def switch(verb: str, options: Options) -> None:
    if len(options.words) != 1:
        usage(f"{verb} needs the name of one service")
    name = options.words[0]
    with Control(options.runtime_dir) as control:
        reply = control.call(verb, progress=progress, name=name)
    if options.json:
        print(json.dumps({"service": name, "state": verb, "already": reply["already"]}))
    else:
        print(f"{name} is {'already ' if reply['already'] else ''}{verb}")


def on(options: Options) -> None:
    switch("on", options)


def off(options: Options) -> None:
    if not options.all:
        switch("off", options)
        return
    if options.words:
        usage("off takes the name of a service, or --all")
    with Control(options.runtime_dir) as control:
        names = control.call("off", progress=progress, all=True)["names"]
    print(json.dumps({"off": names}) if options.json else f"off: {', '.join(names) or 'nothing was on'}")


def ps(options: Options) -> None:
    with Control(options.runtime_dir) as control:
        reply = _plain(control.call("ps"))
    print(json.dumps(reply, indent=1) if options.json else show.table(reply), end="\n" if options.json else "")


def logs(options: Options) -> None:
    if len(options.words) != 1:
        usage("logs needs the name of a service or a pocket")
    with Control(options.runtime_dir) as control:
        reply = control.call("logs", name=options.words[0], lines=options.lines)
    if options.json:
        print(json.dumps({"name": options.words[0], "lines": reply["lines"]}, indent=1))
    else:
        for line in reply["lines"]:
            print(show.printable(line))


def stop(options: Options) -> None:
    if len(options.words) != 1:
        usage("stop needs the name of a pocket, or the id of a session")
    with Control(options.runtime_dir) as control:
        reply = control.call("stop", name=options.words[0])
    if options.json:
        print(json.dumps({"name": options.words[0], "stopped": reply["stopped"]}))
    else:
        print(f"{options.words[0]}: {reply['stopped']} session{'' if reply['stopped'] == 1 else 's'} ended")


def reload(options: Options) -> None:
    if len(options.words) > 1:
        usage("reload takes the name of one service, or none")
    with Control(options.runtime_dir) as control:
        reply = _plain(control.call("reload", progress=progress, name=options.words[0] if options.words else None))
    if options.json:
        print(json.dumps(reply, indent=1))
    elif options.words:
        made = f"generation {reply['generation']}" if reply["generation"] else f"{reply['state']}; made when it is used"
        print(f"{options.words[0]}: {made}")
    for problem in reply["problems"]:
        sys.stderr.write(f"pocket: {show.printable(problem)}\n")
    if reply["problems"]:
        sys.exit(run.FAILED)


def set_limits(options: Options) -> None:
    if len(options.words) < 2 or not all("=" in word for word in options.words[1:]):
        usage("set needs a name and limits: pocket set detect memory.max=200M")
    name, *pairs = options.words
    limits: dict[str, Any] = {}
    for pair in pairs:
        limit, _, value = pair.partition("=")
        limits[limit] = value if limit not in limits else [*_several(limits[limit]), value]
    with Control(options.runtime_dir) as control:
        reply = _plain(control.call("set", name=name, limits=limits, persist=options.persist))
    if options.json:
        print(json.dumps(reply, indent=1))
        return
    print(f"{name}: {', '.join(pairs)}{' (kept)' if options.persist else ''}")
    for unit in reply["units"]:
        print(f"{name}: a worker is in {unit} and has that unit's limits: systemctl set-property changes them")


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def suggested(words: list[str]) -> NoReturn:
    """Its options come before the pocket's name; what follows is the program's."""
    as_json, rest = False, list(words)
    while rest and rest[0] == "--json":
        as_json = True
        rest.pop(0)
    if rest[:1] == ["--runtime-dir"] and len(rest) > 1:
        os.environ["POCKETD_RUNTIME_DIR"] = rest[1]
        del rest[:2]
    if not rest or rest[0].startswith("-"):
        usage("suggest needs the name of a pocket, and arguments for a run of it")
    suggest.main(rest[0], rest[1:], os.environ.get("POCKETD_RUNTIME_DIR"), as_json)


def warm(options: Options) -> None:
    if len(options.words) != 1:
        usage("warm needs the name of one pocket")
    with Control(options.runtime_dir) as control:
        reply = _plain(control.call("warm", progress=progress, name=options.words[0]))
    if options.json:
        print(json.dumps(reply, indent=1))
        return
    name = reply["name"]
    if "threads" in reply:
        how = "held and rehearsed" if reply["rehearsed"] else "held"
        what = "to its checkpoint" if reply["mode"] == "program" else "to preload"
        print(f"{name} is {how}: {reply['seconds'] or 0:.2f} s {what}, {reply['threads']} threads")
        if reply["working_set"]:
            print(f"{name}: a run makes {reply['working_set'] / (1 << 20):.1f}M its own")
        if reply["runs"] is not None:
            print(f"{name}: memory.max leaves {reply['runs']} runs at once")
    if reply["slots"]:
        print(f"{name}: {reply['slots']} slots")
    for what in reply.get("unsure", ()):
        later = "after the checkpoint" if reply["mode"] == "program" else "in a function that sessions call"
        print(show.printable(f"{name}: its runs share the state of a {what}: make it {later}"))
    for what in reply.get("noted", ()):
        print(show.printable(f"{name}: {what}"))


def cool(options: Options) -> None:
    if len(options.words) != 1:
        usage("cool needs the name of one pocket")
    with Control(options.runtime_dir) as control:
        reply = _plain(control.call("cool", name=options.words[0]))
    if options.json:
        print(json.dumps(reply, indent=1))
    else:
        print(f"{reply['name']} is {'already ' if reply['already'] else ''}cool")


def allow(options: Options) -> None:
    change_rights(options, True)


def deny(options: Options) -> None:
    change_rights(options, False)


def change_rights(options: Options, give: bool) -> None:
    verb = "allow" if give else "deny"
    if len(options.words) < 2:
        usage(f"{verb} needs a pocket and a right: pocket {verb} detect network=host")
    name, *what = options.words
    with Control(options.runtime_dir) as control:
        reply = _plain(control.call("allow", name=name, what=what, allow=give, persist=options.persist))
    if options.json:
        print(json.dumps(reply, indent=1))
        return
    print(f"{name}: {'allowed' if give else 'denied'} {', '.join(what)}{' (kept)' if options.persist else ''}")
    if reply["sessions"]:
        print(f"{name}: {reply['sessions']} sessions go on as they began; pocket stop {name} ends them")


def inspect(options: Options) -> None:
    if len(options.words) != 1:
        usage("inspect needs the name of a pocket or a service")
    with Control(options.runtime_dir) as control:
        if options.privileges:
            reply = _plain(control.call("privileges", name=options.words[0]))
            print(json.dumps(reply, indent=1) if options.json else show.privileges(reply), end="")
            return
        reply = _plain(control.call("inspect", name=options.words[0]))
    print(json.dumps(reply, indent=1) if options.json else show.inspection(reply), end="\n" if options.json else "")


def _plain(reply: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in reply.items() if key not in ("v", "id", "ok")}


def with_options(verb: Callable[[Options], None]) -> Callable[[list[str]], None]:
    return lambda words: verb(Options(words))


VERBS: dict[str, Callable[[list[str]], None]] = {
    "on": with_options(on),
    "off": with_options(off),
    "ps": with_options(ps),
    "logs": with_options(logs),
    "stop": with_options(stop),
    "reload": with_options(reload),
    "set": with_options(set_limits),
    "inspect": with_options(inspect),
    "allow": with_options(allow),
    "deny": with_options(deny),
    "warm": with_options(warm),
    "cool": with_options(cool),
    "suggest": suggested,  # whose options end at the pocket's name
}

if __name__ == "__main__":
    main()
