"""ggml's tensor types: sizes, and what llama-quantize writes where a type does not fit.

Sizes come from `gguf.constants`; a test compares the fallback with the real
llama-quantize. A type is named as ggml names it, in upper case: `Q4_K`, `BF16`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod

#: Types a plan may ask for. The rest of ggml's are for activations or integers.
PLANNABLE = (
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1",
    "Q4_0", "IQ4_NL", "IQ4_XS", "MXFP4", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S",
    "IQ2_XS", "IQ2_XXS", "TQ2_0", "TQ1_0", "IQ1_M", "IQ1_S",
)  # fmt: skip

#: Types that llama-quantize copies or converts without quantising.
FLOAT_TYPES = frozenset({"F32", "F16", "BF16"})

#: Types llama-quantize refuses without an importance matrix
#: (src/llama-quant.cpp, tensor_requires_imatrix).
IMATRIX_TYPES = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"})

#: The weights of a 4-bit code, before their scale (ggml/src/ggml-common.h:
#: kvalues_iq4nl, kvalues_mxfp4).
IQ4_NL_VALUES = (
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
)  # fmt: skip
MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)

# src/llama-quant.cpp, tensor_type_fallback: 256-wide type -> 32-wide type.
_FALLBACK = {
    "IQ1_S": "IQ4_NL", "IQ1_M": "IQ4_NL", "IQ2_XXS": "IQ4_NL", "IQ2_XS": "IQ4_NL",
    "IQ2_S": "IQ4_NL", "IQ3_XXS": "IQ4_NL", "IQ3_S": "IQ4_NL", "IQ4_XS": "IQ4_NL",
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0",
    "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip


def base_type(dtype: str) -> str:
    """The ggml type of the base GGUF for a checkpoint's dtype; FP8 becomes BF16."""
    return {"F16": "F16", "F32": "F32", "F64": "F32"}.get(dtype, "BF16")


@cache
def _sizes() -> dict[str, tuple[int, int]]:
    from gguf.constants import GGML_QUANT_SIZES

    return {kind.name: size for kind, size in GGML_QUANT_SIZES.items()}


@cache
def _numbers() -> dict[int, str]:
    from gguf.constants import GGMLQuantizationType

    return {int(kind): kind.name for kind in GGMLQuantizationType}


def type_name(number: int) -> str | None:
    """The name of ggml's type number, or None where there is none."""
    return _numbers().get(number)


def type_number(ggml_type: str) -> int:
    """The number ggml has for a type.

    Raises:
        KeyError: there is no such type.
    """
    return {name: number for number, name in _numbers().items()}[ggml_type]


def n_dims(shape: Sequence[int]) -> int:
    """Dimensions ggml counts: slowest ones of size 1 are dropped, one remains."""
    dims = len(shape)
    for size in shape[:-1]:
        if size != 1:
            break
        dims -= 1
    return dims


def block_size(ggml_type: str) -> int:
    """Weights per quantisation block: 256 for Q4_K, 32 for Q8_0, 1 for BF16."""
    return _sizes()[ggml_type][0]


def row_bytes(ggml_type: str, n_columns: int) -> int:
    """Bytes of one row.

    Raises:
        ValueError: the row is not a whole number of blocks.
    """
    block, size = _sizes()[ggml_type]
    if n_columns % block:
        raise ValueError(
            f"row length {n_columns} is not a multiple of {ggml_type}'s {block}"
        )
    return n_columns // block * size


def tensor_bytes(ggml_type: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor's data, without padding; the row is the shape's last."""
    return row_bytes(ggml_type, shape[-1]) * prod(shape[:-1])


def bits_per_weight(ggml_type: str) -> float:
    """Bits per weight of a type: 4.5 for Q4_K (144 bytes / 256 weights)."""
    block, size = _sizes()[ggml_type]
    return 8 * size / block


def written_type(ggml_type: str, n_columns: int) -> str:
    """What llama-quantize writes when asked for a type on rows of this length.

    Source: llama.cpp src/llama-quant.cpp, tensor_type_fallback.
    """
    block, _ = _sizes()[ggml_type]
    if n_columns % block == 0:
        return ggml_type
    fallback = _FALLBACK.get(ggml_type, ggml_type)
    return fallback if n_columns % _sizes()[fallback][0] == 0 else "F16"
