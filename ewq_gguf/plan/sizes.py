"""How many bytes a GGUF file takes, from its header's facts.

    file = pad32(24 + key-values + tensor infos) + sum of pad32(tensor bytes)

Source: ggml docs/gguf.md; tests compare with files that llama-quantize wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

ALIGNMENT = 32
_MAGIC_VERSION_COUNTS = 24


def padded(n_bytes: int) -> int:
    """Bytes rounded up to GGUF's alignment."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def n_dims(shape: Sequence[int]) -> int:
    """Dimensions ggml counts: slowest ones of size 1 are dropped, one remains."""
    dims = len(shape)
    for size in shape[:-1]:
        if size != 1:
            break
        dims -= 1
    return dims


def tensor_info_bytes(name: str, shape: Sequence[int]) -> int:
    """Bytes of one entry of the tensor table."""
    return 8 + len(name.encode()) + 4 + 8 * n_dims(shape) + 4 + 8


def string_kv_bytes(pairs: Mapping[str, str]) -> int:
    """Bytes of key-value pairs whose values are strings."""
    return sum(
        8 + len(key.encode()) + 4 + 8 + len(value.encode())
        for key, value in pairs.items()
    )


def header_bytes(kv_bytes: int, tensors: Iterable[tuple[str, Sequence[int]]]) -> int:
    """Bytes before the tensor data, padding included; tensors are (name, shape)."""
    infos = sum(tensor_info_bytes(name, shape) for name, shape in tensors)
    return padded(_MAGIC_VERSION_COUNTS + kv_bytes + infos)
