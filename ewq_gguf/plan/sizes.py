"""How many bytes a GGUF file takes, from its header's facts.

    file = pad32(24 + key-values + tensor infos) + sum of pad32(tensor bytes)

Source: ggml docs/gguf.md; tests compare with files that llama-quantize wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from ewq_gguf.ggml_types import n_dims

ALIGNMENT = 32
_MAGIC_VERSION_COUNTS = 24


def padded(n_bytes: int) -> int:
    """Bytes rounded up to GGUF's alignment."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def tensor_info_bytes(name: str, shape: Sequence[int]) -> int:
    """Bytes of one entry of the tensor table, as ggml writes it."""
    return 8 + len(name.encode()) + 4 + 8 * n_dims(shape) + 4 + 8


def base_info_bytes(name: str, shape: Sequence[int]) -> int:
    """Bytes of one entry as the converter writes it: dimensions of 1 stay."""
    return tensor_info_bytes(name, shape) + 8 * (len(shape) - n_dims(shape))


def string_kv_bytes(pairs: Mapping[str, str]) -> int:
    """Bytes of key-value pairs whose values are strings."""
    return sum(
        8 + len(key.encode()) + 4 + 8 + len(value.encode())
        for key, value in pairs.items()
    )


def header_bytes(
    kv_bytes: int,
    tensors: Iterable[tuple[str, Sequence[int]]],
    info_bytes: Callable[[str, Sequence[int]], int] = tensor_info_bytes,
) -> int:
    """Bytes before the tensor data, padding included; tensors are (name, shape)."""
    infos = sum(info_bytes(name, shape) for name, shape in tensors)
    return padded(_MAGIC_VERSION_COUNTS + kv_bytes + infos)
