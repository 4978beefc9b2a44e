"""The strict safetensors header: what is refused, and that the library agrees."""

from __future__ import annotations

import json
import os
import resource
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from ewq_gguf.checkpoint.header import DTYPE_BYTES, Header, read_header
from ewq_gguf.errors import InputError

BIG = 1 << 63


def read(path: Path) -> Header:
    fd = os.open(path, os.O_RDONLY)
    try:
        return read_header(fd, path)
    finally:
        os.close(fd)


def packed(header: bytes | str | object, data: bytes = b"") -> bytes:
    """A file's bytes: length, header, data."""
    if not isinstance(header, bytes):
        text = header if isinstance(header, str) else json.dumps(header)
        header = text.encode()
    return len(header).to_bytes(8, "little") + header + data


def entry(dtype="F32", shape=(1,), begin=0, end=4):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def one(text: str) -> bytes:
    """A file with one tensor `a` whose entry is this JSON text, and 4 bytes."""
    return packed(f'{{"a": {text}}}', bytes(4))


REFUSED = [
    # 1: too short for a header length
    pytest.param(b"", "has 0 bytes, .* 8 or more", id="1-empty"),
    pytest.param(b"\x02\0\0\0", "has 4 bytes, .* 8 or more", id="1-four-bytes"),
    # 2: header longer than the file
    pytest.param(
        (1000).to_bytes(8, "little") + b"{}",
        "length 1000 does not fit its 10 bytes .*truncated",
        id="2-header-past-end",
    ),
    pytest.param(
        packed({"a": entry()}, bytes(4))[:30], "truncated", id="2-cut-in-header"
    ),
    # 3: absurd header length
    pytest.param(b"\xff" * 8 + b"{}", f"length {2**64 - 1}", id="3-2^64-1"),
    pytest.param(
        (100_000_001).to_bytes(8, "little") + b"{}", "at most 100000000", id="3-100MB"
    ),
    # 4, 5: other kinds of file
    pytest.param(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "Git LFS pointer.*git lfs pull",
        id="4-lfs",
    ),
    pytest.param(b"<!DOCTYPE html><html></html>", "is an HTML", id="5-html"),
    pytest.param(b"\xef\xbb\xbf<?xml version='1'?>", "is an HTML or XML", id="5-xml"),
    pytest.param(b"PK\x03\x04" + bytes(60), "is a zip archive", id="5-zip"),
    pytest.param(b"\x80\x02}q\x00." + bytes(60), "is a Python pickle", id="5-pickle-2"),
    pytest.param(b"\x80\x04}\x94." + bytes(60), "is a Python pickle", id="5-pickle-4"),
    pytest.param(b"GGUF\x03\0\0\0" + bytes(60), "is a GGUF file", id="5-gguf"),
    # 6: not a JSON object
    pytest.param(packed(b'{"a\xff": 1}'), "not UTF-8 at byte 11", id="6-utf8"),
    pytest.param(packed('{"a": }'), "not JSON at byte 14", id="6-json"),
    pytest.param(packed('{"é": }'), "not JSON at byte 15", id="6-json-byte-offset"),
    pytest.param(packed("[]"), "does not start with '{' at byte 8", id="6-list"),
    pytest.param(packed(" {}"), "does not start with '{'", id="6-leading-space"),
    pytest.param(packed(""), "does not start with '{'", id="6-no-header"),
    pytest.param(packed("{} {}"), "not JSON at byte 11", id="6-two-objects"),
    pytest.param(packed('{"__metadata__": 1}'), "__metadata__", id="6-metadata"),
    pytest.param(
        packed('{"__metadata__": {"a": 1}}'), "__metadata__", id="6-metadata-number"
    ),
    # 7: deep nesting
    pytest.param(packed('{"a":' + "[" * 100_000), "nested too deep", id="7-deep-list"),
    pytest.param(packed('{"a":' * 100_000), "nested too deep", id="7-deep-object"),
    # 8: duplicates
    pytest.param(
        packed(f'{{"a": {json.dumps(entry())}, "a": {json.dumps(entry())}}}', bytes(4)),
        "duplicate key 'a'",
        id="8-tensor-twice",
    ),
    pytest.param(
        one('{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}'),
        "duplicate key 'dtype'",
        id="8-field-twice",
    ),
    # 9, 10: coverage
    pytest.param(
        packed({"a": entry(), "b": entry(begin=2, end=6)}, bytes(6)),
        "b overlaps a at bytes",
        id="9-overlap",
    ),
    pytest.param(
        packed({"a": entry(), "b": entry()}, bytes(4)),
        "b overlaps a",
        id="9-same-range",
    ),
    pytest.param(
        packed({"a": entry(), "b": entry(begin=8, end=12)}, bytes(12)),
        r"bytes \d+-\d+ belong to no tensor: a hole",
        id="10-hole",
    ),
    pytest.param(
        packed({"a": entry(begin=4, end=8)}, bytes(8)), "a hole", id="10-hole-at-start"
    ),
    pytest.param(
        packed({"a": entry()}, bytes(9)), "bytes .* belong to no tensor", id="10-tail"
    ),
    pytest.param(packed({"a": entry()}, bytes(3)), "truncated", id="10-data-cut"),
    pytest.param(packed("{}", b"x"), "belong to no tensor", id="10-no-tensor"),
    # 11: offsets and shapes that are no sizes
    pytest.param(
        packed({"a": entry(begin=4, end=0)}, bytes(4)), "hold -4 bytes", id="11-reverse"
    ),
    pytest.param(packed({"a": entry(shape=[-1])}), "whole numbers", id="11-negative"),
    pytest.param(packed({"a": entry(begin=-4, end=0)}), "whole", id="11-negative-at"),
    pytest.param(packed({"a": entry(shape=[1.0])}), "whole numbers", id="11-float"),
    pytest.param(packed({"a": entry(end=4.0)}), "whole numbers", id="11-float-offset"),
    pytest.param(packed({"a": entry(shape=[True])}), "whole numbers", id="11-bool"),
    pytest.param(packed({"a": entry(shape=["1"])}), "whole numbers", id="11-string"),
    pytest.param(packed({"a": entry(shape=[BIG])}), "whole numbers", id="11-2^63"),
    pytest.param(packed({"a": entry(end=BIG)}), "whole numbers", id="11-2^63-offset"),
    pytest.param(
        one('{"dtype":"F32","shape":1,"data_offsets":[0,4]}'), "whole", id="11-no-list"
    ),
    pytest.param(
        one('{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}'),
        "whole",
        id="11-three",
    ),
    pytest.param(
        one('{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}'),
        r"\[-0.0\]",
        id="11-minus-0",
    ),
    pytest.param(
        one('{"dtype":"F32","shape":[1' + "0" * 5000 + '],"data_offsets":[0,4]}'),
        "header: ",
        id="11-5000-digits",
    ),
    # 12: shape and range
    pytest.param(
        packed({"a": entry(shape=[2])}, bytes(4)),
        r"hold 4 bytes, F32 \[2\] needs 8",
        id="12-mismatch",
    ),
    pytest.param(
        packed({"a": entry(shape=[1 << 62, 1 << 62])}, bytes(4)),
        "too large",
        id="12-overflow",
    ),
    pytest.param(
        packed({"a": entry(shape=[1 << 62, 1 << 62, 0], end=0)}),
        "too large",
        id="12-overflow-times-zero",
    ),
    pytest.param(
        packed({"a": entry(shape=[BIG - 1] * 300)}, bytes(4)),
        "too large",
        id="12-overflow-beyond-printing",
    ),
    # 13: dtypes
    pytest.param(
        packed({"a": entry(dtype="F33")}, bytes(4)),
        "unknown dtype 'F33'; known are BOOL, .*BF16",
        id="13-unknown",
    ),
    pytest.param(
        packed({"a": entry(dtype="bf16", end=2)}, bytes(2)), "bf16", id="13-lc"
    ),
    pytest.param(packed({"a": entry(dtype=7)}, bytes(4)), "unknown dtype 7", id="13-7"),
    pytest.param(packed({"a": entry(dtype=[])}, bytes(4)), "unknown", id="13-list"),
    *(
        pytest.param(
            packed({"a": entry(dtype=dtype)}, bytes(4)),
            f"{dtype} is quantised; use the BF16 checkpoint",
            id=f"14-{dtype}",
        )
        for dtype in ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0")
    ),
    # entries and names
    pytest.param(one("[]"), "needs exactly dtype, shape", id="entry-list"),
    pytest.param(one("null"), "needs exactly dtype, shape", id="entry-null"),
    pytest.param(
        one('{"dtype":"F32","shape":[1]}'), "needs exactly", id="entry-without-offsets"
    ),
    pytest.param(packed({"": entry()}, bytes(4)), "is empty", id="19-empty-name"),
    pytest.param(packed({"a\0b": entry()}, bytes(4)), "NUL", id="19-nul"),
    pytest.param(
        packed(r'{"\ud800": ' + json.dumps(entry()) + "}", bytes(4)),
        "surrogate",
        id="19-lone-surrogate",
    ),
]


@pytest.mark.parametrize(("content", "message"), REFUSED)
@pytest.mark.fault(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 19)
def test_a_faulty_header_is_refused_with_its_reason(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    started = time.monotonic()
    with pytest.raises(InputError, match=message) as caught:
        read(path)
    assert time.monotonic() - started < 2
    assert caught.value.exit_code == 3
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.fault(19)
def test_a_hostile_name_cannot_write_to_the_terminal(tmp_path):
    path = tmp_path / "x.safetensors"
    name = "\x1b[31m\nred<script>"
    path.write_bytes(packed({name: entry(shape=[3])}, bytes(4)))
    with pytest.raises(InputError) as caught:
        read(path)
    assert r"\x1b[31m\nred<script>" in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.fault(3)
def test_a_huge_header_length_allocates_nothing(tmp_path):
    """The length is refused before a buffer of that size is asked for."""
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(b"\xff" * 7 + b"\x7f")
        file.truncate(1 << 40)  # sparse: larger than any memory
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="header length"):
        read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000


def test_a_shape_of_a_million_huge_dimensions_is_refused_quickly(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(packed({"a": entry(shape=[BIG - 1] * 1_000_000)}, bytes(4)))
    started = time.monotonic()
    with pytest.raises(InputError, match="too large"):
        read(path)
    assert time.monotonic() - started < 5


SOUND = {
    "plain": packed({"a": entry()}, bytes(4)),
    "metadata": packed({"__metadata__": {"format": "pt"}, "a": entry()}, bytes(4)),
    "padding": packed(json.dumps({"a": entry()}) + "   ", bytes(4)),
    "out of order": packed({"b": entry(begin=4, end=8), "a": entry()}, bytes(8)),
    "nothing": packed("{}"),
    "scalar": packed({"a": entry(shape=[])}, bytes(4)),
    "zero elements": packed(
        {"a": entry(shape=[0, 7], end=0), "b": entry(), "c": entry("I8", [0], 4, 4)},
        bytes(4),
    ),
    "odd names": packed({"é\n<b>": entry(), " ": entry(begin=4, end=8)}, bytes(8)),
    "escaped pair": packed(r'{"\ud83d\ude00": ' + json.dumps(entry()) + "}", bytes(4)),
    "every dtype": packed(
        {
            name: entry(name, [1], begin, begin + size)
            for (name, size), begin in zip(
                DTYPE_BYTES.items(),
                (sum(list(DTYPE_BYTES.values())[:i]) for i in range(len(DTYPE_BYTES))),
                strict=True,
            )
        },
        bytes(sum(DTYPE_BYTES.values())),
    ),
}


@pytest.mark.parametrize("content", SOUND.values(), ids=SOUND)
def test_a_sound_header_is_what_the_library_reads(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    header = read(path)
    assert header.file_bytes == len(content)
    with safe_open(path, "numpy") as reference:
        assert {t.name for t in header.tensors} == set(reference.keys())
        for tensor in header.tensors:
            part = reference.get_slice(tensor.name)
            assert list(tensor.shape) == part.get_shape()
            assert tensor.dtype == part.get_dtype()


def test_the_strictness_of_dtypes_covers_the_library(tmp_path):
    """Every dtype we read has the size the library gives it."""
    path = tmp_path / "x.safetensors"
    for dtype, size in DTYPE_BYTES.items():
        path.write_bytes(packed({"a": entry(dtype, [3], 0, 3 * size)}, bytes(3 * size)))
        assert read(path).tensors[0].end - read(path).tensors[0].begin == 3 * size
        assert is_accepted_by_library(path)


# Differential: whatever a mutation makes of a sound header, what passes here must
# pass there.

TENSORS = {
    "__metadata__": {"format": "pt"},
    "model.a": entry("BF16", [2, 3], 0, 12),
    "model.b": entry("F32", [1], 12, 16),
    "model.c": entry("I8", [], 16, 17),
    "model.d": entry("F16", [0, 4], 17, 17),
}
GOOD = packed(TENSORS, bytes(17))

NUMBERS: st.SearchStrategy[object] = st.one_of(
    st.integers(-2, 40),
    st.sampled_from([BIG - 1, BIG, 2 * BIG - 1, 2 * BIG, 1 << 62, 1 << 32]),
    st.sampled_from([1.0, -0.0, 1e30, True, None, "4", [], {}]),
)
VALUES = st.one_of(
    NUMBERS,
    st.lists(NUMBERS, max_size=4),
    st.sampled_from([*DTYPE_BYTES, "F4", "C64", "f32", "", None, "\ud800"]),
    st.text(max_size=3),
)
SNIPPETS = st.sampled_from(
    [
        b"-0", b"-", b"0", b"00", b"1e0", b"1.0", b"E", b",", b"}", b"{", b"[", b"]",
        b":", b'"', b"\\", b"\\ud800", b"\\u0000", b"\xff", b"\0", b" ", b"\n", b"\x0b",
        b"null", b"NaN", b"true", b"/**/", b"\xef\xbb\xbf", b'"x":1,', b"9" * 30,
    ]
)  # fmt: skip


def is_accepted_by_library(path: Path) -> bool:
    try:
        with safe_open(path, "numpy"):
            return True
    except (SafetensorError, OSError):
        return False


@st.composite
def edited_header(draw):
    """The header with some of its values, fields or names exchanged."""
    header = json.loads(json.dumps(TENSORS))
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(list(header)))
        kind = draw(st.sampled_from(["field", "number", "name", "drop", "extra"]))
        fields = header[name]
        if not isinstance(fields, dict) or not fields:
            continue
        if kind == "field":
            fields[draw(st.sampled_from([*fields]))] = draw(VALUES)
        elif kind == "number":
            key = draw(st.sampled_from(["shape", "data_offsets"]))
            values = fields.get(key)
            if isinstance(values, list) and values:
                values[draw(st.integers(0, len(values) - 1))] = draw(NUMBERS)
        elif kind == "name":
            header[draw(st.sampled_from(["", "\ud800", "__metadata__", "é", "x"]))] = (
                header.pop(name)
            )
        elif kind == "drop":
            fields.pop(draw(st.sampled_from([*fields])))
        else:
            fields[draw(st.text(max_size=2))] = draw(VALUES)
    return packed(json.dumps(header), bytes(draw(st.integers(15, 19))))


@st.composite
def edited_bytes(draw):
    """The file with bytes of it flipped, put in or taken out; the length put right."""
    header = bytearray(GOOD[8:-17])
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(header) - 1))
        kind = draw(st.integers(0, 2))
        if kind == 0:
            header[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == 1:
            header[at:at] = draw(SNIPPETS)
        else:
            del header[at : at + draw(st.integers(1, 4))]
    return packed(bytes(header), bytes(17))


@st.composite
def flipped(draw):
    """Any bytes of the file exchanged, its length and its data too."""
    content = bytearray(GOOD)
    for _ in range(draw(st.integers(1, 4))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans())
                 else content)  # fmt: skip


@pytest.mark.slow
@settings(
    max_examples=2500,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(content=st.one_of(edited_header(), edited_bytes(), flipped()))
def test_nothing_that_the_library_refuses_is_accepted(tmp_path, content):
    path = tmp_path / "mutated.safetensors"
    path.write_bytes(content)
    with suppress(InputError):
        read(path)
        assert is_accepted_by_library(path)
