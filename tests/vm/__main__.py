"""python -m tests.vm: tests that need a machine of their own, in a VM that is gone afterwards.

python -m tests.vm                                   the whole: the suites, and what the host's run had to skip
python -m tests.vm --suite 6.1 newest                a part of it: these of SUITES,
python -m tests.vm --skipped                         what the host skipped,
python -m tests.vm --report                          what failed in the parts that ran, and what they have left out
python -m tests.vm tests/vm/guest/test_boot.py -k psi   one boot with these pytest arguments
python -m tests.vm --run 'systemctl status'          one boot with this shell command
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

from tests.vm import initramfs, machine
from tests.vm.outcomes import Outcomes

RESULTS = machine.CACHE / "results"
OUTCOMES = "outcomes.json"
SKIPPED = RESULTS / "skipped"
HOST_OUTCOMES = machine.CACHE / "outcomes-host.json"
GUEST, ESCAPES = "tests/vm/guest", "tests/escape"
# By name: the kernel, and what of pytest's. Each test of the first two runs once: they are what `make test` has time
# for where the VM is emulated. The others are all that is left, on the newest kernel.
SUITES = {
    "6.1": ("6.1", [GUEST, ESCAPES, "-m", "oldest"]),
    "newest": ("newest", [GUEST, "-m", "not oldest and not slow"]),
    "rest": ("newest", [GUEST, "-m", "oldest or slow"]),
    "attacks": ("newest", [f"{GUEST}/test_attacks.py"]),
}
# What a skip names that need not be anywhere: there are places where no build of torch without CUDA is served, and a VM
# has no GPU.
OPTIONAL = ("torch", "GPU")
# An emulated processor is some 17 times slower: these are for hangs.
PYTEST = [
    *(str(machine.ROOT / ".venv/bin/python"), "-m", "pytest", "-p", "no:cacheprovider"),
    *("-o", "timeout=1800", "-o", "faulthandler_timeout=900", "-p", "tests.vm.outcomes"),
    *("--outcomes-to", f"/run/vm/results/{OUTCOMES}", "--junit-xml", "/run/vm/results/junit.xml"),
]
ENVIRONMENT = {
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "PYTHONDONTWRITEBYTECODE": "1",
    "TEST_TIMEOUT": "900",
    "PATH": f"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:{machine.ROOT}/.venv/bin",
}


def show(data: bytes) -> None:
    sys.stdout.buffer.write(data.replace(b"\r\n", b"\n"))
    sys.stdout.buffer.flush()


def boot(kernel_name: str, command: list[str], place: Path | None = None) -> machine.Result:
    """One boot; what it brought lies in `place`, or else in RESULTS/KERNEL."""
    kernel = machine.find_kernel(kernel_name)
    image = initramfs.build(kernel, command, machine.ROOT, ENVIRONMENT)
    print(f"vm: booting Linux {kernel.release}", flush=True)
    result = machine.run(kernel, image, show=show)
    place = place or RESULTS / kernel_name
    place.mkdir(parents=True, exist_ok=True)
    for name, data in {**result.files, "console.txt": result.console.encode()}.items():
        (place / name).write_bytes(data)
    print(f"vm: exit status {result.status}, {result.up:.1f} s to boot; logs in {place.relative_to(machine.ROOT)}")
    return result


def suite(name: str) -> int:
    """One of SUITES."""
    kernel, words = SUITES[name]
    place = RESULTS / name
    (place / OUTCOMES).unlink(missing_ok=True)
    return boot(kernel, [*PYTEST, *words], place).status


def skipped() -> int:
    """What the host had to skip."""
    (SKIPPED / OUTCOMES).unlink(missing_ok=True)
    if not HOST_OUTCOMES.exists():
        print("vm: NO RECORD OF A WHOLE RUN ON THE HOST (make test): what it skips is not run here", file=sys.stderr)
        return 0
    host = Outcomes.parse(HOST_OUTCOMES.read_bytes())
    files = [f for f in sorted({test.split("::")[0] for test in host.skipped}) if (machine.ROOT / f).exists()]
    return boot("newest", [*PYTEST, "--skipped-in", str(HOST_OUTCOMES), *files], SKIPPED).status if files else 0


def summary() -> int:
    """What failed, at the end of all output: tests that ran nowhere are a failure too."""
    host = Outcomes.parse(HOST_OUTCOMES.read_bytes()) if HOST_OUTCOMES.exists() else Outcomes()
    places = {place.name: place / OUTCOMES for place in (*(RESULTS / name for name in SUITES), SKIPPED)}
    guests = {name: Outcomes.parse(path.read_bytes()) for name, path in places.items() if path.exists()}
    return int(not report(host, guests))


def report(host: Outcomes, guests: dict[str, Outcomes]) -> bool:
    """Say what was skipped where, and what failed where, by the names of `guests`; False when a test failed, or ran
    nowhere that could have."""
    ran = host.ran.union(*(g.ran for g in guests.values()))
    skipped: dict[str, str] = {}
    for outcomes in (*guests.values(), host):
        skipped.update(outcomes.skipped)
    nowhere = {test: reason for test, reason in skipped.items() if not covered(test, ran)}
    in_guest = sum(covered(test, set().union(*(g.ran for g in guests.values()))) for test in host.skipped)
    print(f"vm: {len(host.skipped)} tests were skipped on the host, {in_guest} of them ran in the VM")
    optional = {test for test, reason in nowhere.items() if any(word in reason for word in OPTIONAL)}
    for test, reason in sorted(nowhere.items(), key=lambda t: t[0] not in optional):
        print(f"test: RAN NOWHERE{' (optional)' if test in optional else ', WHICH FAILS'}: {test}: {reason}")
    failed = [(name, test) for name, o in {"the host": host, **guests}.items() for test in sorted(o.failed)]
    for name, test in failed:
        print(f"test: FAILED on {name}: {test}")
    return len(nowhere) == len(optional) and not failed


def covered(test: str, ran: set[str]) -> bool:
    """Whether a test, or any of a file that was skipped whole, is among those that ran."""
    return test in ran or ("::" not in test and any(r.startswith(test + "::") for r in ran))


def terminated(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m tests.vm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--suite", nargs="+", choices=SUITES, help="some of the VM's own tests alone")
    parser.add_argument("--skipped", action="store_true", help="what the last whole run on the host skipped, alone")
    parser.add_argument(
        "--report", action="store_true", help="say which tests failed or ran nowhere, and fail over them"
    )
    parser.add_argument("--kernel", choices=machine.KERNELS, help="for one boot (default: newest)")
    parser.add_argument("--run", metavar="COMMAND", help="a shell command instead of pytest")
    options, arguments = parser.parse_known_args()
    signal.signal(signal.SIGTERM, terminated)
    try:
        if options.run is not None:
            return boot(options.kernel or "newest", ["sh", "-c", options.run]).status
        if arguments or options.kernel:
            return boot(options.kernel or "newest", [*PYTEST, *(arguments or [GUEST])]).status
        if options.suite:
            return max(map(suite, options.suite))
        if options.skipped:
            return skipped()
        if options.report:
            return summary()
        return max([*map(suite, SUITES), skipped(), summary()])
    except (machine.NoMachine, machine.GuestFailed) as e:
        print(f"vm: {e}", file=sys.stderr)
        return 125


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[2])
    sys.exit(main())
