"""Files to definitions: what is there, what wins, what falls with what."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pocketd import config
from pocketd.definitions import Allow, ModelFactory, ModelFile, User
from pocketd.paths import Mount

SERVICE = '[service.tensorflow]\nruntime = "tensorflow"\n'
POCKET = SERVICE + '[pocket.detect]\nservice = "tensorflow"\ndir = "DIR/detect"\n'


def told(found) -> str:
    return config.describe(found.problems)


def test_every_key_of_the_design_arrives(load, conf):
    found = load(
        """
        [service.tensorflow]
        runtime = "tensorflow"
        rootfs = "host"
        python = "/bin/sh"
        start = "boot"
        exit = "full"
        env = { TF_ENABLE_ONEDNN_OPTS = "1" }
        models = { mobilenet = "DIR/m.keras", faces = "mtcnn:MTCNN" }
        limits = { "memory.max" = "6G" }
        [service.torch]
        runtime = "python"
        preload = ["torch", "torch.nn"]
        rootfs = "DIR"
        [service.tools]
        runtime = "exec"
        [pocket.detect]
        service = "tensorflow"
        dir = "DIR/detect"
        program = "src/detect.py"
        packages = "vendor"
        may_run = ["root", "@root"]
        run_as = 1234
        limits = { "memory.max" = "800M", "cpu.max" = "50%", "pids.max" = 256 }
        allow = { network = "host", models = ["mobilenet"], devices = [], write = ["out", "a/b/"] }
        mounts = ["DIR/m.keras:/m.keras", "DIR/detect:/data:rw"]
        requires = ["tensorflow>=2.15,<2.22"]
        env = { MODE = "fast" }
        """
    )
    assert told(found) == ""
    service = found.services["tensorflow"]
    assert (service.runtime, service.rootfs, service.python) == ("tensorflow", None, Path("/bin/sh"))
    assert (service.start, service.exit, service.env) == ("boot", "full", {"TF_ENABLE_ONEDNN_OPTS": "1"})
    models = {"mobilenet": ModelFile(conf.parent / "m.keras"), "faces": ModelFactory("mtcnn", "MTCNN")}
    assert service.models == models
    assert service.limits == {"memory.max": str(6 << 30)}
    assert found.services["torch"].preload == ("torch", "torch.nn")
    assert found.services["torch"].rootfs == conf.parent
    pocket = found.pockets["detect"]
    assert (pocket.service, pocket.dir, pocket.program) == ("tensorflow", conf.parent / "detect", "src/detect.py")
    assert (pocket.packages, pocket.may_run, pocket.run_as) == ("vendor", ("root", "@root"), User(1234, 1234))
    assert pocket.limits == {"memory.max": str(800 << 20), "cpu.max": "50000 100000", "pids.max": "256"}
    assert pocket.allow == Allow("host", ("mobilenet",), ("out", "a/b"))
    assert pocket.mounts == (
        Mount(conf.parent / "m.keras", Path("/m.keras"), False),
        Mount(conf.parent / "detect", Path("/data"), True),
    )
    assert (pocket.requires, pocket.env) == (("tensorflow>=2.15,<2.22",), {"MODE": "fast"})
    assert not found.invalid and not found.notices


def test_without_a_word_a_pocket_has_no_right(load):
    pocket = load(POCKET).pockets["detect"]
    assert pocket.allow == Allow("none", (), ())
    assert pocket.may_run == () and pocket.mounts == () and pocket.run_as is None


def test_definitions_cannot_be_changed(load):
    found = load(POCKET)
    with pytest.raises(AttributeError):
        found.pockets["detect"].service = "other"
    with pytest.raises(TypeError):
        found.services["other"] = found.services["tensorflow"]
    with pytest.raises(TypeError):
        found.pockets["detect"].limits["memory.max"] = "1"


def test_the_shipped_example_is_right():
    found = config.load(Path(__file__).parents[2] / "pocketd.conf")
    assert told(found) == ""
    assert list(found.services) == ["tensorflow"]


# Files


def test_a_missing_file_that_was_named_is_a_problem(conf):
    found = config.load(conf, explicit=True)
    assert told(found) == f"{conf}: cannot be read: No such file or directory; name a file that can"
    assert not found.services


def test_a_missing_default_file_is_the_built_in_service(conf):
    found = config.load(conf, explicit=False)
    assert told(found) == ""
    service = found.services["tensorflow"]
    assert (service.runtime, service.rootfs, service.start) == ("tensorflow", None, "demand")


def test_drop_ins_are_laid_over_in_the_order_of_their_names(load, drop_in):
    drop_in("20-b.conf", '[pocket.detect]\nlimits = { "pids.max" = 20 }\nmay_run = ["root"]\n')
    drop_in("10-a.conf", '[pocket.detect]\nlimits = { "pids.max" = 10, "memory.max" = "10M" }\nprogram = "a.py"\n')
    drop_in("30-c.conf.bak", "nonsense")
    pocket = load(POCKET + 'may_run = ["nobody", "root"]\n[pocket.detect.limits]\n"cpu.max" = "10%"\n').pockets[
        "detect"
    ]
    assert pocket.limits == {"pids.max": "20", "memory.max": str(10 << 20), "cpu.max": "10000 100000"}
    assert pocket.may_run == ("root",)  # a list is one value
    assert pocket.program == "a.py"


def test_a_drop_in_adds_to_the_built_in_configuration(conf, drop_in):
    drop_in("10.conf", '[pocket.detect]\nservice = "tensorflow"\ndir = "DIR/detect"\n')
    found = config.load(conf, explicit=False)
    assert told(found) == "" and list(found.pockets) == ["detect"]


def test_a_problem_names_the_drop_in_that_it_stands_in(load, drop_in):
    path = drop_in("10.conf", '[pocket.detect.limits]\n"memory.max" = "lots"\n')
    [problem] = load(POCKET + 'limits = { "pids.max" = 1 }\n').problems
    assert (problem.file, problem.key, problem.value) == (path, 'pocket.detect.limits."memory.max"', '"lots"')


def test_a_file_that_is_not_toml_names_file_and_line_and_nothing_stands(load, drop_in):
    path = drop_in("90-detect.conf", '[pocket.detect]\nallow = { network = "none"\n')
    found = load(POCKET)
    assert told(found).startswith(f"{path}:2: is not TOML: ")
    assert not found.services and not found.pockets
    # The drop-in may have been the one that took a right away.
    assert set(found.invalid) == {"tensorflow", "detect", "defaults.run"}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"[service.tensorflow]\nruntime = \n", ":2: is not TOML"),
        (b"a = 1\na = 2\n", "is not TOML"),
        (b"\xff\xfe", "is not UTF-8 (at byte 0)"),
        (b"a = " + b"[" * 50_000, "nested too deeply"),
        (b"a = " + b"9" * 10_000, "is not TOML"),
        (b"a = '\x1b[31m'", "is not TOML"),
    ],
)
def test_garbage_is_a_problem_of_one_printable_line(conf, data, said):
    conf.write_bytes(data)
    found = config.load(conf)
    assert len(found.problems) == 1 and said in told(found)
    assert told(found).isprintable()


# What falls with what


def test_all_problems_show_at_once_with_file_key_and_value(load, conf):
    found = load(
        """
        colour = "red"
        [service.one]
        runtime = "tensorfow"
        satrt = "boot"
        [service.two]
        start = true
        [pocket.detect]
        service = "thee"
        dir = "relative"
        limits = { "memory.mx" = 1, "pids.max" = true }
        [admission]
        sessions = 0
        [service.three]
        runtime = "exec"
        """
    )
    lines = told(found).splitlines()
    for key, right in {
        'colour = "red"': "keys here are admission, defaults, held, pocket, service",
        'service.one.runtime = "tensorfow"': 'did you mean "tensorflow"?',
        'service.one.satrt = "boot"': "did you mean 'start'?",
        "service.two.runtime": "is missing",
        "service.two.start = true": '"demand" or "boot" or "manual"',
        'pocket.detect.service = "thee"': "did you mean 'three'?",
        'pocket.detect.dir = "relative"': "is not an absolute path",
        'pocket.detect.limits."memory.mx" = 1': "did you mean 'memory.max'?",
        'pocket.detect.limits."pids.max" = true': "is not a number",
        "admission.sessions = 0": "from 1 to 100000",
    }.items():
        [line] = [line for line in lines if line.startswith(f"{conf}: {key}: ")]
        assert right in line
    assert len(lines) == 10
    assert list(found.services) == ["three"]
    assert set(found.invalid) == {"one", "two", "detect"}


def test_a_bad_service_takes_its_pockets_along_and_nothing_else(load):
    found = load(
        POCKET
        + """
        [service.bad]
        runtime = "tensorflow"
        rootfs = "/nowhere"
        [pocket.victim]
        service = "bad"
        dir = "DIR/detect"
        """
    )
    assert list(found.services) == ["tensorflow"] and list(found.pockets) == ["detect"]
    assert set(found.invalid) == {"bad", "victim"}
    assert found.invalid["victim"][0].key == "pocket.victim.service"
    assert "that service has a problem itself" in found.invalid["victim"][0].message


def test_one_name_cannot_be_a_service_and_a_pocket(load):
    found = load(POCKET + '[pocket.tensorflow]\nservice = "tensorflow"\ndir = "DIR/detect"\n')
    assert "services and pockets share their names" in told(found)
    assert not found.services and set(found.invalid) == {"tensorflow", "detect"}


@pytest.mark.parametrize(
    "name", ["Upper", "1st", "under_score", "-x", "x" * 64, '""', '"a.b"', '"../x"', '"a b"', '"ä"']
)
@pytest.mark.parametrize("kind", ["service", "pocket"])
def test_a_name_outside_the_alphabet_is_refused(load, kind, name):
    found = load(f'[{kind}.{name}]\nruntime = "exec"\n')
    assert "is not a name; use a-z" in told(found) and len(found.problems) == 1
    assert list(found.invalid) == [name.strip('"')]


@pytest.mark.parametrize("verb", ["on", "off", "run", "ps", "stop", "logs", "doctor", "events"])
def test_a_verb_of_the_command_is_no_name(load, verb):
    assert f"(pocket {verb}); choose another" in told(load(f'[service.{verb}]\nruntime = "exec"\n'))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("service = 3", "service = 3: is not a table"),
        ("[service]\ntensorflow = 3", "service.tensorflow: is not a table; write [service.tensorflow]"),
        ('[service.x]\nruntime = "exec"\nenv = "A=1"', 'service.x.env = "A=1": is not a table'),
        ("[service.x]\nruntime = { a = 1 }", "service.x.runtime: is a table"),
        ("[defaults]\npocket = []", "defaults.pocket = []: is not a table"),
        ("[defaults.pockets]\nlimits = {}", "is not a key that is known here; did you mean 'pocket'?"),
        ("[[pocket]]\nname = 1", 'pocket = [{"name": 1}]: is not a table'),
    ],
)
def test_a_wrong_shape_is_a_problem_not_a_crash(load, text, said):
    assert said in told(load(text))


# Defaults


def test_defaults_give_the_limits_that_a_pocket_does_not_name(load):
    found = load(
        POCKET
        + """
        limits = { "pids.max" = 10 }
        [defaults.pocket]
        limits = { "pids.max" = 99, "memory.max" = "1G" }
        [defaults.run]
        limits = { "pids.max" = 7 }
        """
    )
    assert found.pockets["detect"].limits == {"pids.max": "10", "memory.max": str(1 << 30)}
    assert found.run_limits == {"pids.max": "7"}


def test_bad_defaults_take_along_what_depends_on_them(load):
    found = load(
        POCKET
        + """
        [pocket.own]
        service = "tensorflow"
        dir = "DIR/detect"
        limits = { "pids.max" = 10 }
        [defaults.pocket]
        limits = { "pids.max" = "many" }
        [defaults.run]
        limits = { "pids.max" = "many" }
        """
    )
    assert list(found.pockets) == ["own"]
    assert set(found.invalid) == {"detect", "defaults.run"}


def test_a_limit_that_this_host_cannot_enforce_disables_its_pocket(load):
    def refusals(names):
        return [(name, "lacks the controller 'memory'") for name in names if name.startswith("memory.")]

    found = load(POCKET + 'limits = { "memory.max" = "1G", "pids.max" = 5 }\n', refusals=refusals)
    [problem] = found.problems
    assert problem.key == 'pocket.detect.limits."memory.max"' and problem.value == '"1G"'
    assert "lacks the controller 'memory'" in problem.message
    assert not found.pockets and list(found.services) == ["tensorflow"]


# The author's file


def test_the_author_says_how_the_program_runs_and_the_host_wins(load, author):
    author('program = "a.py"\nenv = { A = "author", B = "author" }\nrequires = ["tensorflow"]\npackages = "lib"\n')
    pocket = load(POCKET + 'program = "host.py"\nenv = { A = "host" }\n').pockets["detect"]
    assert (pocket.program, pocket.packages, pocket.requires) == ("host.py", "lib", ("tensorflow",))
    assert pocket.env == {"A": "host", "B": "author"}


@pytest.mark.parametrize(
    "right",
    [
        'allow = { network = "host" }',
        'may_run = ["eve"]',
        'run_as = "daemon"',
        'limits = { "pids.max" = "max" }',
        'mounts = ["/srv"]',
    ],
)
def test_the_author_cannot_give_rights(load, author, right):
    path = author(right + "\n")
    found = load(POCKET)
    [problem] = found.problems
    assert (problem.file, problem.key) == (path, right.split(" ")[0])
    assert "is a right, which an author cannot give" in problem.message
    assert not found.pockets and list(found.services) == ["tensorflow"]


@pytest.mark.parametrize("key", ['service = "tensorflow"', 'dir = "/srv"', "warm = 100"])
def test_the_author_cannot_say_what_is_the_operators(load, author, key):
    author(key + "\n")
    assert "is for the host's operator to say" in told(load(POCKET))


def test_a_problem_of_the_author_is_named_as_it_stands_in_the_authors_file(load, author):
    path = author('program = "../escape.py"\ncheckpont = "main"\n')
    assert [(p.file, p.key) for p in load(POCKET).problems] == [(path, "program"), (path, "checkpont")]


def test_an_authors_file_that_is_not_toml_disables_that_pocket_alone(load, author):
    path = author("program = \n")
    found = load(POCKET)
    assert told(found).startswith(f"{path}:1: is not TOML")
    assert list(found.invalid) == ["detect"] and list(found.services) == ["tensorflow"]


def test_an_authors_file_is_not_followed_through_a_link(load, conf):
    secret = conf.parent / "secret"
    secret.write_text("s3cret = 1\n")
    (conf.parent / "detect" / "pocket.toml").symlink_to(secret)
    found = load(POCKET)
    assert "symbolic link" in told(found) and "s3cret" not in told(found)
    assert list(found.invalid) == ["detect"]


def test_an_authors_fifo_is_refused_and_not_waited_for(load, conf):
    os.mkfifo(conf.parent / "detect" / "pocket.toml")
    assert "not a regular file" in told(load(POCKET))


def test_an_authors_directory_is_refused(load, conf):
    (conf.parent / "detect" / "pocket.toml").mkdir()
    assert "not a regular file" in told(load(POCKET))


def test_an_authors_file_is_read_up_to_a_size(load, author):
    comment = "#" * 63 + "\n"
    author(comment * (config.AUTHORS_LIMIT // len(comment)))
    assert told(load(POCKET)) == ""
    author(comment * (config.AUTHORS_LIMIT // len(comment)) + "#")
    assert f"more than {config.AUTHORS_LIMIT} bytes" in told(load(POCKET))


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 30_000, ".".join("a" * 15_000) + " = 1", "[" + ".".join("a" * 15_000) + "]"]
)
def test_an_authors_file_made_to_be_deep_is_a_problem_and_takes_no_time(load, author, text):
    author(text)
    start = time.process_time()
    found = load(POCKET)
    assert time.process_time() - start < 0.2
    assert found.problems and list(found.invalid) == ["detect"]


def test_a_deep_authors_file_of_many_short_lines_is_a_problem_and_takes_no_time(load, author):
    author("".join(f"{'.'.join('a' * 490)}.k{n} = 1\n" for n in range(65)))
    start = time.process_time()
    assert "is not a key that is known here" in told(load(POCKET))
    assert time.process_time() - start < 0.5


def test_what_an_author_writes_cannot_paint_the_operators_terminal(load, author):
    author('"\\u001b[31mred\\u009b" = "\\u001b[2J\\u202e"\n')
    assert told(load(POCKET)).isprintable()


def test_loading_leaves_no_descriptor_open(load, author):
    path = author("limits = 3\n")
    load(POCKET)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        load(POCKET)
    path.unlink()
    path.mkdir()
    load(POCKET)
    assert len(os.listdir("/proc/self/fd")) == before


def test_of_many_mistakes_the_first_are_told(load):
    """A table may be its author's: thousands of keys are no work for pocketd, and no text that others wait for."""
    keys = "\n".join(f"abc{n} = 1" for n in range(5000))
    may = ", ".join(f'"a b{n}"' for n in range(5000))
    found = load(f"{POCKET}{keys}\nmay_run = [{may}]")
    assert "is one of 4980 more keys that are not known here" in told(found)
    assert "and 4980 more" in told(found)
    assert len(told(found)) < 20000
