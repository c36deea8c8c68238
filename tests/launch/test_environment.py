"""The caller's environment, directory, umask, limits, locale and time zone are the program's."""

from __future__ import annotations

import os
import resource

import pytest

from tests.launch.both import Both, Ended

ENVIRONMENT = """
    import os, sys
    print(sorted(os.environb.items()))
    with open("/proc/self/environ", "rb") as f: f.read(1)
    os.system("env | sort")
"""

VARIABLES = {
    "EMPTY": "",
    "SPACED": " a b ",
    "LINES": "a\nb",
    "EQUALS": "a=b=c",
    "é": "é€",
    "A.B-C": "odd name",
    "POCKET": "mine",
    "POCKETD_OTHER": "mine too",
}


def test_the_environment_is_the_callers_but_for_where_pocketd_is(both):
    ended = both.same_program(ENVIRONMENT, env=VARIABLES, mask=(rb"\n_=[^\n]*",))
    assert b"POCKETD_RUNTIME_DIR" not in ended.out and b"odd name" in ended.out


def test_bytes_in_the_environment_that_are_not_utf_8(both):
    both.same_program(ENVIRONMENT, env={"BYTES": os.fsdecode(b"\xff\xfe")}, mask=(rb"\n_=[^\n]*",))


def test_an_environment_of_200_kb(both):
    many = {f"VARIABLE_{n}": "x" * 1000 for n in range(100)} | {"LARGE": "y" * 100_000}
    assert len(both.same_program("import os; print(sorted(os.environ.items()))", env=many).out) > 200_000


def test_a_variable_that_the_program_sets_reaches_its_children_and_libc(both):
    both.same_program("""
        import ctypes, os, time
        os.environ["MINE"] = "1"; os.environ["TZ"] = "Asia/Kathmandu"; time.tzset()
        del os.environ["HOME"]
        print(time.localtime(0)[:6], time.tzname)
        os.system("echo $MINE; echo ${HOME-none}")
        libc = ctypes.CDLL(None); libc.getenv.restype = ctypes.c_char_p
        print(libc.getenv(b"MINE"), libc.getenv(b"HOME"), libc.getenv(b"GLIBC_TUNABLES"))
    """)


def test_what_libc_knows_is_what_python_knows(both):
    both.same_program(
        """
        import ctypes, os
        environ = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "environ")
        n = 0
        while environ[n]: n += 1
        names = [environ[i].partition(b"=")[0] for i in range(n)]
        print(sorted(names) == sorted(os.environb), len(names) == len(set(names)))
        """
    )


@pytest.mark.parametrize(
    "env",
    [
        {"PYTHONUNBUFFERED": "1"},
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "ascii:replace"},
        {"PYTHONIOENCODING": ":backslashreplace"},
        {"PYTHONUTF8": "1", "LC_ALL": "C"},
        {"PYTHONWARNINGS": "ignore"},
        {"PYTHONWARNINGS": "error::UserWarning,ignore::DeprecationWarning"},
        {"PYTHONWARNINGS": "nonsense::"},
        {"PYTHONDONTWRITEBYTECODE": "1"},
        {"PYTHONPYCACHEPREFIX": "cache"},
        {"PYTHONNOUSERSITE": "1"},
        {"PYTHONFAULTHANDLER": "1"},
        {"PYTHONBREAKPOINT": "0"},
        {"PYTHONWARNDEFAULTENCODING": "1"},
        {"PYTHONOPTIMIZE": "2"},
        {"PYTHONDEVMODE": "1"},
        {"PYTHONHASHSEED": "1"},
        {"PYTHONINTMAXSTRDIGITS": "1000"},
        {"PYTHONSAFEPATH": "1"},
        {"PYTHONTRACEMALLOC": "3"},
        {"PYTHONCOERCECLOCALE": "0", "LC_ALL": "", "LANG": "C"},
    ],
    ids=lambda env: " ".join(f"{k}={v}" for k, v in env.items()),
)
def test_variables_of_python_do_what_they_do(both: Both, env):
    """Some of them only in a fresh interpreter: then one line says so and nothing else differs."""
    both.write("module.py", "import warnings; warnings.warn('late', DeprecationWarning)")
    both.write(
        "app.py",
        """
        import faulthandler, os, sys, tracemalloc, warnings
        print(sys.stdout.encoding, sys.stdout.errors, sys.stdin.encoding, sys.stdin.errors, sys.stderr.encoding)
        print(sys.stdout.line_buffering, sys.stdout.write_through, type(sys.stdout.buffer).__name__)
        print(sys.warnoptions, faulthandler.is_enabled(), sys.dont_write_bytecode, sys.pycache_prefix, sys.flags)
        print(tracemalloc.get_traceback_limit() if tracemalloc.is_tracing() else None, __debug__, sys.path[:2])
        print(hash("a") if sys.flags.hash_randomization == 0 or os.environ.get("PYTHONHASHSEED") else "")
        print("\\u00e9\\u20ac" if sys.stdout.encoding == "utf-8" or sys.stdout.errors != "strict" else "")
        sys.stderr.write("\\u00e9\\u20ac\\n")
        warnings.warn("shown")
        breakpoint() if os.environ.get("PYTHONBREAKPOINT") else None
        import module
        print(module.__cached__)
        """,
    )
    expected = both.plain("app.py", env=env)
    for stray in both.place.glob("**/*.pyc"):
        stray.unlink()
    found = both.pocket("app.py", env=env)
    name = next(iter(env)).encode()
    line = b"pocket: %s differs from the service's, which read it at import; running it cold\n" % name
    found = Ended(found.status, found.out, found.err.replace(line, b""))
    assert found == expected, f"in a pocket:\n{found.shown()}\nunder python:\n{expected.shown()}"


def test_pythonpath_comes_before_the_rest(both):
    both.write("first/found.py", "print(__file__)")
    both.write("second/found.py", "print(__file__)")
    source = "import found, sys, os; print([p for p in sys.path if p.startswith(os.getcwd())])"
    both.same_program(source, env={"PYTHONPATH": f"{both.place}/first:{both.place}/second"})
    both.same_program(source, env={"PYTHONPATH": "second:first"})
    both.same_program(source, env={"PYTHONPATH": ":second:"})


def test_pythonpath_with_modules_of_the_daemons_names(both):
    for name in ("json", "signal", "msgpack", "runtime", "pocketd", "resource"):
        both.write(f"first/{name}.py", "raise SystemExit('wrong')")
    both.same_program("import runtime", env={"PYTHONPATH": "first"})
    both.write("first/found.py", "print(1)")
    both.same_program("import found", env={"PYTHONPATH": "first"})


@pytest.mark.parametrize("name", ["C", "POSIX", "C.UTF-8", "de_DE.UTF-8", "xx_XX", ""])
def test_the_locale_is_the_callers(both, name):
    both.same_program(
        """
        import locale, os, sys
        print(locale.getlocale(locale.LC_NUMERIC), locale.getpreferredencoding().lower(), sys.stdout.encoding)
        with open('text', 'w') as f: print(f.encoding.lower())
        try:
            print(locale.setlocale(locale.LC_ALL, ""), locale.format_string("%.1f", 1.5), locale.localeconv())
        except locale.Error as e:
            print(e)
        print(os.environ.get('LC_CTYPE'), sys.getfilesystemencoding(), sys.stdout.errors, sys.stdin.errors)
        """,
        env={"LC_ALL": name, "LANG": None},
    )


@pytest.mark.parametrize("zone", ["Europe/Berlin", "Asia/Tokyo", "UTC", "EST5EDT", "<+0330>-3:30", "No/Such", ""])
def test_the_time_zone_is_the_callers(both, zone):
    both.same_program(
        """
        import datetime, os, time
        print(time.tzname, time.timezone, time.daylight, time.localtime(1e9)[:9], time.strftime("%Z %z"))
        print(datetime.datetime.fromtimestamp(0).astimezone(), time.mktime((2001, 1, 1, 0, 0, 0, 0, 0, -1)))
        os.system("date -d @0 2>&1")
        """,
        env={"TZ": zone},
    )


def test_without_a_time_zone_it_is_the_hosts(both):
    both.same_program("import time; print(time.tzname, time.localtime(0)[:6])", env={"TZ": None})


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o777])
def test_the_umask_is_the_callers(both, mask):
    both.same_program(
        """
        import os
        old = os.umask(0); os.umask(old); print(oct(old))
        open("file", "w").close(); print(oct(os.stat("file").st_mode)); os.unlink("file")
        os.mkdir("made"); print(oct(os.stat("made").st_mode)); os.rmdir("made")
        """,
        umask=mask,
    )


def test_limits_of_the_caller_hold(both):
    def lower():
        resource.setrlimit(resource.RLIMIT_NOFILE, (123, 456))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_STACK, (4 << 20, 4 << 20))

    both.same_program(
        """
        import resource
        for name in ("NOFILE", "CORE", "STACK", "FSIZE", "AS", "CPU", "DATA"):
            print(name, resource.getrlimit(getattr(resource, "RLIMIT_" + name))[0])
        """,
        preexec_fn=lower,
    )


def test_the_working_directory_is_the_callers(both):
    both.same_program("import os; print(os.getcwd(), os.listdir('.'), os.path.abspath('x'), open('app.py').read(6))")


def test_absolute_paths_beneath_the_directory(both):
    both.write("sub/data.txt", "data")
    path = both.place / "sub/data.txt"
    both.same_program("import sys; print(open(sys.argv[1]).read(), open('sub/data.txt').read())", str(path))


def test_a_working_directory_beneath_dir(both):
    both.write("sub/deep/app.py", "import os; print(os.getcwd(), sorted(os.listdir('../..')))")
    expected = both.plain("app.py", cwd=both.place / "sub/deep")
    found = both.pocket("app.py", cwd=both.place / "sub/deep", options=("--dir", str(both.place)))
    assert found == expected
    assert both.pocket("app.py", cwd=both.place / "sub/deep", options=("--dir", "../..")) == expected


def test_a_working_directory_with_a_name_of_spaces_and_bytes(both):
    place = os.path.join(os.fsencode(both.place), b"a b:\xff,=\\x")
    os.mkdir(place)
    with open(place + b"/app.py", "w") as f:
        f.write("import os; print(os.getcwdb(), os.listdir('.'))")
    assert both.pocket("app.py", cwd=place) == both.plain("app.py", cwd=place)


def test_a_working_directory_outside_dir_becomes_the_pockets(both):
    both.write("inner/app.py", "import os; print(os.getcwd())")
    ended = both.pocket(f"{both.place}/inner/app.py", cwd="/", options=("--dir", str(both.place / "inner")))
    assert ended.out == b"/\n"  # which the worker has too
    outside = both.write("outside/x", "").parent
    ended = both.pocket(f"{both.place}/inner/app.py", cwd=outside, options=("--dir", str(both.place / "inner")))
    assert ended.out == b"/pocket\n"


def test_a_working_directory_that_was_reached_by_a_link(both):
    both.write("real/app.py", "import os; print(os.getcwd(), os.environ['PWD'], os.path.exists(os.environ['PWD']))")
    (both.place / "link").symlink_to("real")
    link = both.place / "link"
    ended = both.pocket("app.py", cwd=link, env={"PWD": str(link)}, options=("--dir", str(both.place)))
    assert ended == both.plain("app.py", cwd=link, env={"PWD": str(link)})


def test_the_directory_is_at_pocket_too(both):
    both.write("app.py", "import os; print(os.path.samefile('/pocket', os.getcwd()), os.listdir('/pocket'))")
    assert both.pocket("app.py").out == b"True ['app.py']\n"


def test_the_home_of_the_caller_is_a_home_that_can_be_written(both):
    ended = both.pocket(
        "-c",
        "import os, tempfile; h = os.path.expanduser('~'); open(h + '/mine', 'w').write('x');"
        "print(h, os.environ['HOME'] == h, tempfile.gettempdir(), os.access(h, os.W_OK))",
    )
    home = os.environ["HOME"]
    assert (ended.status, ended.out.decode()) == (0, f"{home} True /tmp True\n")
    assert not os.path.exists(f"{home}/mine")


def test_the_python_environment_is_seen_whole(both):
    both.same_program("""
        import sys, os, sysconfig, site
        print(os.path.exists(sys.executable), sysconfig.get_paths(), site.getsitepackages(), sys.base_prefix)
        print(len(os.listdir(sysconfig.get_paths()["purelib"])) > 0, os.path.realpath(sys.executable))
        os.system(sys.executable + " -c 'import json, sys; print(sys.path)'")
    """)
