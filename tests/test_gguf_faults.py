"""Faults 53 to 61 at the command line: what `ewq verify` and `ewq bench` refuse."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.cli import main
from ewq_gguf.llamacpp.quantize import quantize
from ewq_gguf.process import run

pytest_plugins = ["tests.toolchain_fixtures"]
pytestmark = [pytest.mark.llamacpp, pytest.mark.usefixtures("own_cache")]

HUGE = struct.pack("<Q", 1 << 63)
#: Of the CPU's time and of memory: what a header of lies may cost.
MOST_SECONDS, MOST_BYTES = 1.0, 200_000_000

#: In a child, so that its memory is its own.
WATCHED = """
import json, sys, time
from ewq_gguf.bench.tasks.speed import peak_rss_bytes
from ewq_gguf.cli import main
codes, seconds = [], []
for argv in json.loads(sys.argv[1]):
    began = time.process_time()
    codes.append(main(argv))
    seconds.append(time.process_time() - began)
print(json.dumps([codes, seconds, peak_rss_bytes()]))
"""


@pytest.fixture(scope="module")
def made(tiny, toolchain, tmp_path_factory) -> Path:
    """A folder with a sound file and the plan it was made by."""
    folder: Path = tmp_path_factory.mktemp("made")
    plan = tiny.plan("F16")
    (folder / "plan.json").write_text(plan.to_json())
    out = folder / "sound.gguf"
    quantize(plan, tiny.base, out, toolchain, n_threads=1, load=False)
    return folder


def commands(made: Path, path: Path) -> dict[str, list[str]]:
    """Both ways a file comes in."""
    out = str(path.with_name("result.json"))
    bench = ["bench", str(path), "--tasks", "speed", "--device", "cpu", "-o", out]
    return {
        "verify": ["verify", str(made / "plan.json"), str(path)],
        "bench": [*bench, "-q"],
    }


@pytest.fixture
def refused(made, tmp_path, capsys):
    """What both commands say of a file: one line each, and exit code 8."""

    def say(path: Path, command: str | None = None) -> str:
        said = []
        for name, argv in commands(made, path).items():
            if command in (None, name):
                assert main(argv) == 8, capsys.readouterr().err
                printed = capsys.readouterr()
                assert printed.out == ""
                first, *table = printed.err.splitlines()
                assert first.startswith(f"ewq: {'verify' if not command else ''}")
                assert first.isprintable()
                assert all(line.startswith("  ") for line in table)
                said.append(printed.err)
        assert not path.with_name("result.json").exists()
        return "\n".join(said)

    return say


def put(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def key_at(data: bytes, key: str) -> int:
    """What follows a name: a key's value type, a tensor's number of dimensions."""
    return data.index(struct.pack("<Q", len(key)) + key.encode()) + 8 + len(key)


def fill(path: Path, name: str, value: float) -> None:
    """Set a float32 tensor."""
    tensor = next(t for t in read_gguf(path).tensors if t.name == name)
    with path.open("r+b") as file:
        file.seek(tensor.offset)
        file.write(struct.pack("<f", value) * (tensor.size_bytes // 4))


def with_number(data: bytes, key: str, value: int) -> bytes:
    """One more key, before the others."""
    pair = struct.pack("<Q", len(key)) + key.encode() + struct.pack("<II", 4, value)
    (n_kv,) = struct.unpack_from("<Q", data, 16)
    return put(data[:24], 16, struct.pack("<Q", n_kv + 1)) + pair + data[24:]


TENSOR = "blk.0.attn_q.weight"

Change = Callable[[bytes], bytes]
BROKEN: dict[str, tuple[Change, str]] = {
    "empty": (lambda d: b"", "at byte 0: 4 bytes are needed"),
    "cut-header": (lambda d: d[:100], r"at byte \d+: "),
    "cut-data": (lambda d: d[:-100], "at byte .*: truncated"),
    "zeroed": (lambda d: put(d, 0, bytes(64)), "at byte 4: starts with .*not GGUF"),
    "magic": (lambda d: put(d, 0, b"GGML"), "at byte 4: .*not GGUF"),
    "version": (lambda d: put(d, 4, b"\x09"), "at byte 8: is GGUF version 9"),
    "keys-twice": (
        lambda d: with_number(with_number(d, "x", 1), "x", 2),
        "key x appears twice",
    ),
    "tensors-twice": (
        lambda d: d.replace(b"blk.1.attn_q.weight", TENSOR.encode()),
        f"{TENSOR} appears twice",
    ),
    "dims": (
        lambda d: put(d, key_at(d, TENSOR), struct.pack("<I", 5)),
        "has 5 dimensions, 1 to 4",
    ),
    "zero-dim": (
        lambda d: put(d, key_at(d, TENSOR) + 4, bytes(8)),
        "has an impossible shape",
    ),
    "wrapped": (
        lambda d: put(d, key_at(d, TENSOR) + 4, struct.pack("<QQ", 1 << 32, 1 << 32)),
        "has an impossible shape",
    ),
    "offset": (
        lambda d: put(d, key_at(d, TENSOR) + 24, struct.pack("<Q", 1 << 40)),
        "starts at 1099511627776",
    ),
    "endian": (lambda d: put(d, 4, b"\0\0\0\3"), "is big-endian"),
}


@pytest.mark.fault(53, 55, 56, 61)
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_header_is_refused_with_its_byte(made, refused, tmp_path, name):
    change, message = BROKEN[name]
    path = tmp_path / "broken.gguf"
    sound = (made / "sound.gguf").read_bytes()
    path.write_bytes(change(sound))
    assert path.read_bytes() != sound

    said = refused(path)

    assert len(re.findall(message, said)) == 2
    assert said.count("broken.gguf: at byte ") == 2


@pytest.mark.fault(55)
@pytest.mark.parametrize("alignment", [0, 48, 2 << 20])
def test_an_odd_alignment_is_refused(made, refused, tmp_path, alignment):
    path = tmp_path / "odd.gguf"
    data = (made / "sound.gguf").read_bytes()
    path.write_bytes(with_number(data, "general.alignment", alignment))

    assert refused(path).count(f"alignment {alignment} is not a power of two") == 2


@pytest.mark.fault(54)
@pytest.mark.parametrize("command", ["verify", "bench"])
def test_a_count_of_2_to_the_63_costs_neither_time_nor_memory(made, tmp_path, command):
    data = (made / "sound.gguf").read_bytes()
    lies = {
        "tensors": 8,
        "keys": 16,
        "string": key_at(data, "general.architecture") + 4,
        "array": key_at(data, "tokenizer.ggml.tokens") + 8,
    }
    asked = []
    for name, at in lies.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(put(data, at, HUGE))
        asked.append(commands(made, path)[command])

    argv = [sys.executable, "-c", WATCHED, json.dumps(asked)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)

    codes, seconds, rss_bytes = json.loads(done.stdout)
    assert codes == [8] * len(lies), done.stderr
    for name, line in zip(lies, done.stderr.splitlines(), strict=True):
        assert re.search(rf"{name}\.gguf: at byte \d+: .*{1 << 63}", line)
    assert max(seconds) < MOST_SECONDS
    assert rss_bytes < MOST_BYTES


@pytest.mark.fault(57)
def test_another_type_than_planned_is_listed(made, refused, tiny, toolchain, tmp_path):
    other = tmp_path / "other.gguf"
    plan = tiny.plan("Q8_0")
    quantize(plan, tiny.base, other, toolchain, n_threads=1, load=False)

    said = refused(other, "verify")

    assert "\n  blk.0.attn_v.weight: planned F16, found Q8_0\n" in said
    assert "\n  blk.1.attn_v.weight: planned F16, found Q8_0\n" in said


@pytest.mark.fault(57, 60)
def test_names_of_a_file_cannot_reach_the_terminal(made, refused, tmp_path):
    data = (made / "sound.gguf").read_bytes()
    path = tmp_path / "hostile.gguf"
    path.write_bytes(
        data.replace(b"blk.0.attn_q.weight", b"\x1b[2J\n<script>\xff.weig")
    )

    said = refused(path, "verify")

    assert r"\x1b[2J\n<script>\xff.weig: found F16, not planned" in said
    assert "blk.0.attn_q.weight: planned F16, absent" in said
    assert "\x1b" not in said


@pytest.mark.fault(60)
def test_what_a_file_says_cannot_reach_the_terminal(made, tmp_path, capsys):
    """All logits are 0, so that it answers with token 0, which clears the screen."""
    path = tmp_path / "hostile.gguf"
    data = (made / "sound.gguf").read_bytes().replace(b"<unk>", b"\x1b[2J!", 1)
    first_type = key_at(data, "tokenizer.ggml.token_type") + 16
    path.write_bytes(put(data, first_type, struct.pack("<I", 1)))
    fill(path, "output_norm.weight", 0.0)

    assert main(commands(made, path)["verify"]) == 0

    _, answer = capsys.readouterr().out.splitlines()
    assert answer.endswith("is" + 8 * r"\x1b[2J!")


@pytest.mark.fault(58)
def test_parts_that_are_missing_are_listed(refused, tiny, toolchain, tmp_path):
    argv = ["--split", "--split-max-tensors", "8", tiny.base, tmp_path / "part"]
    split = toolchain.tool("llama-gguf-split")
    run([split, *argv], stage="test", log_path=tmp_path / "split.log")
    first, second, third = sorted(tmp_path.glob("part-*.gguf"))
    shutil.copy(first, second)
    third.unlink()

    said = refused(first, "bench")

    assert "1 of its 3 parts are missing, 1 are of another file" in said
    assert f"\n  {third.name}: missing\n" in said
    assert f"\n  {second.name}: of another file\n" in said


@pytest.mark.fault(59)
def test_a_file_that_computes_nan_is_numerically_broken(
    made, refused, tmp_path, capsys
):
    path = tmp_path / "nan.gguf"
    shutil.copy(made / "sound.gguf", path)
    fill(path, "output_norm.weight", float("nan"))
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over a lazy dog " * 40)

    assert "nan.gguf: is numerically broken" in refused(path, "verify")
    argv = commands(made, path)["bench"]
    scored = ["--tasks", "perplexity", "--text", f"prose={text}", "--ctx", "64"]
    assert main([*argv, *scored]) == 8
    assert "nan.gguf: is numerically broken" in capsys.readouterr().err
