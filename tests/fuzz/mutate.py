"""Bytes near valid ones: what a careful enemy sends. Everything follows from one seed, which a failure prints."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

# Bytes and words at which formats change their mind: msgpack's type bytes, lengths at their limits, TOML's signs.
_TELLING = [
    b"\x80", b"\x90", b"\xa0", b"\xc0", b"\xc1", b"\xc4\xff", b"\xc7\x05\x01", b"\xc9\xff\xff\xff\xff", b"\xd4\x01",
    b"\xd7\xff", b"\xdb\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xcf" + b"\xff" * 8,
    b"\xd3\x80" + b"\0" * 7, b"\xcb\x7f\xf8" + b"\0" * 6, b"\xff", b"\x7f", b"\0", b"\n", b'"', b"[", b"]", b"{", b"=",
    b"\xed\xa0\x80", b"\xf0\x9f\x98\x80", b"1e999", b"-0", b"../", b"\x91" * 40, b"[" * 40,
]  # fmt: skip
_LONGEST = 1 << 16


def mutated(seed: int, corpus: Sequence[bytes], count: int) -> Iterator[bytes]:
    """`count` inputs, each a valid one with a few changes."""
    chance = random.Random(seed)
    for _ in range(count):
        data = bytearray(chance.choice(corpus))
        for _ in range(1 + int(chance.expovariate(0.7))):
            _change(chance, data, corpus)
        yield bytes(data[:_LONGEST])


def _change(chance: random.Random, data: bytearray, corpus: Sequence[bytes]) -> None:
    at = chance.randrange(len(data) + 1)
    end = min(len(data), at + 1 + int(chance.expovariate(0.2)))
    way = chance.randrange(7)
    if way == 0 and at < len(data):
        data[at] ^= 1 << chance.randrange(8)
    elif way == 1 and at < len(data):
        data[at] = chance.randrange(256)
    elif way == 2:
        data[at:at] = chance.choice(_TELLING)
    elif way == 3:
        data[at:end] = chance.choice(_TELLING)
    elif way == 4:
        del data[at:end]
    elif way == 5:
        data[at:at] = data[at:end] * chance.randrange(1, 4)
    else:
        other = chance.choice(corpus)
        start = chance.randrange(len(other) + 1)
        data[at:end] = other[start : start + chance.randrange(32)]
