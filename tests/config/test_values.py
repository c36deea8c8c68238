"""What single keys may hold, and what is said when they hold something else."""

from __future__ import annotations

import re

import pytest

from pocketd import config
from pocketd.definitions import User


def service(line: str, runtime: str = "tensorflow") -> str:
    return f'[service.s]\nruntime = "{runtime}"\n{line}\n'


def pocket(line: str) -> str:
    return f'[service.s]\nruntime = "tensorflow"\n[pocket.p]\nservice = "s"\ndir = "DIR/detect"\n{line}\n'


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('rootfs = "relative"', "absolute path"),
        ('rootfs = "/"', 'write "host"'),
        ('rootfs = "/etc/passwd"', "is not a directory"),
        ('rootfs = "oci:docker.io/x"', "not offered by this version"),
        ("rootfs = true", "absolute path"),
        ('python = "/nowhere/python"', "is not a program that exists"),
        ('python = "python3"', "absolute path"),
        ('start = "on"', '"demand" or "boot" or "manual"'),
        ('start = "bot"', 'did you mean "boot"?'),
        ("start = 1", '"demand" or "boot" or "manual"'),
        ('exit = "slow"', '"fast" or "full"'),
        ("env = { A = 1 }", 'write "1"'),
        ("env = { A = true }", "is not a text"),
        ('env = { "A=B" = "1" }', "name for an environment variable"),
        ('env = { A = "a\\u0000b" }', "is not a text"),
        ('preload = ["torch"]', 'is for runtime = "python"'),
        ('preload = "torch"', 'write preload = ["torch"]'),
        ('models = { m = "relative.keras" }', '"module:attribute"'),
        ('models = { m = "/nowhere.keras" }', "does not exist"),
        ('models = { m = "os:" }', '"module:attribute"'),
        ('models = { m = "os.system(1):x" }', '"module:attribute"'),
        ("models = { m = 1 }", '"module:attribute"'),
        ('models = { "../m" = "a:b" }', "name for a model"),
        ('dir = "/srv"', "is not a key that is known here"),
    ],
)
def test_a_service_is_refused_with_what_would_be_right(load, line, said):
    found = load(service(line))
    assert said in config.describe(found.problems) and len(found.problems) == 1
    assert list(found.invalid) == ["s"]


@pytest.mark.parametrize("key", ['python = "/bin/sh"', 'models = { m = "a:b" }'])
def test_an_exec_service_has_no_use_for_what_python_needs(load, key):
    assert 'is of no use to runtime = "exec"' in config.describe(load(service(key, "exec")).problems)


@pytest.mark.parametrize("module", ["", "a-b", "a..b", ".a", "a.", "1a", "a b", "ä", "a;b"])
def test_preload_takes_names_of_modules_only(load, module):
    assert "is not the name of a module" in config.describe(load(service(f'preload = ["{module}"]', "python")).problems)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('program = "/abs.py"', 'only a service with runtime = "exec"'),
        ('program = "../up.py"', 'without ".."'),
        ('program = "a/../../up.py"', 'without ".."'),
        ('program = ""', "is not a path"),
        ("program = 1", "is not a path"),
        ('packages = "/usr/lib"', "is not a path beneath"),
        ('may_run = "alice"', 'may_run = ["alice", "@vision"]'),
        ("may_run = [1]", "neither a user nor a group"),
        ('may_run = ["@"]', "neither a user nor a group"),
        ('run_as = "nobody-of-that-name"', "is no user of this host"),
        ('run_as = "root"', "is root, which no pocket runs as"),
        ("run_as = 0", "is root, which no pocket runs as"),
        ("run_as = true", "neither a user nor a uid"),
        ("run_as = -1", "neither a user nor a uid"),
        ("run_as = 4294967295", "neither a user nor a uid"),
        ('allow = { network = "own" }', "not offered by this version"),
        ('allow = { network = "container" }', "not offered by this version"),
        ('allow = { network = "hots" }', 'did you mean "host"?'),
        ("allow = { network = true }", '"none" or "host"'),
        ('allow = { devices = ["video0"] }', 'such as "/dev/video0"'),
        ('allow = { devices = ["/dev/../etc/passwd"] }', 'such as "/dev/video0"'),
        ('allow = { devices = ["/dev/mem"] }', "all of the host"),
        ('may_run = ["cgroup:relative"]', "nor a cgroup"),
        ('allow = { models = ["missing"] }', "is not a model of the service 's'"),
        ('allow = { write = ["/etc"] }', "beneath the pocket's directory"),
        ('allow = { write = ["../x"] }', "beneath the pocket's directory"),
        ('allow = { writ = ["x"] }', "did you mean 'write'?"),
        ('allow = ["network"]', "is not a table"),
        ('mounts = ["/nowhere"]', "does not exist"),
        ('mounts = ["/etc:/etc:rw"]', "part of the system"),
        ("warm = true", "whole number from 0"),
        ("warm = -1", "whole number from 0"),
        ("warm = 1.5", "whole number from 0"),
        ("checkpoint = 3", "write it in quotes"),
        ('rehearse = "x"', 'rehearse = ["sample.jpg"]'),
        ('preload = "app"', 'preload = ["app", "app:ready"]'),
        ('preload = ["app:"]', "neither a module nor a function of one"),
        ('preload = ["app.py:f g"]', "neither a module nor a function of one"),
        ("preload = [3]", "neither a module nor a function of one"),
        ('requires = ["tensorflow >= "]', "is not a requirement"),
        ('requires = ["tensorflow; os_name"]', "is not a requirement"),
        ('requires = "tensorflow"', 'requires = ["tensorflow>=2.15"]'),
        ('session_limits = { "memory.max" = "1G" }', "is not a key that is known here"),
    ],
)
def test_a_pocket_is_refused_with_what_would_be_right(load, line, said):
    found = load(pocket(line))
    assert said in config.describe(found.problems) and len(found.problems) == 1
    assert list(found.invalid) == ["p"] and list(found.services) == ["s"]


def test_every_bad_member_of_a_list_is_named(load):
    [problem] = load(pocket('allow = { write = ["/a", "ok", "../b"] }')).problems
    assert '"/a"' in problem.message and '"../b"' in problem.message and '"ok"' not in problem.message


def test_an_absolute_program_is_right_for_an_exec_service(load):
    found = load('[service.s]\nruntime = "exec"\n[pocket.p]\nservice = "s"\ndir = "DIR/detect"\nprogram = "/bin/ls"\n')
    assert not found.problems and found.pockets["p"].program == "/bin/ls"


def test_a_user_by_name_runs_with_that_users_ids(load):
    assert load(pocket('run_as = "daemon"')).pockets["p"].run_as == User(1, 1)


def test_what_is_done_ahead_of_time(load):
    more = 'program = "p.py"\nwarm = 2\ncheckpoint = "main"\nrehearse = ["a.jpg"]\nrehearse_until = 2\nmax_age = 60'
    found = load(pocket(more))
    assert not found.problems and not found.notices
    p = found.pockets["p"]
    assert (p.warm, p.checkpoint, p.rehearse, p.rehearse_until, p.max_age) == (2, "main", ("a.jpg",), "2.0", 60)
    assert load(pocket('program = "p.py"\ncheckpoint = "main"\nrehearse = []')).pockets["p"].rehearse == ()


def test_what_is_done_ahead_of_time_for_clients(load):
    found = load(pocket('preload = ["app", "vision.detect:Detector.warm"]\nwarm = 2\nmax_age = 60'))
    assert not found.problems
    p = found.pockets["p"]
    assert p.preload == ("app", "vision.detect:Detector.warm") and (p.mode, p.is_held) == ("client", True)
    assert not load(pocket("")).pockets["p"].is_held


def test_a_preload_without_a_named_service_is_looked_at_too(load):
    text = pocket('preload = ["app"]\nprogram = "p.py"').replace('service = "s"', 'requires = ["tensorflow"]')
    [problem] = load(text).problems
    assert "preload is for client mode" in f"{problem.key.rpartition('.')[2]} {problem.message}"


def test_a_preload_for_a_service_without_python(load):
    [problem] = load(
        '[service.s]\nruntime = "exec"\n[pocket.p]\nservice = "s"\ndir = "DIR/detect"\npreload = ["app"]'
    ).problems
    assert problem.key == "pocket.p.preload" and "which has no Python" in problem.message


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ('preload = ["app"]\nprogram = "p.py"', "preload.*program is for programs; leave one of the two out"),
        ('preload = ["app"]\nprogram = "p.py"\ncheckpoint = "main"', "preload.*program is for programs"),
        ('preload = ["app"]\ncheckpoint = "main"', "preload.*checkpoint is for programs"),
        ('preload = ["app"]\ncold = true', "preload.*contradicts cold"),
        ('preload = ["app"]\nrehearse = []', "rehearse.*without a checkpoint"),
        ('checkpoint = "main"', "checkpoint.*without a program"),
        ('program = "p.py"\nrehearse = []', "rehearse.*without a checkpoint"),
        ('program = "p.py"\nmax_age = 3', "max_age.*without a checkpoint"),
        ('program = "p.py"\ncheckpoint = "main"\ncold = true', "contradicts cold"),
        ('program = "p.py"\ncheckpoint = "main"\nrehearse_until = "output"', "without a sample"),
        ('program = "p.py"\ncheckpoint = "main"\nrehearse = []\nrehearse_until = "never"', "neither"),
        ('program = "p.py"\ncheckpoint = "main"\nrehearse = ["a\\u0000"]', "not a text"),
    ],
)
def test_what_is_done_ahead_of_time_for_nothing(load, keys, words):
    [problem] = load(pocket(keys)).problems
    assert re.search(words, f"{problem.key} {problem.message}"), problem


def test_a_caller_whom_the_host_does_not_know_is_worth_a_notice(load):
    found = load(pocket('may_run = ["root", "nobody-of-that-name"]'))
    assert not found.problems and found.pockets["p"].may_run == ("root", "nobody-of-that-name")
    assert len(found.notices) == 1 and "nobody-of-that-name" in found.notices[0]


def test_a_pocket_needs_a_service_or_what_one_must_have(load):
    text = '[service.s]\nruntime = "tensorflow"\n[pocket.p]\ndir = "DIR/detect"\n'
    assert "pocket.p.service: is missing; name one (s)" in config.describe(load(text).problems)
    found = load(text + 'requires = ["tensorflow>=2.15,<2.22", "numpy"]\n')
    assert not found.problems and found.pockets["p"].service is None


def test_a_pocket_needs_a_directory_that_exists(load):
    for line, said in {
        "": "pocket.p.dir: is missing",
        'dir = "DIR/nowhere"': "does not exist",
        'dir = "DIR/m.keras"': "is not a directory",
        "dir = 3": "is not an absolute path",
        'dir = "/"': "holds files of the whole host",
        'dir = "/usr/share"': "is part of the system",
    }.items():
        found = load(f'[service.s]\nruntime = "tensorflow"\n[pocket.p]\nservice = "s"\n{line}\n')
        assert said in config.describe(found.problems) and len(found.problems) == 1


def test_a_directory_behind_a_link_is_resolved_once_and_judged_by_where_it_leads(load, conf):
    (conf.parent / "link").symlink_to("detect")
    (conf.parent / "system").symlink_to("/etc")
    (conf.parent / "loop").symlink_to("loop")
    text = '[service.s]\nruntime = "tensorflow"\n[pocket.p]\nservice = "s"\ndir = "DIR/{}"\n'
    assert load(text.format("link")).pockets["p"].dir == conf.parent / "detect"
    assert "leads to /etc, which is part of the system" in config.describe(load(text.format("system")).problems)
    assert "does not exist" in config.describe(load(text.format("loop")).problems)
