"""A program is `__main__` as under `python PROGRAM`: its arguments, its namespace, where it is imported from."""

from __future__ import annotations

import os
import py_compile
import zipfile

import pytest

ARGUMENTS = """
    import os, sys
    sys.stdout.buffer.write(repr([os.fsencode(a) for a in sys.argv]).encode() + b"\\n")
    sys.stdout.buffer.write(repr([os.fsencode(a) for a in sys.orig_argv]).encode() + b"\\n")
"""

# All that a program can see of its own module and of where modules come from.
MAIN = """
    import inspect, pickle, sys
    def shown(value):
        loader = hasattr(value, "loader") or hasattr(value, "load_module")
        return type(value).__name__ if loader or callable(value) else repr(value)
    print(sorted((k, shown(v)) for k, v in list(vars().items()) if k not in ("sys", "inspect", "pickle", "shown")))
    main = sys.modules["__main__"]
    print(main.__dict__ is globals(), str(main).split(" from ")[0], main.__name__, __name__)
    loader = main.__loader__
    print(type(loader).__name__, getattr(loader, "name", None), getattr(loader, "path", None))
    print(__builtins__ is sys.modules["builtins"], main.__spec__ and main.__spec__.name)
    print(sys.path, sys.argv, sys.orig_argv, sys.executable, sys.prefix, sys.flags)
    class Point: pass
    print(pickle.loads(pickle.dumps(Point())).__class__ is Point, Point.__module__)
    try:
        print(inspect.getsource(shown))
    except OSError as e:
        print(e)
"""


def test_arguments_arrive_as_they_are(both):
    ended = both.same_program(
        ARGUMENTS, "", "a b", "--service", "-", "--", "-h", "é€", b"\xff\xfe\x80", "\n", "x=/y", ""
    )
    assert rb"\xff\xfe\x80" in ended.out


def test_arguments_of_100_kb_arrive(both):
    ended = both.same_program(ARGUMENTS, "x" * 100_000, "y" * 100_000, *["z"] * 5000)
    assert len(ended.out) > 200_000


def test_no_argument_at_all(both):
    both.same_program(ARGUMENTS)


def test_main_is_the_program(both):
    both.same_program(MAIN, "one", "two")


@pytest.mark.parametrize("name", ["./app.py", "sub/app.py", "{place}/sub/app.py", "sub/../app.py", "sub//app.py"])
def test_main_by_another_path(both, name):
    both.write("app.py", MAIN)
    both.write("sub/app.py", MAIN)
    both.same(name.format(place=both.place))


def test_a_symbolic_link_is_imported_from_where_it_leads(both):
    both.write("real/app.py", MAIN + "\n    import beside")
    both.write("real/beside.py", "print(__name__, __file__)")
    (both.place / "link.py").symlink_to("real/app.py")
    assert b"beside" in both.same("link.py").out


def test_a_program_beneath_a_directory_that_is_a_link(both):
    both.write("real/app.py", MAIN)
    (both.place / "link").symlink_to("real")
    both.same("link/app.py")


def test_a_program_with_another_ending_or_none(both):
    both.write("app", MAIN)
    both.same("app")


def test_a_program_whose_name_begins_with_a_dash(both):
    both.write("-app.py", "import sys; print(sys.argv)")
    plain, pocket = both.plain("./-app.py"), both.pocket("./-app.py")
    assert pocket == plain


def test_a_program_in_latin_1(both):
    (both.place / "app.py").write_bytes(b"# -*- coding: latin-1 -*-\nprint(ascii('\xe9'))\n")
    assert both.same("app.py").out == b"'\\xe9'\n"


def test_a_program_with_a_byte_order_mark_and_foreign_line_ends(both):
    (both.place / "app.py").write_bytes(b"\xef\xbb\xbfprint(__file__[-6:])\r\nprint(1)\r\n")
    both.same("app.py")


def test_a_name_that_is_not_utf_8(both):
    name = os.fsencode(both.place) + b"/\xff.py"
    with open(name, "w") as f:
        f.write("import os, sys; print(ascii(__file__), ascii(sys.argv), ascii(sys.path[0]))")
    both.same(name)
    both.same(b"\xff.py", b"\xfe")


def test_an_empty_program(both):
    assert both.same_program("").status == 0


def test_future_statements_are_the_programs_own(both):
    both.same_program("def f(x: undefined): pass\n")
    both.same_program("from __future__ import annotations\ndef f(x: undefined): pass\nprint(f.__annotations__)")


def test_annotations_of_a_program(both):
    both.same_program("x: int = 3\nprint(__annotations__)")


@pytest.mark.parametrize("name", ["missing.py", "no/such/missing.py", "."])
def test_a_program_that_does_not_exist(both, name):
    assert both.same(name).status in (1, 2)


def test_a_program_that_may_not_be_read(both):
    """Root reads everything, a worker does not: what Python says of it is the kernel's word."""
    path = both.write("app.py", "print(1)")
    path.chmod(0)
    ended = both.pocket("app.py")
    # Its files are shown as its own: the owner of a file of mode 0 may not read it.
    assert (ended.status, ended.out) == (2, b"")
    assert ended.err.endswith(b": [Errno 13] Permission denied\n")


def test_code_by_c(both):
    both.same("-c", "import sys; print(sys.argv, sys.path[0], __name__, sorted(vars()))", "a", "-b")
    both.same("-c", MAIN.replace("\n    ", "\n").lstrip())


def test_code_by_c_that_fails(both):
    assert b'File "<string>", line 1, in <module>' in both.same("-c", "import sys; 1/0").err
    both.same("-c", "def f(:\n  pass")


def test_code_by_c_that_is_empty(both):
    both.same("-c", "")


def test_code_by_c_with_surrogates(both):
    both.same("-c", "print(ascii('é€'))")


def test_a_module_by_m(both):
    both.write("package/__init__.py", "print('init', __name__)")
    both.write("package/tool.py", MAIN)
    both.same("-m", "package.tool", "a", "b")


def test_a_package_by_m(both):
    both.write("package/__init__.py", "print('init', __name__)")
    both.write("package/__main__.py", MAIN + "\n    from . import other\n    print(other.__name__, __package__)")
    both.write("package/other.py", "")
    both.same("-m", "package", "a")


@pytest.mark.parametrize("name", ["missing", "missing.sub", "json.missing", "json", "sys", "broken", "syntax"])
def test_a_module_by_m_that_cannot_be_run(both, name):
    both.write("broken.py", "import nothing_of_that_name")
    both.write("syntax.py", "def f(:\n")
    assert both.same("-m", name).status == 1


def test_a_module_of_the_standard_library_by_m(both):
    assert both.same("-m", "json.tool", input=b'{"a": 1}').out == b'{\n    "a": 1\n}\n'
    both.same("-m", "timeit", "-h")


def test_a_directory_with_a_main(both):
    both.write("app/__main__.py", MAIN + "\n    import beside")
    both.write("app/beside.py", "print(__file__)")
    both.same("app", "a")
    both.same("app/", "a")


def test_a_directory_whose_main_fails(both):
    both.write("app/__main__.py", "def f():\n    1/0\nf()\n")
    assert both.same("app").status == 1


def test_a_zip_file_with_a_main(both):
    with zipfile.ZipFile(both.place / "app.pyz", "w") as archive:
        archive.writestr("__main__.py", "import sys, beside\nprint(__file__, __spec__, sys.path[0], sys.argv)\n")
        archive.writestr("beside.py", "print(__file__)\n")
    both.same("app.pyz", "a", mask=(rb"0x[0-9a-f]+",))


def test_a_compiled_program(both):
    source = both.write("app.py", MAIN)
    py_compile.compile(str(source), cfile=str(both.place / "app.pyc"), doraise=True)
    source.unlink()
    both.same("app.pyc", "a")


def test_a_compiled_program_of_another_version(both):
    (both.place / "app.pyc").write_bytes(b"\x01\x02\r\n" + bytes(12) + b"nonsense")
    assert both.same("app.pyc").status == 1


def test_a_program_on_standard_input(both):
    both.same("-", "a", input=b"import sys; print(sys.argv, __name__, sys.path[0])\n")


@pytest.mark.parametrize("name", ["runtime", "config", "nsutil", "msgpack", "pocketd", "cgroup", "worker", "program"])
def test_its_own_modules_may_have_any_name(both, name):
    both.write(f"{name}.py", "print('mine', __name__, __file__)")
    both.same_program(f"import {name}\nprint({name}.__file__)")
    both.write(f"{name}_pkg/app.py", f"import {name}")
    assert both.same(f"{name}.py").out.startswith(b"mine __main__")


def test_packages_of_the_daemons_names_may_be_the_programs_own(both):
    for name in ("runtime", "pocketd", "nsutil", "msgpack"):
        both.write(f"{name}/__init__.py", f"from {name} import wire")
        both.write(f"{name}/wire.py", "print(__name__)")
    both.same_program("import runtime, pocketd, nsutil, msgpack, sys; print(runtime.__file__, pocketd.wire)")


def test_modules_of_the_daemon_are_not_there(both):
    for name in ("runtime", "nsutil", "pocketd.daemon", "pocketd.wire"):
        assert b"ModuleNotFoundError" in both.pocket("-c", f"import {name}").err


def test_what_pockets_code_may_say_of_itself_is_there(both):
    """pocketd.checkpoint() and its like, also where nobody has installed it; a module of that name is the app's."""
    both.write("app.py", "import pocketd\nprint(pocketd.checkpoint(), pocketd.on_start(lambda: print('on')) is None)\n")
    assert both.pocket("app.py").out == b"on\nNone False\n"
    both.write("pocketd.py", "mine = 1\n")
    both.write("app.py", "import pocketd\nprint(pocketd.mine)\n")
    assert both.pocket("app.py").out == b"1\n"


def test_no_module_is_loaded_that_is_not_of_the_standard_library(both):
    source = """
        import sys
        names = {name.partition(".")[0] for name in sys.modules}
        print(sorted(names - set(sys.stdlib_module_names) - {"__main__"}))
        print(sorted(str(m.__spec__.origin) for m in sys.modules.values()
                     if getattr(m, "__spec__", None) and "pocketd" in str(m.__spec__.origin)))
    """
    both.write("app.py", source)
    # Whatever .pth files of the environment import, plain Python has too.
    assert both.pocket("app.py") == both.plain("app.py")


def test_a_module_that_changes_builtins_changes_its_own_process_alone(both):
    both.same_program("import builtins, sys; builtins.len = 3; sys.modules['json'] = None; sys.path.clear()")
    both.same_program("import json; print(len([1]), sys) if 0 else print(len([1]))")


def test_garbage_collection_is_on(both):
    both.same_program("""
        import gc
        print(gc.isenabled(), gc.get_threshold(), gc.get_debug(), gc.callbacks)
        class Cycle:
            def __init__(self): self.me = self
            def __del__(self): print("collected")
        Cycle(); gc.collect()
    """)


def test_the_interpreter_is_set_as_a_fresh_one(both):
    both.same_program("""
        import signal, sys, threading, locale, decimal, random, time, warnings, tracemalloc, faulthandler
        print(sys.getrecursionlimit(), sys.getswitchinterval(), sys.gettrace(), sys.getprofile(), sys.flags)
        print(sys.warnoptions, warnings.filters, sys.dont_write_bytecode, sys.pycache_prefix, sys._xoptions)
        print(sys.excepthook, sys.displayhook, threading.excepthook, sys.unraisablehook)
        print(threading.enumerate(), threading.main_thread().ident == threading.get_ident(), threading.active_count())
        print(threading.main_thread().native_id == threading.get_native_id())
        print([signal.getsignal(n) for n in sorted(signal.valid_signals())])
        print(signal.pthread_sigmask(signal.SIG_BLOCK, []))
        print(locale.setlocale(locale.LC_ALL), sys.getfilesystemencoding(), sys.getdefaultencoding(), time.tzname)
        print([f for f in sys.meta_path if type(f).__name__ != "_OfPocketd"], faulthandler.is_enabled())
        print([type(h).__name__ for h in sys.path_hooks])
        print(hasattr(sys, "ps1"), hasattr(sys, "last_value"), sys.stdin, sys.stdout, sys.stderr, sys.__stdout__)
        print(signal.set_wakeup_fd(-1), tracemalloc.is_tracing(), sys.getallocatedblocks() > 0)
    """, mask=(rb"0x[0-9a-f]+", rb"MainThread, started \d+"))  # fmt: skip


def test_nothing_is_in_warnings_registries_or_import_caches_of_ours(both):
    both.same_program("""
        import sys, linecache, atexit, logging, os
        print([p for p in sys.path_importer_cache if "pocketd" in p and "pytest" not in p], logging.root.handlers)
        print(list(linecache.cache), atexit._ncallbacks() if "logging" not in sys.modules else "")
        print([k for k in sys.modules if k.startswith(("runtime", "nsutil", "pocketd", "msgpack"))])
    """)
