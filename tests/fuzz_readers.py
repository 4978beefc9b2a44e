"""Fuzzing of everything that reads a header, an index or a config.

    python tests/fuzz_readers.py --seconds 600
    python tests/fuzz_readers.py --target header FILE    once more with one input

Inputs start sound and are changed where it hurts: JSON values, names and lengths,
fields of the GGUF header, single bytes. Whatever comes of it, a reader returns a result
or raises an EwqError, soon and in little memory; a safetensors header that ours accepts
is one that the library accepts too, and both see the same tensors.

With atheris installed (`pip install atheris`) inputs that reach new code are kept and
changed further; without it the same changes are made at random.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from os import O_RDONLY, close
from os import open as open_fd
from pathlib import Path
from typing import Any

import safetensors

from ewq_gguf.checkpoint.folder import open_folder
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.checkpoint.header import DTYPE_BYTES, read_header
from ewq_gguf.checkpoint.mapping import map_tensors
from ewq_gguf.errors import EwqError

#: What one input may cost.
MAX_SECONDS = 2.0
MAX_MEMORY_BYTES = 256 << 20
MAX_INPUT_BYTES = 1 << 16

# Changes. A JSON object is a list of pairs here, so that keys can repeat.


class Pairs(list[Any]):
    """A JSON object: [key, value] lists."""


class Raw(str):
    """JSON text put in as it is."""


TOKENS = [
    "-0", "0", "1", "-1", "1.0", "0.1", "1e0", "1e400", "-1e400", "NaN", "Infinity",
    "9" * 30, "9" * 5000, "-" + "9" * 30, "true", "null", '""', '"\\ud800"',
    '"\\udfff\\ud800"', '"\\u0000"', '"a\\nb\\u001b[31m"', '"\\ud83d\\ude00"', "[]",
    "{}", "[[]]", '{"a":1,"a":1}', "[" * 3000, '{"a":' * 3000,
    "[" * 900 + "]" * 900, "[" * 3000 + "]" * 3000, '{"quant_method":"fp8"}', "",
    *map(str, (2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64)),
    *(f'"{name}"' for name in (*DTYPE_BYTES, "F4", "F8_E8M0", "C64", "f32", "fp8")),
    *(f'"{name}"' for name in ("../x.safetensors", "/x.safetensors", "é.safetensors")),
    *(f'"{name}"' for name in ("a.safetensors", "b.safetensors", "model.norm.weight")),
]  # fmt: skip
KEYS = ["", "a", "é", "\0", "\ud800", "__metadata__", "text_config", "model.norm.bias"]


def parse(data: bytes) -> Any:
    return json.loads(data, object_pairs_hook=lambda p: Pairs(map(list, p)))


def render(value: Any) -> str:
    if isinstance(value, Raw):
        return value
    if isinstance(value, Pairs):
        items = (f"{json.dumps(key)}:{render(item)}" for key, item in value)
        return "{" + ",".join(items) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(render, value)) + "]"
    return json.dumps(value)


def places(value: Any) -> Iterator[tuple[list[Any], int]]:
    """Every place a value is at, as a list and an index; an object's are its pairs."""
    if isinstance(value, Pairs):
        for pair in value:
            yield pair, 1
            yield from places(pair[1])
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield value, index
            yield from places(item)


def change_json(data: bytes, rng: random.Random) -> bytes:
    """Some values, names or pairs exchanged, dropped, doubled or made hostile."""
    try:
        root = [parse(data)]
        for _ in range(rng.choice((1, 1, 2, 4))):
            _change_place(root, rng)
        return render(root[0]).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError, IndexError):
        return change_bytes(data, rng)


def _change_place(root: list[Any], rng: random.Random) -> None:
    found = list(places(root))
    at, index = rng.choice(found)
    other, other_index = rng.choice(found)
    value = at[index]
    match rng.randrange(6):
        case 0 | 1:
            at[index] = Raw(rng.choice(TOKENS))
        case 2 if isinstance(value, int):
            at[index] = value + rng.choice((-1, 1, 8, -value, value))
        case 3 if isinstance(value, list) and value:
            item = rng.randrange(len(value))
            value[item : item + 1] = [value[item]] * rng.choice((0, 2))
        case 4 if isinstance(value, Pairs) and value:
            pair = rng.randrange(len(value))
            value[pair] = [rng.choice(KEYS), value[pair][1]]
        case _:
            # A copy: a value inside itself has no end.
            at[index] = Raw(render(other[other_index]))


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, put in, taken out or cut off."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(5):
            case 0 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(changed):
                changed[at] = rng.choice(b'\0\x01\x7f\x80\xff"\\{}[]:,- \n')
            case 2:
                changed[at:at] = rng.choice(TOKENS)[:64].encode()
            case 3:
                del changed[at : at + rng.choice((1, 2, 8))]
            case 4:
                del changed[at:]
    return bytes(changed)


def change_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The header changed, its length and its offsets put right or not."""
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    match rng.randrange(12):
        case 0:
            return change_bytes(data, rng)
        case 1:
            near = min(length + 1, 2**63)
            length = rng.choice((0, 1, near, 10**8, 10**8 + 1, 2**63, 2**64 - 1))
            return length.to_bytes(8, "little") + data[8:]
        case 2:
            header = change_bytes(header, rng)
        case 3 | 4:
            header = change_json(header, rng)
        case 5 | 6 | 7 | 8:
            header = change_tensors(header, rng)
        case _:
            header, body = _with_right_offsets(change_json(header, rng), body)
    return len(header).to_bytes(8, "little") + header + body


def change_tensors(header: bytes, rng: random.Random) -> bytes:
    """Sizes, offsets and entries exchanged; it stays the JSON of a header."""
    try:
        tree = parse(header)
        name, entry = rng.choice(tree)
        shape, offsets = (dict(entry)[key] for key in ("shape", "data_offsets"))
        numbers = rng.choice((shape, offsets)) or offsets
        at = rng.randrange(len(numbers))
        step = rng.choice((-4, -1, 1, 2, 4, 8))
        match rng.randrange(5):
            case 0:
                numbers[at] += step
            case 1:
                numbers[at] = Raw(rng.choice(TOKENS))
            case 2:
                offsets[:] = [offset + step for offset in offsets]
            case 3:
                tree.remove([name, entry])
            case _:
                tree.append([rng.choice(KEYS), entry])
        return render(tree).encode("utf-8", "surrogatepass")
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        return change_json(header, rng)


def _with_right_offsets(header: bytes, body: bytes) -> tuple[bytes, bytes]:
    """Offsets as dtypes and shapes ask for them, where they are any."""
    position = 0
    try:
        tree = parse(header)
        for _, entry in tree:
            fields = dict(entry)
            if "dtype" in fields and all(type(n) is int for n in fields["shape"]):
                size = DTYPE_BYTES[fields["dtype"]] * prod(fields["shape"])
                fields["data_offsets"] = [position, position + size]
                position += size
                entry[:] = [[key, value] for key, value in fields.items()]
        if 0 <= position < MAX_INPUT_BYTES:
            text = render(tree).encode("utf-8", "surrogatepass")
            return text, (body + bytes(position))[:position]
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        pass
    return header, body


NUMBERS = [0, 1, 2, 4, 8, 9, 31, 32, 100, 2**16, 2**20, 2**20 + 1, 2**31, 2**32 - 1]
HUGE = [2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1]
GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def gguf_fields(data: bytes) -> Iterator[tuple[int, int]]:
    """Where each number of a GGUF header lies, and its bytes, as far as it is sound."""
    at = 4

    def number(size: int) -> int:
        nonlocal at
        value = int.from_bytes(data[at : at + size], "little")
        found.append((at, size))
        at += size
        return value

    found: list[tuple[int, int]] = []
    number(4)
    n_tensors, n_kv = number(8), number(8)
    for _ in range(min(n_kv, 50)):
        at += min(number(8), len(data))
        kind = number(4)
        if kind == 9:
            kind, count = number(4), number(8)
            at += min(count * GGUF_SIZES.get(kind, 0), len(data))
            count = count if kind == 8 else 0
        else:
            count = 1
        for _ in range(min(count, 50)):
            n_bytes = number(GGUF_SIZES.get(kind, 8))
            at += min(n_bytes, len(data)) if kind == 8 else 0
    for _ in range(min(n_tensors, 50)):
        at += min(number(8), len(data))
        for size in (*[8] * min(number(4), 8), 4, 8):
            number(size)
    yield from ((at, size) for at, size in found if at + size <= len(data))


def change_gguf(data: bytes, rng: random.Random) -> bytes:
    """Numbers of the header exchanged for others; sometimes any bytes."""
    fields = list(gguf_fields(data))
    if not fields or rng.random() < 0.3:
        return change_bytes(data, rng)
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, size = rng.choice(fields)
        old = int.from_bytes(changed[at : at + size], "little")
        new = rng.choice((old + 1, old - 1, rng.choice(NUMBERS), rng.choice(HUGE)))
        changed[at : at + size] = (new % 2 ** (8 * size)).to_bytes(size, "little")
    return bytes(changed)


# Sound inputs.


def safetensors_file(tensors: dict[str, tuple[str, list[int]]], **more: Any) -> bytes:
    header: dict[str, Any] = dict(more)
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + DTYPE_BYTES[dtype] * prod(shape)
        offsets = [begin, end]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(i % 251 for i in range(end))


SHARDS = {
    "a.safetensors": {"model.embed_tokens.weight": ("BF16", [4, 2])},
    "b.safetensors": {"model.norm.weight": ("F32", [2]), "x": ("U8", [])},
}
WEIGHT_MAP = {tensor: file for file, tensors in SHARDS.items() for tensor in tensors}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "text_config": {"num_layers": 3},
    "vocab_size": 4,
    "tie_word_embeddings": True,
}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def gguf_string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def gguf_seed() -> bytes:
    """Two tensors, and values of every kind."""
    pairs = [("general.architecture", 8, gguf_string("llama"))]
    pairs += [(f"k{kind}", kind, bytes(size)) for kind, size in GGUF_SIZES.items()]
    pairs += [
        ("general.alignment", 4, struct.pack("<I", 32)),
        ("words", 9, struct.pack("<IQ", 8, 2) + gguf_string("a") + gguf_string("b")),
        ("numbers", 9, struct.pack("<IQ", 5, 3) + bytes(12)),
    ]
    data = b"GGUF" + struct.pack("<IQQ", 3, 2, len(pairs))
    for key, kind, value in pairs:
        data += gguf_string(key) + struct.pack("<I", kind) + value
    data += gguf_string("a") + struct.pack("<IQQIQ", 2, 32, 2, 8, 0)
    data += gguf_string("b") + struct.pack("<IQIQ", 1, 8, 0, 96)
    return data + bytes(-len(data) % 32) + bytes(128)


# What must hold.


def check_header(folder: Path, data: bytes) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(data)
    fd = open_fd(path, O_RDONLY)
    try:
        header = read_header(fd, path)
    finally:
        close(fd)
    # The library raises where it is stricter than we are: that is a finding.
    theirs = {
        name: (tensor["dtype"], list(tensor["shape"]), bytes(tensor["data"]))
        for name, tensor in safetensors.deserialize(data)
    }
    ours = {
        tensor.name: (tensor.dtype, list(tensor.shape), data[tensor.begin : tensor.end])
        for tensor in header.tensors
    }
    assert ours == theirs


def check_config(folder: Path, data: bytes) -> None:
    (folder / "config.json").write_bytes(data)
    path = folder / "model.safetensors"
    if not path.exists():
        path.write_bytes(safetensors_file(SHARDS["a.safetensors"]))
    _check_folder(folder)


def check_index(folder: Path, data: bytes) -> None:
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text(json.dumps(CONFIG))
        for name, tensors in SHARDS.items():
            (folder / name).write_bytes(safetensors_file(tensors))
    (folder / "model.safetensors.index.json").write_bytes(data)
    _check_folder(folder)


def _check_folder(folder: Path) -> None:
    checkpoint = open_folder(folder, name="fuzzed")
    assert all(note.isprintable() for note in checkpoint.notes)
    assert {shard.path.parent for shard in checkpoint.shards} <= {folder}
    assert checkpoint.identity.model_dump_json().isprintable()
    if checkpoint.is_mapped_by_name:
        map_tensors(checkpoint)


def check_gguf(folder: Path, data: bytes) -> None:
    path = folder / "x.gguf"
    path.write_bytes(data)
    found = read_gguf(path)
    ends = [tensor.offset + tensor.size_bytes for tensor in found.tensors]
    assert max(ends, default=0) <= found.file_bytes == len(data)


@dataclass(frozen=True)
class Target:
    """A reader that is fuzzed.

    Attributes:
        check: reads an input in a folder of its own; may raise EwqError alone.
        change: makes another input of one.
        seeds: sound inputs.
    """

    check: Callable[[Path, bytes], None]
    change: Callable[[bytes, random.Random], bytes]
    seeds: Sequence[bytes]

    def outcome(self, folder: Path, data: bytes) -> bool:
        """Whether an input is accepted.

        Raises:
            AssertionError: it was refused in the wrong way, or at too high a price.
            Exception: it was not refused but failed.
        """
        started = time.process_time()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        refusal = None
        try:
            self.check(folder, data)
        except EwqError as error:
            refusal = error
        seconds = time.process_time() - started
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        assert seconds < MAX_SECONDS, f"took {seconds:.1f} s"
        assert grown < MAX_MEMORY_BYTES, f"took {grown} bytes of memory"
        if refusal is not None:
            assert str(refusal).isprintable()
            assert refusal.exit_code in (3, 8)
        return refusal is None


def _json(*values: object) -> list[bytes]:
    return [json.dumps(value).encode() for value in values]


EVERY_DTYPE = {dtype: (dtype, [1, 2]) for dtype in DTYPE_BYTES}
TARGETS = {
    "header": Target(
        check_header,
        change_safetensors,
        [
            safetensors_file(EVERY_DTYPE),
            safetensors_file({"a": ("BF16", [0, 3]), "b": ("I8", [])}),
            safetensors_file(SHARDS["b.safetensors"], __metadata__={"format": "pt"}),
            safetensors_file({}),
        ],
    ),
    "index": Target(
        check_index,
        change_json,
        _json({"metadata": {"total_size": 25}, "weight_map": WEIGHT_MAP}),
    ),
    "config": Target(
        check_config,
        change_json,
        _json(CONFIG, CONFIG | {"quantization_config": FP8}),
    ),
    "gguf": Target(check_gguf, change_gguf, [gguf_seed()]),
}


def inputs(target: Target, rng: random.Random) -> Iterator[bytes]:
    """The seeds, then changes of them and of changes, without end."""
    yield from target.seeds
    pool = list(target.seeds)
    while True:
        start = rng.choice(target.seeds if rng.random() < 0.5 else pool)
        data = target.change(start, rng)[:MAX_INPUT_BYTES]
        yield data
        if rng.random() < 0.1:
            pool[len(target.seeds) :] = [*pool[len(target.seeds) :], data][-64:]


# The program.


@contextmanager
def fast_folder() -> Iterator[Path]:
    """A temporary folder, in memory where there is any."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        yield Path(name)


def fuzz(name: str, seconds: float, seed: int, save: Path) -> None:
    """Fuzz one target at random for a while; a failing input is saved.

    Raises:
        Exception: an input failed.
    """
    end = time.monotonic() + seconds
    n_inputs = n_accepted = 0
    with fast_folder() as folder:
        for data in inputs(TARGETS[name], random.Random(seed)):
            try:
                n_accepted += TARGETS[name].outcome(folder, data)
            except Exception:
                digest = hashlib.sha256(data).hexdigest()
                (save / f"{name}-{digest[:16]}").write_bytes(data)
                raise
            n_inputs += 1
            if time.monotonic() > end:
                break
    say(f"{n_inputs} inputs, {n_accepted} accepted, none failed")


def again(name: str, path: Path) -> None:
    """Read one saved input once more."""
    with fast_folder() as folder:
        accepted = TARGETS[name].outcome(folder, path.read_bytes())
    say("accepted" if accepted else "refused")


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def fuzz_all(names: Sequence[str], seconds: float, seed: int, save: Path) -> int:
    """Fuzz targets one after the other, each in a process of its own."""
    guided = importlib.util.find_spec("atheris") is not None
    module = "tests.fuzz_guided" if guided else "tests.fuzz_readers"
    save.mkdir(parents=True, exist_ok=True)
    say(f"seed {seed}, {'guided by coverage' if guided else 'at random'}")
    failed = []
    for name in names:
        say(f"{name}: {seconds / len(names):.0f} s")
        before = set(save.iterdir())
        child = subprocess.run(
            [sys.executable, "-m", module, "--target", name, "--seed", str(seed),
             "--seconds", str(seconds / len(names)), "--save", str(save), "--alone"],
            cwd=Path(__file__).parents[1],
        )  # fmt: skip
        if child.returncode:
            failed.append(name)
        for path in sorted(set(save.iterdir()) - before):
            say(f"again: python -m tests.fuzz_readers --target {name} {path}")
    say(f"failed: {', '.join(failed)}" if failed else "nothing failed")
    return len(failed)


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, nargs="?", help="read this input again")
    parser.add_argument("--target", choices=TARGETS)
    parser.add_argument("--seconds", type=float, default=600, help="of all targets")
    parser.add_argument("--seed", type=int, default=random.randrange(1, 2**31))
    parser.add_argument("--save", type=Path, default=Path("fuzz-findings").absolute())
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.file and not given.target:
        parser.error("a file needs its --target")
    given.save = given.save.absolute()
    return given


def main() -> int:
    given = options()
    if given.file:
        again(given.target, given.file)
        return 0
    if given.alone:
        fuzz(given.target, given.seconds, given.seed, given.save)
        return 0
    names = [given.target] if given.target else list(TARGETS)
    return fuzz_all(names, given.seconds, given.seed, given.save)


if __name__ == "__main__":
    sys.exit(main())
