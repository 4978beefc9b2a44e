"""The strict reader: right on real files, quick and plain on hostile ones."""

from __future__ import annotations

import os
import random
import struct
import time
from contextlib import suppress

import gguf
import numpy as np
import pytest

from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.errors import VerificationError
from tests.gguf_files import write_gguf

pytest_plugins = ["tests.toolchain_fixtures"]

U32, STRING, ARRAY, U64 = 4, 8, 9, 10
HUGE = 1 << 63


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def u32(key: str, value: int) -> bytes:
    return text(key) + struct.pack("<II", U32, value)


def array(key: str, item: int, count: int, data: bytes = b"") -> bytes:
    return text(key) + struct.pack("<IIQ", ARRAY, item, count) + data


def info(name: str = "a.weight", shape=(32,), kind: int = 0, offset: int = 0) -> bytes:
    """An entry of the tensor table; `shape` as the file has it, fastest first."""
    return (
        text(name)
        + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        + struct.pack("<IQ", kind, offset)
    )


def file(
    kv=(), tensors=(), data: bytes = b"", *, n_kv=None, n_tensors=None, align=32
) -> bytes:
    """A file of these parts; the counts can be made to lie."""
    header = b"GGUF" + struct.pack(
        "<IQQ",
        3,
        len(tensors) if n_tensors is None else n_tensors,
        len(kv) if n_kv is None else n_kv,
    )
    header += b"".join(kv) + b"".join(tensors)
    return header + bytes(-len(header) % align) + data


ONE = file([u32("x", 7)], [info()], bytes(128))


@pytest.fixture
def read(tmp_path):
    """Read these bytes; a second is the most that may take."""
    path = tmp_path / "file.gguf"

    def read_bytes(data: bytes, **options):
        path.write_bytes(data)
        begin = time.perf_counter()
        try:
            return read_gguf(path, **options)
        finally:
            assert time.perf_counter() - begin < 1

    return read_bytes


@pytest.fixture
def refuse(read):
    """The error that these bytes give; it names the file and the byte."""

    def refuse_bytes(data: bytes, match: str) -> VerificationError:
        with pytest.raises(VerificationError, match=match) as caught:
            read(data)
        error = caught.value
        assert error.exit_code == 8
        assert "file.gguf: at byte " in str(error)
        assert "\n" not in str(error)
        return error

    return refuse_bytes


# Sound files.


def test_a_file_by_hand_is_read_to_the_byte(read):
    found = read(
        file(
            [u32("x", 7), array("y", U32, 3, bytes(12)), text("z") + b"\7\0\0\0\1"],
            [info("a", (64, 2), 0, 0), info("b", (32,), 8, 512)],
            bytes(512 + 34),
        )
    )

    assert found.kv == {"x": 7, "y": 3, "z": True}
    assert found.kv_bytes == 17 + 37 + 14
    assert [(t.name, t.shape, t.ggml_type) for t in found.tensors] == [
        ("a", (2, 64), "F32"),
        ("b", (32,), "Q8_0"),
    ]
    assert [t.size_bytes for t in found.tensors] == [512, 34]
    assert [t.offset - found.data_offset for t in found.tensors] == [0, 512]
    assert (
        found.data_offset
        == -(-(24 + 68 + (9 + 4 + 16 + 12) + (9 + 4 + 8 + 12)) // 32) * 32
    )
    assert found.file_bytes == found.data_offset + 546


@pytest.mark.parametrize("version", [2, 3])
def test_versions_2_and_3_are_read(read, version):
    assert read(ONE[:4] + struct.pack("<I", version) + ONE[8:]).kv == {"x": 7}


def test_a_window_is_no_longer_than_the_models_context(read):
    name = text("llama")
    architecture = text("general.architecture") + struct.pack("<I", STRING) + name
    short = read(file(kv=[architecture, u32("llama.context_length", 64)]))
    other = read(file(kv=[architecture, u32("bert.context_length", 64)]))

    assert short.window(512) == 64
    assert short.window(32) == 32
    assert other.window(512) == 512


def test_a_file_without_tensors_is_sound(read):
    assert read(file([u32("x", 1)])).tensors == ()


def test_an_alignment_of_the_files_own_places_the_data(read):
    found = read(file([u32("general.alignment", 128)], [info()], bytes(128), align=128))

    assert found.tensors[0].offset == found.data_offset == 128


@pytest.mark.parametrize(
    ("number", "kind", "value"),
    [
        (0, "<B", 255), (1, "<b", -1), (2, "<H", 65535), (3, "<h", -2),
        (4, "<I", 2**32 - 1), (5, "<i", -3), (6, "<f", 0.5), (7, "<?", False),
        (10, "<Q", 2**64 - 1), (11, "<q", -4), (12, "<d", 1e300),
    ],
)  # fmt: skip
def test_every_scalar_type_is_read(read, number, kind, value):
    data = file([text("k") + struct.pack("<I", number) + struct.pack(kind, value)])

    assert read(data).kv == {"k": value}


@pytest.mark.fault(60)
def test_text_that_is_not_utf_8_is_escaped(read):
    data = file([text(b"k\xff") + struct.pack("<I", STRING) + text(b"v\xfe")])

    assert read(data).kv == {"k\\xff": "v\\xfe"}


def test_header_only_does_not_ask_for_the_data(read, refuse):
    cut = ONE[:-128]

    assert read(cut, header_only=True).tensors[0].size_bytes == 128
    refuse(cut, "truncated")


def agrees_with_gguf(path):
    found, reader = read_gguf(path), gguf.GGUFReader(path)

    assert [
        (t.name, t.shape[::-1], t.ggml_type, t.offset, t.size_bytes)
        for t in found.tensors
    ] == [
        (t.name, tuple(map(int, t.shape)), t.tensor_type.name, t.data_offset, t.n_bytes)
        for t in reader.tensors
    ]
    fields = {k: v for k, v in reader.fields.items() if not k.startswith("GGUF.")}
    assert list(found.kv) == list(fields)
    for key, field in fields.items():
        contents = field.contents()
        is_array = field.types[0] == gguf.GGUFValueType.ARRAY
        assert found.kv[key] == (len(contents) if is_array else contents), key
    assert found.data_offset == reader.data_offset
    assert found.file_bytes == path.stat().st_size


def test_it_agrees_with_gguf_on_a_file_that_gguf_wrote(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "llama")
    writer.add_bool("a.bool", True)
    writer.add_float32("a.float", 0.1)
    writer.add_string("a.text", "é\n")
    writer.add_array("a.texts", ["", "x", "yy" * 300])
    writer.add_array("a.numbers", [1, 2, 3])
    rng = np.random.default_rng(0)
    for i, kind in enumerate((np.float32, np.float16)):
        writer.add_tensor(f"t{i}.weight", rng.standard_normal((3, 4, 64)).astype(kind))
    quantised = gguf.quantize(
        rng.standard_normal((6, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q5_0
    )
    writer.add_tensor("q", quantised, raw_dtype=gguf.GGMLQuantizationType.Q5_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    agrees_with_gguf(tmp_path / "odd.gguf")


@pytest.mark.llamacpp
def test_it_agrees_with_gguf_on_a_converted_file(tiny):
    agrees_with_gguf(tiny.base)


# Faults 53 to 56 and 61.


@pytest.mark.fault(53)
@pytest.mark.parametrize("length", [0, 1, 3, 4, 7, 8, 15, 16, 23, 24, 25, 31, 33])
def test_a_file_cut_in_its_first_bytes_is_refused(refuse, length):
    refuse(ONE[:length], "the file ends|not GGUF|do not fit")


@pytest.mark.llamacpp
def test_a_real_file_cut_anywhere_is_refused(tiny, tmp_path):
    data = tiny.base.read_bytes()
    header = read_gguf(tiny.base).data_offset
    path = tmp_path / "cut.gguf"
    for length in (*range(0, header, header // 30), *range(header, len(data), 5000)):
        path.write_bytes(data[:length])
        begin = time.perf_counter()
        with pytest.raises(VerificationError, match="at byte"):
            read_gguf(path)
        assert time.perf_counter() - begin < 1
    path.write_bytes(data[:-1])
    with pytest.raises(VerificationError, match="truncated"):
        read_gguf(path)


@pytest.mark.fault(53)
def test_a_zeroed_header_is_refused(refuse):
    refuse(bytes(64) + ONE[64:], r"starts with b'\\x00\\x00\\x00\\x00', not GGUF")
    refuse(ONE[:24] + bytes(len(ONE) - 24), "value type|appears twice|dimensions")


@pytest.mark.fault(53)
@pytest.mark.parametrize("magic", [b"GGML", b"FUGG", b"PK\3\4", b"gguf", b"<htm"])
def test_another_magic_is_named(refuse, magic):
    refuse(magic + ONE[4:], "not GGUF")


@pytest.mark.fault(53)
@pytest.mark.parametrize("version", [0, 1, 4, 255, 2**31])
def test_another_version_is_named(refuse, version):
    error = refuse(ONE[:4] + struct.pack("<I", version) + ONE[8:], "version|big-endian")
    assert version >= 2**16 or f"version {version}" in str(error)


@pytest.mark.fault(61)
@pytest.mark.parametrize("version", [2, 3])
def test_a_big_endian_file_is_named_as_such(refuse, version):
    refuse(
        b"GGUF" + struct.pack(">IQQ", version, 1, 1) + bytes(64),
        "is big-endian, which is not supported",
    )


@pytest.mark.fault(54)
@pytest.mark.parametrize("count", [HUGE, HUGE - 1, 2**64 - 1, 1 << 32, 1 << 21])
@pytest.mark.parametrize("what", ["n_kv", "n_tensors"])
def test_counts_are_checked_against_the_bytes_left(refuse, what, count):
    refuse(file(**{what: count}), f"{count} .* do not fit its 32 bytes")


@pytest.mark.fault(54)
def test_counts_have_a_limit_in_a_large_file(tmp_path):
    path = tmp_path / "sparse.gguf"
    with path.open("wb") as sparse:
        sparse.write(file(n_tensors=1 << 27))
        sparse.truncate(64 << 30)
    begin = time.perf_counter()

    with pytest.raises(VerificationError, match="134217728 tensors do not fit"):
        read_gguf(path)
    assert time.perf_counter() - begin < 1


@pytest.mark.fault(54)
@pytest.mark.parametrize("count", [HUGE, 2**64 - 1, 1 << 40, 1000])
@pytest.mark.parametrize("item", [0, 4, 7, STRING, 12])
def test_array_counts_are_checked_against_the_bytes_left(refuse, item, count):
    refuse(file([array("k", item, count)]), "at byte")


@pytest.mark.parametrize("item", [ARRAY, 13, 2**32 - 1])
def test_arrays_of_arrays_and_unknown_items_are_refused(refuse, item):
    refuse(file([array("k", item, 1, bytes(64))]), f"array item type {item} is not")


@pytest.mark.fault(54)
@pytest.mark.parametrize("length", [HUGE, 2**64 - 1, 1 << 40, 100])
def test_string_lengths_are_checked_against_the_bytes_left(refuse, length):
    size = struct.pack("<Q", length)

    refuse(file([size + b"key"]), "a string of|needed and the file ends")
    refuse(file([text("k") + struct.pack("<I", STRING) + size]), "a string of|needed")
    refuse(file([array("k", STRING, 1, size)]), "needed and the file ends")
    refuse(file([], [size + bytes(40)]), "a string of|needed and the file ends")


@pytest.mark.parametrize("kind", [13, 14, 255, 2**32 - 1])
def test_an_unknown_value_type_is_named(refuse, kind):
    refuse(file([text("k") + struct.pack("<I", kind)]), f"value type {kind} is unknown")


@pytest.mark.fault(54)
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(array("k", 0, HUGE, bytes(8)), id="bytes"),
        pytest.param(array("k", STRING, HUGE, bytes(8)), id="strings"),
        pytest.param(array("k", ARRAY, HUGE, bytes(8)), id="arrays"),
        pytest.param(array("k", U64, 1 << 60, bytes(8)), id="numbers"),
    ],
)
def test_57_bytes_that_hang_the_gguf_package_are_refused_at_once(read, body):
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + body
    assert len(data) == 57

    with pytest.raises(VerificationError, match="at byte"):
        read(data)


@pytest.mark.fault(55)
def test_a_key_that_appears_twice_is_refused(refuse):
    refuse(file([u32("x", 1), u32("x", 2)]), "key x appears twice")


@pytest.mark.fault(55)
def test_a_tensor_that_appears_twice_is_refused(refuse):
    refuse(
        file([], [info("a", (32,)), info("a", (32,), 0, 128)], bytes(256)),
        "tensor a appears twice",
    )


@pytest.mark.fault(55)
@pytest.mark.parametrize("alignment", [0, 3, 48, 2 << 20, 2**32 - 1])
def test_an_alignment_that_is_no_power_of_two_or_too_large_is_refused(
    refuse, alignment
):
    refuse(
        file([u32("general.alignment", alignment)], [info()], bytes(128)),
        f"alignment {alignment} is not a power of two",
    )


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(struct.pack("<I", STRING) + text("32"), id="text"),
        pytest.param(struct.pack("<If", 6, 32.0), id="float"),
        pytest.param(struct.pack("<I?", 7, True), id="bool"),
        pytest.param(struct.pack("<IIQ", ARRAY, 0, 32) + bytes(32), id="array"),
    ],
)
def test_an_alignment_that_is_no_u32_is_refused(refuse, value):
    refuse(
        file([text("general.alignment") + value], [info()], bytes(128)),
        "alignment has value type",
    )


@pytest.mark.fault(56)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1 << 32, 1 << 32), id="product-wraps-to-0"),
        pytest.param((1 << 62, 4, 2), id="past-2^63"),
        pytest.param((HUGE,), id="2^63"),
        pytest.param((2**64 - 1, 1), id="minus-1"),
        pytest.param((32, 0), id="zero"),
        pytest.param((0,), id="only-zero"),
    ],
)
def test_an_impossible_shape_is_refused(refuse, shape):
    refuse(file([], [info("a", shape)], bytes(128)), "a has an impossible shape")


@pytest.mark.fault(56)
@pytest.mark.parametrize("n_dims", [0, 5, 1000, 2**32 - 1])
def test_more_than_four_or_no_dimensions_are_refused(refuse, n_dims):
    entry = text("a") + struct.pack("<I", n_dims) + bytes(200)

    refuse(file([], [entry]), f"a has {n_dims} dimensions")


@pytest.mark.parametrize("kind", [4, 5, 31, 99, 2**32 - 1])
def test_an_unknown_tensor_type_is_named(refuse, kind):
    refuse(file([], [info("a", (32,), kind)], bytes(128)), f"the unknown type {kind}")


def test_a_row_that_is_no_whole_number_of_blocks_is_refused(refuse):
    refuse(
        file([], [info("a", (40, 2), 8)], bytes(256)),
        "a: row length 40 is not a multiple of Q8_0",
    )


@pytest.mark.fault(56)
@pytest.mark.parametrize("offset", [32, 128, 1 << 40, HUGE, 2**64 - 32])
def test_an_offset_past_the_end_is_refused(refuse, offset):
    refuse(file([], [info("a", (32,), 0, offset)], bytes(128)), "a (ends|starts) at")


@pytest.mark.parametrize("offset", [1, 31, 33])
def test_an_offset_off_the_alignment_is_refused(refuse, offset):
    refuse(file([], [info("a", (32,), 0, offset)], bytes(512)), f"a starts at {offset}")


@pytest.mark.parametrize(
    "offset", [pytest.param(0, id="overlap"), pytest.param(256, id="hole")]
)
def test_tensors_that_overlap_or_leave_a_hole_are_refused_as_ggml_does(refuse, offset):
    refuse(
        file([], [info("a"), info("b", (32,), 0, offset)], bytes(1024)),
        f"b starts at {offset}",
    )


@pytest.mark.fault(60)
def test_a_hostile_name_cannot_reach_the_terminal(refuse):
    error = refuse(
        file([], [info("\x1b[2J\n<script>", (0,))], bytes(128)), "impossible shape"
    )

    assert "\x1b" not in str(error)
    assert "\\x1b[2J\\n<script>" in str(error)


@pytest.mark.parametrize("name", ["absent.gguf", "."])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, name):
    with pytest.raises(VerificationError, match="cannot be read|not a regular file"):
        read_gguf(tmp_path / name)


def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")

    with pytest.raises(VerificationError, match="not a regular file"):
        read_gguf(tmp_path / "pipe.gguf")


# Mutations of a real header.


@pytest.mark.parametrize("seed", range(5))
def test_a_mutated_header_is_read_or_refused_but_nothing_else(tmp_path, seed):
    tensors = {f"blk.{i}.attn_q.weight": (4, 64) for i in range(6)}
    sound = write_gguf(tmp_path / "sound.gguf", tensors).read_bytes()
    header = read_gguf(tmp_path / "sound.gguf").data_offset
    path = tmp_path / "mutated.gguf"
    rng = random.Random(seed)
    read_whole = 0
    for _ in range(100):
        data = bytearray(sound)
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            position = rng.randrange(header)
            kind = rng.randrange(4)
            if kind == 0:
                data[position] ^= 1 << rng.randrange(8)
            elif kind == 1:
                data[position] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
            elif kind == 2:
                data[position : position + 8] = struct.pack(
                    "<Q", rng.choice((0, 1, HUGE - 1, HUGE, 2**64 - 1, 1 << 40))
                )
            else:
                del data[position : position + rng.randrange(1, 64)]
        path.write_bytes(data)
        begin = time.perf_counter()
        with suppress(VerificationError):
            read_gguf(path)
            read_whole += 1
        assert time.perf_counter() - begin < 1
    assert read_whole < 50
