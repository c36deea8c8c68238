"""Calls and their values: what goes in, what comes out, what memory it takes."""

from __future__ import annotations

import gc
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pocketd.client import BadTensor, BadValue, RemoteError, Session, SessionClosed, Tensor, UnknownModel
from pocketd.tensors import DTYPES
from tests.conftest import wait_for

PLAIN = [
    None, True, 0, -1, 2**63, 1.5, "é", "", b"\0x", [], {}, (),
    [1, [2, {"a": [3]}]], {"a": {1: 2}}, (1, (2, [3, (4,)])),
]  # fmt: skip


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_plain_values_travel_both_ways(session: Session, value: object) -> None:
    [back] = session.call("detector:echo", value)
    assert back == value and type(back) is type(value)


def test_a_tensor_is_a_numpy_array_there_and_a_tensor_here(session: Session) -> None:
    a = session.tensor((2, 3), "float32")
    a.numpy()[...] = 3
    result = session.call("detector:add", a, 1)
    assert type(result) is Tensor and result.shape == (2, 3) and result.dtype == "float32"
    assert (result.numpy() == 4).all()
    assert session.call("detector:kinds", a) == ["numpy.ndarray"]


def test_tensors_are_aligned_and_writable_there(session: Session) -> None:
    for shape in ((1,), (3, 5), (1000,), (7, 11, 13)):
        assert session.call("detector:address", session.tensor(shape, "uint8")) == (0, True, True)


def test_what_a_function_writes_is_seen_here(session: Session) -> None:
    image = session.tensor((4, 4), "uint8")
    session.call("detector:paint", image)
    assert (image.numpy() == 7).all() and image.buffer()[3, 3] == 7


def test_tensors_nest_in_lists_tuples_and_maps(session: Session) -> None:
    a = session.tensor((2,), "int32")
    a[:] = [1, 2]
    args, kwargs = session.call("detector:echo", {"x": [a, (a, 5)]}, k=(a,))
    assert type(args) is tuple and args[0]["x"][1][0].tolist() == [1, 2] and args[0]["x"][1][1] == 5
    assert kwargs["k"][0].tolist() == [1, 2]


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype_travels(session: Session, dtype: str) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    a = session.tensor((3, 2), dtype)
    a.numpy()[...] = 1
    [b] = session.call("detector:echo", a)
    assert b.dtype == dtype and b.shape == (3, 2) and (b.numpy() == a.numpy()).all()
    assert np.asarray(b).dtype == a.numpy().dtype


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,) * 32])
def test_every_shape_travels(session: Session, shape: tuple[int, ...]) -> None:
    [b] = session.call("detector:echo", session.tensor(shape, "int16"))
    assert b.shape == shape and b.numpy().shape == shape


def test_arrays_are_copied_in_whatever_their_layout(session: Session) -> None:
    a = np.arange(24, dtype=">i4").reshape(4, 6)
    for array in (a, a.T, a[::2, ::-1], a[:, 1], np.float32(2), np.ones((2, 2), np.float64)):
        [b] = session.call("detector:echo", array)
        assert np.array_equal(np.asarray(b), array)


def test_a_view_of_a_tensor_in_the_other_byte_order_is_what_it_says(session: Session) -> None:
    tensor = session.tensor((3,), "int32")
    view = tensor.numpy().view(">i4")
    view[...] = [10, 20, 30]
    [found] = session.call("detector:echo", view)
    assert np.asarray(found).tolist() == [10, 20, 30]


def test_a_mask_is_not_dropped(session: Session) -> None:
    masked = np.ma.array([1, 2, 3], mask=[False, True, False])
    for array in (masked, np.ma.array(session.tensor((3,), "int32").numpy(), mask=True)):
        with pytest.raises(BadTensor, match="mask"):
            session.call("detector:echo", array)
    [found] = session.call("detector:echo", masked.filled(7))
    assert np.asarray(found).tolist() == [1, 7, 3]


def test_a_view_of_a_tensor_goes_without_a_copy(session: Session) -> None:
    batch = session.tensor((4, 16, 4), "float32")
    batch.numpy()[...] = 0
    session.call("detector:paint", batch.numpy()[2])
    session.call("detector:paint", batch.numpy()[0, :, :2])
    seen = batch.numpy()
    assert (seen[2] == 7).all() and (seen[0, :, :2] == 7).all() and seen.sum() == 7 * (64 + 32)


def test_buffers_travel_as_tensors(session: Session) -> None:
    import array

    [b] = session.call("detector:echo", array.array("f", [1, 2, 3]))
    assert b.dtype == "float32" and b.tolist() == [1, 2, 3]
    assert session.call("detector:echo", memoryview(b"raw"), bytearray(b"raw")) == [b"raw", b"raw"]


def test_numpy_views_keep_the_memory(session: Session) -> None:
    view = session.call("detector:zeros", 1000).numpy()[10:]
    gc.collect()
    for _ in range(50):
        session.call("detector:add", np.ones(1000, np.float32), 1)
    assert (view == 0).all()
    buffer = session.call("detector:zeros", 1000).buffer()[10:]
    session.call("detector:add", np.ones(1000, np.float32), 1)
    assert not any(buffer)


def test_a_tensor_outlives_its_session(open_session: Callable[..., Session]) -> None:
    session = open_session()
    a, b = session.tensor((5,), "uint8"), session.call("detector:zeros", 5)
    a[:] = 9
    session.close()
    assert a.tolist() == [9] * 5 and b.tolist() == [0] * 5


def test_a_tensor_of_another_session_is_refused(open_session: Callable[..., Session]) -> None:
    one, other = open_session(), open_session()
    a = one.tensor((5,), "uint8")
    with pytest.raises(BadTensor, match="another session"):
        other.call("detector:echo", a)
    assert other.call("detector:total", a.numpy() * 0) == 0.0


def test_memory_is_used_again(session: Session) -> None:
    def round() -> None:
        for n in (10, 100_000, 1000, 5_000_000):
            session.call("detector:add", np.zeros(n, np.uint8), 1)

    for _ in range(3):
        round()
    before = os.listdir("/proc/self/fd"), session.call("detector:status")
    for _ in range(30):
        round()
    after = os.listdir("/proc/self/fd"), session.call("detector:status")
    assert len(after[0]) <= len(before[0])
    assert after[1][0] <= before[1][0] and after[1][1] < before[1][1] + 4000


def test_arenas_that_are_empty_are_given_up(session: Session) -> None:
    for n in (3, 6, 12, 24, 48, 96):
        session.call("detector:echo", np.zeros(n << 20, np.uint8))
    session.call("detector:echo", np.zeros(1, np.uint8))
    assert mapped(session.pid) <= 4  # the pages of an arena go once neither side maps it


def test_memory_that_rests_is_given_back_by_both_sides(session: Session) -> None:
    sent = [session.tensor((40 << 20,), "uint8") for _ in range(3)]
    for tensor in sent:
        tensor.numpy()[...] = 1
    [got] = session.call("detector:echo", [np.zeros(100 << 20, np.uint8)])
    assert held(os.getpid()) > 200 << 20
    del sent, tensor, got

    def given_back() -> bool:
        session.call("detector:echo", 1)
        return held(os.getpid()) < 20 << 20

    assert wait_for(given_back)


def held(pid: int) -> int:
    """Bytes of arenas that a process has mapped and that are in memory."""
    found, ours = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        ours = "memfd:arena" in line if re.match(r"[0-9a-f]+-", line) else ours
        found += int(line.split()[1]) << 10 if ours and line.startswith("Rss:") else 0
    return found


def mapped(pid: int | None) -> int:
    """Arenas that a process has mapped, by what the kernel says."""
    return Path(f"/proc/{pid}/maps").read_text().count("memfd:arena")


def test_a_closed_session_keeps_no_memory(open_session: Callable[..., Session]) -> None:
    gc.collect()
    before = mapped(os.getpid())
    session = open_session()
    session.call("detector:echo", np.zeros(1000))
    assert mapped(os.getpid()) == before + 2
    session.close()
    gc.collect()
    assert mapped(os.getpid()) == before


def test_an_exception_there_is_a_typed_error_here(session: Session) -> None:
    with pytest.raises(RemoteError) as caught:
        session.call("detector:boom", "no such luck")
    error = caught.value
    assert (error.type, error.message) == ("ValueError", "no such luck")
    assert "detector.py" in str(error) and "session.py" not in str(error)
    assert session.call("detector:add", 1, 2) == 3


def test_an_exit_there_is_an_error_and_the_session_goes_on(session: Session) -> None:
    with pytest.raises(RemoteError, match="SystemExit: 3"):
        session.call("detector:leave", 3)
    assert session.call("detector:add", 1, 2) == 3


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("nowhere:f", "ModuleNotFoundError"),
        ("detector:nothing", "AttributeError"),
        ("detector:limit", "not callable"),
    ],
)
def test_an_unknown_function_is_a_clear_error(session: Session, target: str, said: str) -> None:
    with pytest.raises(RemoteError, match=said):
        session.call(target)
    assert session.call("detector:Thing.inner") == "inner"


def test_results_that_cannot_travel_are_clear_errors(session: Session) -> None:
    for target, said in (
        ("strange", "builtins.object"),
        ("half_strange", "builtins.object"),
        ("objects", "dtype object"),
        ("when", "dtype datetime64"),
    ):
        with pytest.raises((BadValue, BadTensor), match=said):
            session.call(f"detector:{target}")
    for _ in range(500):
        with pytest.raises(BadValue):
            session.call("detector:half_strange")
    assert mapped(session.pid) <= 1  # a result that was packed in part only is given back


@pytest.mark.parametrize("kind", ["U", "S", "O"])
def test_words_travel_as_lists(session: Session, kind: str) -> None:
    words = np.array([["a", "bc"]], dtype=kind)
    assert session.call("detector:words", kind) == words.tolist() == session.call("detector:echo", words)[0]
    assert session.call("detector:echo", words[0, 1]) == [words.tolist()[0][1]]


def test_a_number_of_a_kind_that_msgpack_lacks(session: Session) -> None:
    pytest.importorskip("ml_dtypes")
    half = session.call("detector:half")
    assert half.dtype == "bfloat16" and float(half) == 1.5
    assert session.call("detector:echo", half)[0].item() == 1.5


def test_numbers_of_numpy_are_numbers(session: Session) -> None:
    """Also in a result; a complex one, which msgpack lacks, is a tensor."""
    for number in (np.int8(3), np.float32(0.5), np.bool_(True), np.str_("a"), np.bytes_(b"b")):
        [back] = session.call("detector:echo", number)
        assert back == number and type(back) in (int, float, bool, str, bytes)
        assert session.call("detector:number", str(number.dtype), 1) in (1, True, "1", b"1")
    assert session.call("detector:number", "complex64", 1).item() == 1 + 0j


def test_a_tensor_of_one_number_is_a_number(session: Session) -> None:
    number, many, none = (session.call("detector:echo", np.array(v))[0] for v in (3, [1, 2], []))
    assert (int(number), float(number), number.item(), f"{number:03d}", [5, 6, 7, 8][number]) == (3, 3.0, 3, "003", 8)
    [no] = session.call("detector:echo", np.array([False]))
    assert not no and number
    for tensor in (many, none):
        with pytest.raises(ValueError, match="not one number"):
            bool(tensor)
    with pytest.raises(TypeError, match="no index"):
        [1][no]


def test_a_copy_of_a_tensor_is_an_array(session: Session) -> None:
    import copy

    ours = session.tensor((3,), "int32")
    ours[:] = 1
    copied = copy.deepcopy({"a": ours})["a"]
    ours[:] = 2
    assert copied.tolist() == [1, 1, 1] and copy.copy(ours).tolist() == [2, 2, 2]


def test_shapes_and_dtypes_of_numpy_are_taken(session: Session) -> None:
    array = np.ones((2, 3), "int16")
    for dtype in (array.dtype, np.int16, "int16"):
        tensor = session.tensor((np.int64(2), *array.shape[1:]), dtype)
        assert (tensor.dtype, tensor.shape) == ("int16", (2, 3))
    with pytest.raises(BadTensor, match="is not one of"):
        session.tensor((1,), np.dtype("datetime64[s]"))


def test_a_functions_own_argument_named_target(session: Session) -> None:
    assert session.call("detector:target", target="here") == "here"


def test_time_limits_that_are_none_and_that_are_no_numbers(session: Session) -> None:
    for timeout in (float("inf"), 1e12):
        assert session.call("detector:add", 1, 2, timeout=timeout) == 3
    with pytest.raises(ValueError, match="not a number"):
        session.call("detector:add", 1, 2, timeout=float("nan"))
    assert session.call("detector:add", 1, 2) == 3


def test_arenas_that_the_worker_gave_up_are_let_go_here(session: Session) -> None:
    for megabytes in (1, 3, 7, 15, 31, 63, 127, 255):
        session.call("detector:grow", megabytes)
    session.call("detector:add", 1, 2)
    assert len(session._core._theirs) <= 2


def test_an_exception_that_holds_what_is_no_text(session: Session) -> None:
    with pytest.raises(RemoteError, match=r"cannot read \\udcff\.jpg") as e:
        session.call("detector:unreadable")
    assert "ValueError" in e.value.remote_traceback and "detector.py" in e.value.remote_traceback
    assert session.call("detector:add", 1, 2) == 3


@pytest.mark.parametrize("how", ["str", "notes", "attribute", "name", "syntax"])
def test_an_exception_that_raises_when_it_is_shown(session: Session, how: str) -> None:
    with pytest.raises(RemoteError) as e:
        session.call("detector:odd", how)
    assert "detector.py" in e.value.remote_traceback and e.value.type == ("SyntaxError" if how == "syntax" else "Odd")
    assert session.call("detector:add", 1, 2) == 3


def test_a_forked_child_gets_no_memory_of_its_parents_session(session: Session) -> None:
    session.tensor((4,))
    pid = os.fork()
    if pid == 0:
        try:
            session.tensor((4,))
        except SessionClosed:
            os._exit(7)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


@pytest.mark.parametrize("after", [0.0, 0.05, 0.3])
def test_a_session_that_another_thread_closes_during_a_call(session: Session, after: float) -> None:
    timer = threading.Timer(after, session.close)
    timer.start()
    for _ in range(2):
        with pytest.raises(SessionClosed):
            while True:
                session.call("detector:nap", 2)
    timer.join()


def test_arguments_that_cannot_travel_are_clear_errors(session: Session) -> None:
    deep: object = 1
    for _ in range(2000):
        deep = [deep]
    nested: object = 1
    for _ in range(100):
        nested = (nested,)
    for value in (object(), {1, 2}, 2**64, "\ud800", deep, nested, b"x" * (17 << 20)):
        with pytest.raises(BadValue):
            session.call("detector:echo", value)
    with pytest.raises(BadTensor, match="dtype object"):
        session.call("detector:echo", np.array([object()]))
    assert session.call("detector:add", 1, 2) == 3


def test_what_failed_to_be_sent_leaks_nothing(session: Session) -> None:
    session.call("detector:echo", np.zeros(1000))
    for _ in range(5000):
        with pytest.raises(BadValue):
            session.call("detector:echo", np.zeros(100_000), object())
    assert len(session._core._heap.arenas) <= 2


def test_deep_results_are_errors_not_crashes(session: Session) -> None:
    assert session.call("detector:deep", 20) is not None
    with pytest.raises(BadValue):
        session.call("detector:deep", 100)
    with pytest.raises(BadValue, match="as an array"):
        session.call("detector:big", 17 << 20)
    assert len(session.call("detector:big", 10 << 20)) == 10 << 20


def test_bad_shapes_and_dtypes_are_refused_here(session: Session) -> None:
    for shape, dtype in (
        ((-1,), "uint8"),
        ((2.5,), "uint8"),
        ((2,), "float128"),
        ((2,), "object"),
        ((1,) * 33, "int8"),
    ):
        with pytest.raises(BadTensor):
            session.tensor(shape, dtype)  # type: ignore[arg-type]
    with pytest.raises(BadTensor):
        session.tensor((1 << 50,), "uint8")


def test_models_of_a_factory_are_called_and_their_methods_too(session: Session) -> None:
    assert session.models == ("counter",)
    model = session.model("counter")
    assert model(np.ones(3, np.float32)).tolist() == [2, 2, 2]
    assert [model.count(), model.method("count")(by=2)] == [1, 3]
    for name in ("_private", "size", "absent"):
        with pytest.raises(RemoteError, match="AttributeError"):
            model.method(name)()


def test_unknown_models_are_clear_errors(session: Session) -> None:
    with pytest.raises(UnknownModel, match="models here: counter"):
        session.model("resnet")
    for path in ("absent.onnx", "../etc/passwd", "/etc/passwd", "detector.py", "", "a\0b"):
        with pytest.raises(UnknownModel):
            session.load(path)


def test_pickles_are_never_loaded(session: Session, pocket: Path) -> None:
    (pocket / "model.pkl").write_bytes(b"cos\nsystem\n(S'touch stolen'\ntR.")
    with pytest.raises(UnknownModel, match="pickle"):
        session.load("model.pkl")
    assert not (pocket / "stolen").exists()


def test_a_link_out_of_the_pocket_is_not_followed(session: Session, pocket: Path, tmp_path: Path) -> None:
    (tmp_path / "other.onnx").write_bytes(b"x")
    link = pocket / "link.onnx"
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path / "other.onnx")
    with pytest.raises(UnknownModel, match="link.onnx"):
        session.load("link.onnx")


def test_threads_share_a_session(session: Session) -> None:
    results: dict[int, list[float]] = {}

    def work(n: int) -> None:
        results[n] = [session.call("detector:total", np.full(100, n)) for _ in range(100)]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == {n: [100.0 * n] * 100 for n in range(4)}


def test_a_forked_child_cannot_use_or_end_the_session(session: Session) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            session.call("detector:pid")
        except SessionClosed:
            session.close()
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert session.call("detector:add", 1, 2) == 3


def test_a_closed_session_says_so(open_session: Callable[..., Session]) -> None:
    session = open_session()
    session.close()
    session.close()
    with pytest.raises(SessionClosed):
        session.call("detector:pid")


def test_the_environment_of_the_pocket_is_found(session: Session, pocket: Path) -> None:
    assert session.call("os:getcwd") == str(pocket)
