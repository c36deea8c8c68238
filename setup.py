"""Metadata, and how nsutil/livefork.so and `pocket` are built.

livefork.so is a plain shared library for ctypes, not an extension module: no Python header, no ABI tag, so that one
file serves any Python of a service. `python setup.py build_livefork` builds it in place; installs do too.

`pocket` is a program in C (pocketd/front), installed as a script is; beside it is `pocket-py`, which it becomes for
what it does not do itself.
"""

import ast
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

try:
    from setuptools.command.bdist_wheel import bdist_wheel  # setuptools 70.1+
except ImportError:
    from wheel.bdist_wheel import bdist_wheel

HERE = Path(__file__).resolve().parent
SOURCES = ("nsutil/livefork.c", "nsutil/arenas.c", "nsutil/pages.c", "nsutil/frames.c")
FLAGS = "-O2 -Wall -Wextra -Werror -fno-omit-frame-pointer -shared -fPIC"
FRONT = (
    *(f"{name}.c" for name in ("front", "run", "hold", "paths", "client", "msgpack")),
    "front.h",
    "client.h",
    "msgpack.h",
)
FRONT_FLAGS = "-O2 -Wall -Wextra -Werror -Wshadow -fstack-protector-strong -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=2"


def compiler() -> list[str]:
    """$CC and its options, or the first of cc and gcc that is there."""
    asked = shlex.split(os.environ.get("CC", ""))
    for command in [asked] if asked else [["cc"], ["gcc"]]:
        if shutil.which(command[0]):
            return command
    raise CompileError(
        f"pocketd needs a C compiler, and {asked[0] if asked else 'neither cc nor gcc'} is not there: "
        "install gcc (Debian, Fedora: gcc; Alpine: gcc musl-dev linux-headers), or set CC"
    )


def compile_to(target: Path, flags: list[str], sources: Iterable[str]) -> None:
    """Never leaves half a file where a running service may load it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    command = [*compiler(), *flags, "-o", str(partial), *(str(HERE / source) for source in sources)]
    try:
        if subprocess.run(command).returncode:
            raise CompileError(f"the compiler failed: {shlex.join(command)}")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def build_library(to: Path) -> None:
    compile_to(to / "nsutil" / "livefork.so", FLAGS.split(), SOURCES)


def value(name: str, path: str) -> ast.expr:
    """What a module of ours assigns to a name: read, not imported, as what it imports may not be installed yet."""
    for node in ast.parse((HERE / path).read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return node.value
    raise CompileError(f"{path} does not say what {name} is")


def front_definitions() -> list[str]:
    """What pocketd/front has of the modules in Python, so that it is said once.

    Verbs are the keys of main.py's VERBS, and the words that it compares `first` to.
    """
    verbs = {ast.literal_eval(key) for key in value("VERBS", "pocketd/command/main.py").keys}
    for node in ast.walk(ast.parse((HERE / "pocketd/command/main.py").read_text())):
        match node:
            case ast.Compare(left=ast.Name(id="first"), ops=[ast.Eq()], comparators=[ast.Constant(value=str(word))]):
                verbs.add(word)
    versions = {name: ast.literal_eval(value(name, "pocketd/wire.py")) for name in ("OLDEST", "VERSION")}
    words = "".join(f'"{verb}",' for verb in sorted(verbs))
    return [f"-DVERBS={words}", *(f"-D{name}={number}" for name, number in versions.items())]


class BuildLivefork(Command):
    description = "build nsutil/livefork.so in place"
    user_options: list[tuple[str, str, str]] = []

    def initialize_options(self) -> None:
        pass

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        build_library(HERE)


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        build_library(HERE if self.editable_mode else Path(self.build_lib))


class BuildScripts(Command):
    description = "build `pocket`"
    user_options = [("build-dir=", "d", "the directory it goes to")]

    def initialize_options(self) -> None:
        self.build_dir: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_scripts", "build_dir"))

    def get_source_files(self) -> list[str]:
        return [f"pocketd/front/{name}" for name in FRONT]

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_dir) / "pocket")]

    def run(self) -> None:
        sources = (source for source in self.get_source_files() if source.endswith(".c"))
        compile_to(Path(self.build_dir) / "pocket", [*FRONT_FLAGS.split(), *front_definitions()], sources)


class Wheel(bdist_wheel):
    """Any Python 3, this machine: what a wheel with a plain shared library is."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    name="pocketd",
    version="0.1.0",
    description="Runs many small apps in one heavy runtime: a warm template, forked live, for each app",
    python_requires=">=3.11",
    packages=["pocketd", "pocketd.client", "pocketd.command", "nsutil", "cgroup", "runtime"],
    package_data={"nsutil": ["py.typed"]},
    scripts=["pocketd/front/front.c"],
    install_requires=["msgpack>=1", "pyroute2", "cgroupspy==0.2.3", "python-prctl", "jeepney", "tomli-w", "pyseccomp"],
    extras_require={
        # Wheels of tensorflow-cpu exist for x86-64 only; on aarch64 tensorflow itself is the build without CUDA.
        "tensorflow": [
            "tensorflow-cpu>=2.15; platform_machine == 'x86_64'",
            "tensorflow>=2.15; platform_machine == 'aarch64'",
        ],
    },
    entry_points={"console_scripts": ["pocketd = pocketd.daemon:main", "pocket-py = pocketd.command.main:main"]},
    cmdclass={
        "build_livefork": BuildLivefork,
        "build_py": BuildPy,
        "build_scripts": BuildScripts,
        "bdist_wheel": Wheel,
    },
    zip_safe=False,
)
