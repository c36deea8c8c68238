"""What a rehearsal changes of what was made before it is as it was in each run, also where its sample does not show it."""

# ruff: noqa: E501
from __future__ import annotations

import re
import sys
import textwrap

import pytest

# What each job does to what is there by the checkpoint, and what a run says of it that is asked to.
CHANGES = {
    "a list": ("it = [1]", "it.append(2)", "it"),
    "bytes by a view": ("it = memoryview(bytearray(3))", "it[0] = 3", "bytes(it)"),
    "an attribute of an array of its own kind": (
        "import numpy as np\nclass A(np.ndarray): pass\nit = np.zeros(3).view(A); it.x = 1", "it.x = 2; it.y = 3", "vars(it)"
    ),
    "a list in a list": ("it = [[1], []]", "it[1].append(it[0]); it[0] += [3]", "it"),
    "a dict": ("it = {'a': 1}", "it['a'] += 1; it['b'] = 2; del it['a']", "it"),
    "a set": ("it = {1, 2}", "it.add(3); it.discard(1)", "sorted(it)"),
    "a deque": ("import collections; it = collections.deque([1], 3)", "it.append(2)", "it"),
    "a defaultdict": ("import collections; it = collections.defaultdict(list)", "it['a'].append(1)", "it"),
    "a Counter": ("import collections; it = collections.Counter('ab')", "it['a'] += 1", "it"),
    "an OrderedDict": ("import collections; it = collections.OrderedDict(a=1, b=2)", "it.move_to_end('a')", "it"),
    "a bytearray": ("it = bytearray(b'ab')", "it.extend(b'c'); it[0] = 0", "it"),
    "an object": ("class A: n = 0\nit = A()", "it.n += 1; it.more = 2", "vars(it)"),
    "an object in an object": ("class A: n = 0\nit = A(); it.a = A(); it.a.n = 5", "it.a.n += 1", "vars(it.a)"),
    "slots": ("class A: __slots__ = 'n', 'm'\nit = A(); it.n = 1", "it.n += 1; it.m = 2", "it.n, hasattr(it, 'm')"),
    "a dataclass": ("import dataclasses\n@dataclasses.dataclass\nclass A:\n    n: int = 0\nit = A()", "it.n += 1", "it"),
    "a class's attribute": ("class A: n = 0", "A.n += 1; A.m = 1", "A.n, hasattr(A, 'm')"),
    "a class's list": ("class A: all = []", "A.all.append(1)", "A.all"),
    "a list of a subclass": ("class A(list): n = 0\nit = A()", "it.append(1); it.n += 1", "it, it.n"),
    "a dict of a subclass": ("class A(dict): pass\nit = A()", "it['a'] = 1", "it"),
    "a function's attribute": ("def f(): pass\nf.n = 0", "f.n += 1", "f.n"),
    "a default": ("def f(seen=[]): seen.append(1); return len(seen)", "f()", "f()"),
    "a closure": ("def made():\n    n = 0\n    def f():\n        nonlocal n\n        n += 1\n        return n\n    return f\nf = made()", "f()", "f()"),
    "a partial's list": ("import functools; f = functools.partial(list.append, [])", "f(1)", "f.args"),
    "a bound method's object": ("class A:\n    n = 0\n    def f(self): self.n += 1\nf = A().f", "f()", "f.__self__.n"),
    "a namespace": ("import types; it = types.SimpleNamespace(n=0)", "it.n += 1", "it"),
    "an event": ("import threading; it = threading.Event()", "it.set()", "it.is_set()"),
    "a queue": ("import queue; it = queue.Queue()", "it.put(1)", "it.qsize()"),
    "an array of numpy": ("import numpy; it = numpy.zeros(3)", "it[:] += 1", "it"),
    "a view of numpy": ("import numpy; it = numpy.arange(12).reshape(3, 4)[::2, 1:]", "it[:] *= 2", "it"),
    "a tuple with a name's list": ("import collections; it = collections.namedtuple('S', 'a b')([], {})", "it.a.append(1)", "it"),
    "a default of a static method": ("class A:\n    @staticmethod\n    def f(seen=[]): seen.append(1); return len(seen)", "A.f()", "A.f()"),
    "a default of a property": ("class A:\n    def f(self, seen=[]): seen.append(1); return len(seen)\n    n = property(f)\nit = A()", "it.n", "it.n"),
    "the class of an object": ("def made():\n    class A: n = 0\n    return A()\nit = made()", "type(it).n += 1", "it.n"),
    "an array of objects": ("import numpy; it = numpy.array([[1], None], dtype=object)", "it[0].append(2); it[1] = 3", "it"),
    "an array of the standard library": ("import array; it = array.array('i', [1])", "it.append(2)", "it"),
    "a proxy's dict": ("import types; d = {'a': 1}; it = types.MappingProxyType(d); del d", "it | {}; __import__('gc').get_referents(it)[0]['a'] = 2", "it"),
    "a module made by hand": ("import types; it = types.ModuleType('it'); it.n = 0", "it.n += 1", "it.n"),
    "a module put by hand": ("", "import types; sys.modules['yamlx'] = types.ModuleType('yamlx'); sys.modules['json'] = None", "[n for n in ('yamlx', 'json') if sys.modules.get(n, 0) is None or n == 'yamlx' and n in sys.modules]"),
    "an object's class": ("class A: pass\nclass B: pass\nit = A()", "it.__class__ = B", "type(it).__name__"),
    "a function's code": ("def f(): return 1\ndef g(): return 2", "f.__code__ = g.__code__", "f()"),
    "a thread's own": ("import threading; it = threading.local()", "it.user = 'ann'", "getattr(it, 'user', None)"),
    "values of a weak dict": ("import weakref\nclass A: pass\na = A(); it = weakref.WeakKeyDictionary({a: []})", "it[a].append(1)", "it[a]"),
    "kinds of a function": ("import functools\n@functools.singledispatch\ndef show(x): return 'plain'", "show.register(int)(lambda x: 'fancy'); show(1)", "show(1)"),
    "a handler of its own": ("import logging\nclass H(logging.Handler):\n    def __init__(self): super().__init__(); self.seen = []\n    def emit(self, r): self.seen.append(r.msg)\nit = H(); logging.getLogger('x').addHandler(it)", "logging.getLogger('x').warning('w'); it.setLevel(50)", "it.seen, it.level"),
    "a parser of its own": ("import html.parser\nclass P(html.parser.HTMLParser):\n    n = 0\n    def handle_data(self, d): self.n += 1\nit = P()", "it.feed('<a>x</a>')", "it.n"),
    "a cache with the sample's": ("import functools\n@functools.lru_cache\ndef level(): return sys.argv[1]", "level()", "level()"),
    "a submodule": ("import logging, xml", "import logging.handlers, xml.dom.minidom", "hasattr(logging, 'nothing')"),
    "logging, imported later": ("", "import logging", "__import__('logging').root.level"),
    "settings of what is imported later": ("", "import decimal, csv, json; decimal.DefaultContext.prec = 3; csv.field_size_limit(9); json.dumps = None", "__import__('decimal').Context().prec, __import__('csv').field_size_limit(), __import__('json').dumps is None"),
    "the list of arguments": ("", "sys.argv = ['batch']", "sys.argv"),
    "how long tracebacks are": ("", "sys.tracebacklimit = 0", "hasattr(sys, 'tracebacklimit')"),
    "a stream's method": ("", "w = sys.stdout.write; sys.stdout.write = lambda s: w(s)", "'write' in vars(sys.stdout)"),
    "a profiler": ("", "sys.setprofile(lambda *_: None)", "sys.getprofile() is None"),
    "a method of the standard library": ("import json", "json.JSONEncoder.default = None", "json.JSONEncoder.default is None"),
    "names of threads": ("import threading", "t = threading.Thread(target=int); t.start(); t.join()", "threading.Thread().name"),
    "a function at its end": ("import atexit\ndef bye(): print('bye')\natexit.register(bye)", "atexit.unregister(bye)", "1"),
    "a finalizer": ("import weakref\nclass A: pass\na = A(); it = weakref.finalize(a, print, 'closed')", "it.detach()", "it.alive"),
    "processors": ("import os", "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])", "os.sched_getaffinity(0)"),
    "what was None": ("it = None; a = {'b': None}", "global it; it = [1]; a['b'] = 2", "it, a"),
    "a context variable": ("import contextvars; it = contextvars.ContextVar('it', default=0)", "it.set(1)", "it.get()"),
    "a decimal context": ("import decimal", "decimal.getcontext().prec = 5", "decimal.Decimal(1) / 3"),
    "a switch interval": ("", "sys.setswitchinterval(0.5)", "sys.getswitchinterval()"),
    "thresholds": ("import gc", "gc.set_threshold(5, 6, 7)", "gc.get_threshold()"),
    "a stack size": ("import threading", "threading.stack_size(1 << 20)", "threading.stack_size()"),
    "a socket's time-out": ("import socket", "socket.setdefaulttimeout(5)", "socket.getdefaulttimeout()"),
    "logging switched off": ("import logging", "logging.disable(50)", "logging.root.manager.disable"),
    "a level's name": ("import logging", "logging.addLevelName(5, 'FINE')", "logging.getLevelName(5)"),
    "fields of csv": ("import csv", "csv.field_size_limit(9); csv.register_dialect('d')", "csv.field_size_limit(), csv.list_dialects()"),
    "a kind of file": ("import mimetypes", "mimetypes.add_type('a/b', '.abc')", "mimetypes.guess_type('x.abc')"),
    "a directory for temporary files": ("import tempfile", "tempfile.tempdir = '/dev/shm'", "tempfile.gettempdir()"),
    "a builtin": ("import gettext", "gettext.install('x')", "'_' in dir(__builtins__)"),
    "bytecode": ("", "sys.dont_write_bytecode = not sys.dont_write_bytecode", "sys.dont_write_bytecode"),
    "a hook for threads": ("import threading", "threading.excepthook = print", "threading.excepthook is print"),
    "a finder": ("", "sys.meta_path.insert(0, None)", "None in sys.meta_path"),
    "a module's name": ("import json", "json.loads = None", "json.loads is None"),
    "how processes start": ("import multiprocessing", "multiprocessing.set_start_method('spawn', force=True)", "multiprocessing.get_start_method()"),
    "numpy's printing": ("import numpy", "numpy.set_printoptions(precision=2)", "numpy.array([1 / 3])"),
    "numpy's errors": ("import numpy", "numpy.seterr(divide='raise')", "numpy.geterr()['divide']"),
}  # fmt: skip
JOBS = """
import sys
{before}
def work():
    {change}
def main():
    for word in sys.argv[1:]:
        if word == "show":
            print({shown})
        else:
            work()
    print("done", len(sys.argv))
if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("what", CHANGES)
def test_what_a_sample_changes_and_does_not_show_is_as_it_was(hold, what):
    before, change, shown = CHANGES[what]
    pocket = hold(JOBS.format(before=before, change=change, shown=shown), "main()", rehearse=["job"])
    facts = pocket.warm()
    assert facts["rehearsed"] is True, facts["not_rehearsed"]
    for words in (["show"], ["show", "job", "show"], ["show", "job", "job", "show"]):
        pocket.same(*words)


NOT_PUT_BACK = {
    "an itertools.count": ("import itertools; it = itertools.count(1)", "next(it)", "count"),
    "a list's iterator": ("it = iter([1, 2, 3])", "next(it)", "list_iterator"),
    "a generator": ("it = (n for n in [1, 2, 3])", "next(it)", "generator"),
    "a generator in a loop": ("def f():\n    n = 0\n    while True:\n        n += 1\n        yield n\nit = f(); next(it)", "next(it)", "generator"),
    "an enumerate": ("it = enumerate([1, 2, 3])", "next(it)", "enumerate"),
    "a zip": ("it = zip([1, 2], [3, 4])", "next(it)", "zip"),
    "an iterator in an object": ("class A: pass\nit = A(); it.numbers = iter([1, 2, 3])", "next(it.numbers)", "list_iterator"),
    "a large list": ("it = [0] * 300_000", "it[7] = 1; it[8] = 3", "list"),
    "a large dict": ("it = dict.fromkeys(range(300_000))", "it[7] = 1", "dict"),
    "a large array": ("import numpy; it = numpy.zeros((9 << 20,))", "it[:] += 1", "ndarray"),
}  # fmt: skip


@pytest.mark.parametrize("what", NOT_PUT_BACK)
def test_what_cannot_be_put_back_is_named(hold, what):
    before, change, kind = NOT_PUT_BACK[what]
    pocket = hold(JOBS.format(before=before, change=change, shown="it"), "main()", rehearse=["job"])
    facts = pocket.warm()
    assert facts["rehearsed"] is False
    assert f"it changes it, or what it holds, of type {kind}, which cannot be put back" in facts["not_rehearsed"]
    pocket.same("job", "job")


LIBRARIES = {  # what is made before the checkpoint, what changes it, what only uses it, its type
    "a database": (
        "import sqlite3; it = sqlite3.connect(':memory:'); it.execute('create table t (x)')",
        "it.execute('insert into t values (1)')", "it.execute('select count(*) from t').fetchone()", "Connection",
    ),
    "a document": (
        "import xml.etree.ElementTree as E; it = E.fromstring('<a><b/></a>')",
        "it[0].set('x', 'y')", "it.find('b').get('x')", "Element",
    ),
    "a pool that is shut down": (
        "from concurrent.futures import ThreadPoolExecutor; it = ThreadPoolExecutor(2)",
        "it.shutdown()", "it.submit(len, 'ab').result()", "ThreadPoolExecutor",
    ),
    "text in memory": ("import io; it = io.StringIO()", "it.write('x')", "it.getvalue()", "StringIO"),
    "an image": (
        "from PIL import Image; it = Image.new('RGB', (9, 9))",
        "it.putpixel((0, 0), (1, 2, 3))", "it.resize((3, 3)).getpixel((0, 0))", "Image",
    ),
    "an image that is loaded late": (
        "from PIL import Image; Image.new('L', (9, 9)).save('/tmp/x.png'); it = Image.open('/tmp/x.png')",
        "it.putpixel((0, 0), 3)", "it.resize((3, 3)).getpixel((0, 0))", "PngImageFile",
    ),
    "one in a list": ("import io; it = [io.BytesIO(b'ab')]", "it[0].read(1)", "it[0].getvalue()", "BytesIO"),
    "one in an object's attribute": (
        "import io\nclass A: pass\nit = A(); it.file = io.BytesIO(b'ab')", "it.file.read(1)", "it.file.getvalue()", "BytesIO",
    ),
    "one of a class that derives from a library's": (
        "from PIL import ImageFont\nclass A(ImageFont.TransposedFont): pass\nit = A(None)",
        "it.orientation = 7", "it.orientation", "__main__.A",
    ),
    "numbers of C": (
        "import ctypes; it = (ctypes.c_int * 3)()", "it[0] = 3", "list(it)", "c_int_Array_3",
    ),
    "how a database gives rows": (
        "import sqlite3; it = sqlite3.connect(':memory:')",
        "it.row_factory = sqlite3.Row", "it.execute('select 1').fetchone()", "Connection",
    ),
    "a session's headers": (
        "import requests; it = requests.Session()", "it.headers['x'] = 'y'", "it.headers.get('x')", "Session",
    ),
    "a session's cookies": (
        "import requests; it = requests.Session()", "it.cookies.set('x', 'y')", "it.cookies.get('x')", "Session",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", LIBRARIES)
def test_a_librarys_object_that_the_sample_changes_is_named(hold, what):
    """It cannot be put back. One that is used alone stays, and is warm."""
    before, change, use, kind = LIBRARIES[what]
    source = f"import sys\n{before}\ndef main():\n    if 'job' in sys.argv: {change}\n    elif 'use' in sys.argv: print({use})\n    else: sys.exit(3)\nmain()\n"
    pocket = hold(source, "main()", rehearse=["job"])
    facts = pocket.warm()
    assert facts["rehearsed"] is False, "its change is in every run"
    assert re.search(rf"it changes it, or what it holds, of type \S*\b{kind}, which", facts["not_rehearsed"]), facts
    pocket.same("use")
    pocket = hold(source, "main()", rehearse=["use"])
    facts = pocket.warm()
    assert facts["rehearsed"] is True, facts["not_rehearsed"]
    pocket.same("use")


USED = {
    "a context of decimal": (
        "import decimal; it = decimal.Context(prec=3)",
        "it.divide(decimal.Decimal(1), decimal.Decimal(3))",
    ),
    "a parser": (
        "import optparse; it = optparse.OptionParser(); it.add_option('-x')",
        "it.parse_args(['-x', '1', 'y'])[1]",
    ),
    "a hundred thousand dates": ("import datetime; it = [datetime.date(2000, 1, 1)] * 100_000", "it[5].year"),
}


@pytest.mark.parametrize("what", USED)
def test_what_is_used_alone_stays(hold, what):
    before, use = USED[what]
    pocket = hold(
        f"import sys\n{before}\ndef main():\n    print({use}, sys.argv[1:])\nmain()\n", "main()", rehearse=["s"]
    )
    facts = pocket.warm()
    assert facts["rehearsed"] is True, facts["not_rehearsed"]
    pocket.same("a")


def test_an_object_that_pickling_changes(hold):
    """As matplotlib's figures are, whose callbacks are counted by it."""
    pytest.importorskip("matplotlib")
    source = """
    import sys, matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots()
    def main():
        if "title" in sys.argv: axes.set_title("x")
        if len(sys.argv) < 2: sys.exit(3)
        print(repr(axes.get_title()))
    main()
    """
    pocket = hold(textwrap.dedent(source), "main()", rehearse=["title"])
    facts = pocket.warm()
    assert facts["rehearsed"] is False and "Figure" in facts["not_rehearsed"] or "Axes" in facts["not_rehearsed"], facts
    assert pocket.from_held("other").out == b"''\n"


def test_generators_of_random_numbers_are_no_such_objects(hold):
    source = """
    import random, sys, numpy
    mine, theirs = random.Random(1), numpy.random.default_rng(2)
    def main(): print(mine.random(), theirs.random(), sys.argv[1:])
    main()
    """
    pocket = hold(textwrap.dedent(source), "main()", rehearse=["s"])
    facts = pocket.warm()
    assert facts["rehearsed"] is True, facts["not_rehearsed"]
    pocket.same("a")


@pytest.mark.parametrize(
    "change, what",
    [("os.nice(5)", "its priority"), ("resource.setrlimit(resource.RLIMIT_CORE, (0, 0))", "RLIMIT_CORE")],
)
def test_what_a_process_cannot_take_back_is_named(hold, change, what):
    source = f"import os, resource, sys\ndef main():\n    if len(sys.argv) > 1: {change}\n    print('done')\nmain()\n"
    facts = hold(source, "main()", rehearse=["s"]).warm()
    assert facts["rehearsed"] is False and f"it changes {what}" in facts["not_rehearsed"], facts


WAITS = {
    "a queue": ("q = queue.Queue()", "out.append(q.get()); q.task_done()", "q.put(word)", "q.join()"),
    "an event": ("go, done = threading.Event(), threading.Event()", "go.wait(); go.clear(); out.append(1); done.set()", "done.clear(); go.set(); done.wait()", ""),
    "a condition": ("c, n = threading.Condition(), []", "with c:\n            while not n: c.wait()\n            out.append(n.pop()); c.notify_all()", "with c:\n            n.append(word); c.notify_all()\n            while n: c.wait()", ""),
}  # fmt: skip


@pytest.mark.parametrize("what", WAITS)
def test_a_thread_that_waits_for_work_goes_on_waiting_after_a_rehearsal(hold, what):
    made, waits, asks, ends = WAITS[what]
    source = f"""
import queue, sys, threading
{made}
out = []
def work():
    while True:
        {waits}
threading.Thread(target=work, daemon=True).start()
def main():
    for word in sys.argv[1:]:
        {asks}
    {ends}
    print("done", len(sys.argv))
    if "show" in sys.argv: print(len(out))
main()
"""
    pocket = hold(source, "main()", rehearse=["s", "t"])
    facts = pocket.warm()
    assert facts["rehearsed"] is True, facts["not_rehearsed"]
    for _ in range(3):
        pocket.same("show", "b", "c")


def test_names_of_a_function_that_it_stands_in(hold):
    source = "import sys\ndef main():\n    seen = []\n    exec('more = 5')\n    here = None\n    seen.append(1)\n    if 'show' in sys.argv:\n        print(seen, locals().get('more'))\n    print('done')\nmain()\n"
    pocket = hold(source, "app.py:5", rehearse=["job"])
    facts = pocket.warm()
    assert facts["rehearsed"] is True, facts["not_rehearsed"]
    more = b"5" if sys.version_info < (3, 13) else b"None"  # PEP 667: locals() is a new dict each time
    assert pocket.same("show").out == b"[1] " + more + b"\ndone\n"


LOADED = """
import functools, sys
class Lazy:
    tool, labels = None, None
    def get(self):
        if self.tool is None:
            self.tool, self.labels = made(), ["cat"]
        return self.tool, self.labels[0]
cache, one, labels, lazy = {}, None, [], Lazy()
@functools.lru_cache
def kept(): return made()
def made():
    import numpy.polynomial
    return numpy.polynomial.Polynomial([len(sys.argv)])
def load():
    global one
    if one is None:
        one = made()
        labels.extend(["dog"])
    if "it" not in cache:
        cache["it"] = made()
    return [float(it.coef[0]) for it in (one, cache["it"], lazy.get()[0], kept())], labels[0]
def main():
    said = load()
    print(said if "show" in sys.argv else "done")
main()
"""


def test_what_is_loaded_at_its_first_use_each_run_loads_and_that_is_told(hold):
    """A global that was None, a place in a dict, an attribute, a cache: what came with it may be the sample's."""
    pocket = hold(LOADED, "main()", rehearse=["s"])
    facts = pocket.warm()
    assert facts["rehearsed"] is True, facts["not_rehearsed"]
    told = [text.split()[0] for text in facts["noted"] if "loaded at its first use" in text]
    assert sorted(told) == ["cache", "kept", "lazy", "one"], facts["noted"]
    pocket.same("show")
    pocket.same("show", "b", "c")


# -- TensorFlow

KERAS = """
import sys, numpy as np, keras, tensorflow as tf
keras.utils.set_random_seed(1)
m = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(), keras.layers.Dense(2)])
count, x, y = tf.Variable(0), np.arange(32).reshape(8, 4) / 32, np.ones((8, 2))
mean = keras.metrics.Mean()
m.compile({optimizer!r}, "mse")
def main():
    for word in sys.argv[1:]:
        if word == "train": m.train_on_batch(x, y)
        if word == "count": count.assign_add(1); mean.update_state(3.0); m(x, training=True)
        if word == "draw": print(tf.random.normal((2,)).numpy(), tf.random.uniform((1,), seed=2).numpy())
        if word == "use": tf.random.normal((2,)); tf.random.uniform((1,), seed=2)
        if word == "name": print(keras.layers.Dense(1).name)
        if word == "make": keras.layers.Dense(1)
        if word == "show":
            print(float(np.sum(m(x))), float(np.sum(m.layers[0].moving_mean)), int(count), float(mean.result()))
    print("done", len(sys.argv))
main()
"""


@pytest.mark.parametrize("sample, words", [("count", "show"), ("use", "draw"), ("make", "name")])
def test_tensorflows_state_is_put_back(hold, sample, words):
    """Variables, what operations with a seed have drawn, names that Keras gives."""
    pocket = hold(KERAS.format(optimizer="sgd"), "main()", rehearse=[sample], service="tensorflow")
    facts = pocket.warm()
    assert facts["rehearsed"] is True, facts["not_rehearsed"]
    expected = pocket.plain(words, sample, words).out
    assert [pocket.from_held(words, sample, words).out for _ in range(2)] == [expected] * 2


DERIVED = """
import sys, numpy as np, keras, tensorflow as tf

class Scaled(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.inner = keras.layers.Dense(2, kernel_initializer="ones")
        self.factor, self.calls, self._last, self.seen = 1, 0, None, {{}}
    def build(self, shape):
        self.width = shape[-1]
        super().build(shape)
    def call(self, x):
        return self.inner(x) * self.factor
    def say(self, x):
        self.calls += 1
        self._last = float(np.sum(self(x)))
        self.seen["x"] = self.seen.get("x", 0) + 1
        return self._last

class Module(tf.Module):
    def __init__(self):
        super().__init__()
        self.v, self.n, self.words = tf.Variable(2.0), 0, []
    @tf.function
    def double(self, x):
        return x * self.v
    def say(self, x):
        self.n += 1
        return float(self.double(tf.constant(x)))

layer, module, rows = Scaled(), Module(), np.ones((1, 3), "float32")
{built}
def main():
    for word in sys.argv[1:]:
        if word == "layer": print(layer.say(rows))
        if word == "module": print(module.say(2.0))
        if word == "words": module.words.append(word)
        if word == "factor": layer.factor = 2; layer.late = 1
        if word == "both": layer.factor = 5; print(layer.say(rows))
    if not sys.argv[1:]:
        print("nothing to do")
    if sys.argv[1:] == ["calls"]:
        print(layer.calls, layer._last, layer.seen, module.n, module.words, layer.factor, hasattr(layer, "late"))
main()
"""


@pytest.mark.parametrize("sample", ["layer", "module", "factor"])
def test_what_a_program_keeps_in_objects_of_a_librarys_kind_is_put_back(hold, sample):
    """A layer that was built by then; one that was not keeps what its build() has made."""
    pocket = hold(DERIVED.format(built="layer(rows)"), "main()", rehearse=[sample], service="tensorflow")
    facts = pocket.warm()
    assert facts["rehearsed"] is True, facts
    assert pocket.from_held("calls").out == pocket.plain("calls").out
    assert pocket.from_held("layer", "module", "layer").out == pocket.plain("layer", "module", "layer").out


def test_what_such_objects_are_built_with_stays(hold):
    """And all else is put back."""
    pocket = hold(DERIVED.format(built=""), "main()", rehearse=["both"], service="tensorflow")
    facts = pocket.warm()
    assert facts["rehearsed"] is True, facts
    assert pocket.from_held("layer", "module", "layer").out == pocket.plain("layer", "module", "layer").out
    assert pocket.from_held("calls").out == pocket.plain("calls").out


def test_a_list_that_tensorflow_has_wrapped_is_named(hold):
    pocket = hold(DERIVED.format(built=""), "main()", rehearse=["words"], service="tensorflow")
    facts = pocket.warm()
    assert facts["rehearsed"] is False and "module, or what it holds, of type ListWrapper" in facts["not_rehearsed"]
    assert pocket.from_held("calls").out == pocket.plain("calls").out


def test_a_sample_that_trains_is_not_rehearsed(hold):
    """An optimizer that it makes new variables of is not as it was, whatever they are set to."""
    pocket = hold(KERAS.format(optimizer="adam"), "main()", rehearse=["train"], service="tensorflow")
    facts = pocket.warm()
    assert facts["rehearsed"] is False and "variables of TensorFlow" in facts["not_rehearsed"], facts
    assert pocket.from_held("show").out == pocket.plain("show").out


def test_objects_that_raise_when_they_are_looked_at_are_let_be(hold):
    """Such as a web framework's, which stand for others that are there in a request alone."""
    source = """
        import sys
        class Proxy:
            @property
            def __class__(self): raise RuntimeError("outside of a request")
            def __getattr__(self, name): raise RuntimeError("outside of a request")
        class Odd(dict):
            def items(self): raise RuntimeError("no items")
            def __iter__(self): raise RuntimeError("no keys")
        it, odd, seen = Proxy(), Odd(a=1), []
        def main():
            seen.append(1)
            print(len(seen) if "show" in sys.argv else "done")
        main()
    """
    pocket = hold(textwrap.dedent(source), "main()", rehearse=["s"])
    facts = pocket.warm()
    assert facts["rehearsed"] is True, facts["not_rehearsed"]
    pocket.same("show")


def test_many_objects_are_looked_at_in_part_which_is_told(hold):
    source = "import sys\nclass A: pass\nit = [A() for _ in range(250_000)]\ndef main(): print(len(it), sys.argv[1:])\nmain()\n"
    pocket = hold(source, "main()", rehearse=["s"])
    facts = pocket.warm()
    assert facts["rehearsed"] is True and any("more than 200000 objects" in text for text in facts["noted"]), facts
    pocket.same("a")
