"""A base's reference file: a GGUF with its output matrix and final hidden states.

The architecture is `ewq-reference`; the record stands in the key `ewq.reference`. Of
tensors there are `output.weight` as it is in the base, `output.bias` where it has one,
and for each text N:

    text.N.lengths  I32  (n_windows)         tokens of each window
    text.N.tokens   I32  (n_tokens)          of all windows, one after the other
    text.N.states   F32, F16 or BF16  (n_scored, n_embd)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import dequantize, quantize
from pydantic import ValidationError

from ewq_gguf import ggml_types, store
from ewq_gguf.bench.engines.scorer import STAGE, FloatArray
from ewq_gguf.bench.texts.windows import Window, Windows
from ewq_gguf.checkpoint.gguf_file import GgufFile, GgufTensor, read_gguf
from ewq_gguf.errors import InputError
from ewq_gguf.libraries import LLAMA_CPP_COMMIT
from ewq_gguf.records import BenchedFile, BenchParameters, Reference

ARCHITECTURE = "ewq-reference"
KEY = "ewq.reference"
OUTPUT, BIAS = "output.weight", "output.bias"
_ANEW = "make it anew with `ewq reference`"

#: Name, type and shape of a tensor.
Row = tuple[str, str, tuple[int, ...]]


@dataclass(frozen=True)
class ReferenceFile:
    """A reference that was read and checked.

    Attributes:
        path: the file.
        record: description in its header.
        tensors: by name.
    """

    path: Path
    record: Reference
    tensors: dict[str, GgufTensor]

    @property
    def n_embd(self) -> int:
        """Numbers of a hidden state."""
        return self.tensors[OUTPUT].shape[1]

    def array(self, name: str, dtype: type[np.generic]) -> np.ndarray:
        """All of a tensor's data, flat, in numbers of a type of as many bytes.

        Raises:
            InputError: the file became shorter.
        """
        tensor = self.tensors[name]
        count = tensor.size_bytes // np.dtype(dtype).itemsize
        found = np.fromfile(self.path, dtype, count, offset=tensor.offset)
        if len(found) < count:
            raise InputError(STAGE, self.path, "ended while it was read", _ANEW)
        return found

    def windows(self, number: int) -> Windows:
        """The tokens of a text.

        Raises:
            InputError: its lengths do not fit its tokens.
        """
        text = self.record.texts[number]
        lengths = self.array(f"text.{number}.lengths", np.int32).astype(np.int64)
        n_scored = int((lengths - text.first).sum())
        if (
            lengths.min() <= text.first
            or lengths.sum() != text.n_tokens
            or n_scored != text.n_scored
        ):
            problem = (
                f"the windows of {text.name} do not fit its {text.n_tokens} tokens"
            )
            raise InputError(STAGE, self.path, problem, _ANEW)
        tokens = self.array(f"text.{number}.tokens", np.int32)
        pieces = np.split(tokens, np.cumsum(lengths)[:-1])
        return Windows(tuple(Window(piece, text.first) for piece in pieces))


def is_reference(header: GgufFile) -> bool:
    """Whether a GGUF file holds a reference and no model."""
    return header.kv.get("general.architecture") == ARCHITECTURE


def read_reference(path: Path) -> ReferenceFile:
    """Read and check all of a reference but its data.

    Raises:
        VerificationError: it is not a sound GGUF file.
        InputError: it is not a reference, or its tensors are not what it says.
    """
    header = read_gguf(path)
    if not is_reference(header):
        problem = "is a GGUF file, and no reference"
        raise InputError(STAGE, path, problem, "give what `ewq reference` wrote")
    try:
        record = Reference.model_validate_json(str(header.kv.get(KEY, "")))
    except ValidationError as error:
        first = error.errors()[0]
        pointer = "/" + "/".join(str(part) for part in first["loc"])
        problem = f"key {KEY} at {pointer}: {first['msg']}"
        raise InputError(STAGE, path, problem, _ANEW) from error
    tensors = {tensor.name: tensor for tensor in header.tensors}
    output = tensors.get(OUTPUT)
    if output is None or len(output.shape) != 2 or not _is_weights(output.ggml_type):
        raise InputError(STAGE, path, f"has no {OUTPUT} of 2 dimensions", _ANEW)
    expected = table(record, output.ggml_type, output.shape, has_bias=BIAS in tensors)
    found = [(t.name, t.ggml_type, t.shape) for t in header.tensors]
    if found != expected:
        wrong = sorted(set(found) ^ set(expected))
        problem = (
            f"its tensors are not what it says: {wrong[0][0] if wrong else 'order'}"
        )
        raise InputError(STAGE, path, problem, _ANEW)
    return ReferenceFile(path, record, tensors)


def _is_weights(ggml_type: str) -> bool:
    return ggml_type in ggml_types.FLOAT_TYPES or ggml_types.block_size(ggml_type) > 1


def table(
    record: Reference,
    output_type: str,
    output_shape: tuple[int, ...],
    *,
    has_bias: bool,
) -> list[Row]:
    """All tensors, in the file's order."""
    n_vocab, n_embd = output_shape
    rows: list[Row] = [(OUTPUT, output_type, output_shape)]
    if has_bias:
        rows.append((BIAS, "F32", (n_vocab,)))
    for i, text in enumerate(record.texts):
        rows += [
            (f"text.{i}.lengths", "I32", (text.n_windows,)),
            (f"text.{i}.tokens", "I32", (text.n_tokens,)),
            (f"text.{i}.states", states_type(output_type), (text.n_scored, n_embd)),
        ]
    return rows


def states_type(output_type: str) -> str:
    """The type that hidden states are kept in.

    16 bits where llama.cpp's kernel rounds them to these before the product: nothing is
    lost then. Any other kernel gets them as they were.
    """
    return output_type if output_type in ("F16", "BF16") else "F32"


def pack(states: FloatArray, ggml_type: str) -> bytes:
    """Hidden states as they are kept."""
    return bytes(quantize(states, gguf.GGMLQuantizationType[ggml_type]).tobytes())


def unpack(data: bytes, ggml_type: str, n_embd: int) -> FloatArray:
    """Kept hidden states as numbers; (n, n_embd)."""
    raw_type = gguf.GGMLQuantizationType[ggml_type]
    raw = np.frombuffer(data, np.uint8).reshape(
        -1, ggml_types.row_bytes(ggml_type, n_embd)
    )
    return np.ascontiguousarray(dequantize(raw, raw_type), np.float32)


def write_header(path: Path, record: Reference, rows: Iterable[Row]) -> ReferenceFile:
    """Begin a file: everything but the tensors' data.

    Raises:
        ResourceError: the disk is full.
    """
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_string(KEY, record.to_json())
    needed = 0
    for name, ggml_type, shape in rows:
        size = ggml_types.tensor_bytes(ggml_type, shape)
        needed += size
        raw_type = gguf.GGMLQuantizationType[ggml_type]
        writer.add_tensor_info(
            name, shape, np.dtype(np.float32), size, raw_dtype=raw_type
        )
    store.check_free(path.parent, needed, STAGE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    tensors = {t.name: t for t in read_gguf(path, header_only=True).tensors}
    return ReferenceFile(path, record, tensors)


def check_asked(file: ReferenceFile, parameters: BenchParameters) -> None:
    """Refuse a reference that was made of something else than is asked.

    Raises:
        InputError: another text, context or cut; all that differ are named.
    """
    record = file.record
    wrong = []
    if record.n_ctx != parameters.n_ctx:
        wrong.append(
            f"its context has {record.n_ctx} tokens, {parameters.n_ctx} are asked"
        )
    if record.is_lines != parameters.is_lines:
        units = ("windows", "lines")
        own, other = units[record.is_lines], units[parameters.is_lines]
        wrong.append(f"its texts are cut into {own}, {other} are asked")
    if record.engine.commit != LLAMA_CPP_COMMIT:
        commits = (record.engine.commit[:9], LLAMA_CPP_COMMIT[:9])
        wrong.append("it was made by llama.cpp {}, this is {}".format(*commits))
    setups = (record.setup, parameters.setup)
    made, needed = (f"{setup.cache_type_k}/{setup.cache_type_v}" for setup in setups)
    if made != needed:
        wrong.append(f"its KV cache is of {made}, {needed} is asked")
    for text in parameters.texts:
        if text.sha256 not in {t.sha256 for t in record.texts}:
            names = ", ".join(t.name for t in record.texts)
            wrong.append(f"it has no text with the bytes of {text.name}, only {names}")
    if wrong:
        raise InputError(
            STAGE,
            file.path,
            "; ".join(wrong),
            "ask for what it was made of, or give the base GGUF",
        )


def is_made_of(
    record: Reference, model: BenchedFile, parameters: BenchParameters
) -> bool:
    """Whether a reference is what would be made of a model."""
    return (
        (record.model.sha256, record.setup) == (model.sha256, parameters.setup)
        and (record.n_ctx, record.n_chunks) == (parameters.n_ctx, parameters.n_chunks)
        and record.is_lines == parameters.is_lines
        and record.engine.commit == LLAMA_CPP_COMMIT
        and [(t.name, t.sha256) for t in record.texts]
        == [(t.name, t.sha256) for t in parameters.texts]
    )
