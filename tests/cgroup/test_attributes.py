"""The forms of cgroup v2's files, by text: most of the files are not on every host."""

from __future__ import annotations

import pytest

from cgroup.attributes import Attributes


class Text(Attributes):
    """Files in a dictionary, and what was written."""

    def __init__(self, **files: str):
        self.files = {name.replace("__", "."): text for name, text in files.items()}
        self.written: list[tuple[str, str]] = []

    def get_property(self, filename: bytes) -> str:
        return self.files[filename.decode()]

    def set_property(self, filename: bytes, value: str) -> None:
        self.written.append((filename.decode(), value))


def test_max_reads_as_none_and_none_is_written_as_max():
    files = Text(memory__max="max\n", pids__max="256\n")
    assert files.memory_max is None and files.pids_max == 256
    files.memory_max = None
    files.memory_max = 4096
    assert files.written == [("memory.max", "max"), ("memory.max", "4096")]


def test_flat_keyed_files_read_as_numbers_by_name():
    files = Text(cpu__stat="usage_usec 12\nuser_usec 7\n", memory__events="low 0\noom_kill 3\n")
    assert files.cpu_stat == {"usage_usec": 12, "user_usec": 7}
    assert files.memory_events["oom_kill"] == 3


def test_nested_keyed_files_read_by_device_and_are_written_one_device_at_a_time():
    files = Text(io__max="8:0 rbps=1024 wbps=max riops=max wiops=7\n8:16 rbps=max wbps=1 riops=2 wiops=3\n")
    assert files.io_max["8:0"] == {"rbps": 1024, "wbps": None, "riops": None, "wiops": 7}
    files.io_max = {"8:0": {"rbps": None, "wiops": 5}, "8:16": {"wbps": 1}}
    assert files.written == [("io.max", "8:0 rbps=max wiops=5"), ("io.max", "8:16 wbps=1")]


def test_an_empty_file_has_no_entries():
    assert Text(io__max="").io_max == {}
    assert Text(cgroup__procs="").procs == ()
    assert Text(cgroup__controllers="\n").controllers == ()


def test_cpu_max_is_a_quota_and_a_period():
    files = Text(cpu__max="max 100000\n")
    assert files.cpu_max == (None, 100000)
    files.cpu_max = (50000, 100000)
    assert files.written == [("cpu.max", "50000 100000")]


@pytest.mark.parametrize(("text", "value"), [("0\n", False), ("1\n", True)])
def test_a_boolean_reads_as_one(text, value):
    assert Text(cgroup__freeze=text).freeze is value
