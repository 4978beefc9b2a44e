"""ggml's tensor types: one table of all that is known about each, and its arithmetic.

A type is named as ggml names it, in upper case: `Q4_K`, `BF16`. A new type is a new
row of the table. Tests compare every column with gguf-py, the built ggml libraries and
llama-quantize.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

#: Weights of 4-bit codes, before their scale (ggml/src/ggml-common.h: kvalues_iq4nl,
#: kvalues_mxfp4).
IQ4_NL_VALUES = (
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
)  # fmt: skip
MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)

#: Integers that a lattice may use: -128 to 127.
N_INTEGERS = 256


@dataclass(frozen=True)
class Lattice:
    """The weights that one block of a type can hold: a scale times small integers.

    Attributes:
        integers: The allowed ones, falling in magnitude.
        is_power: Whether the scale is a power of two; else it is an F16.
        window: Largest difference between two integers of a block. A type whose window
            is smaller than its range of integers adds an offset of its own.
    """

    integers: tuple[int, ...]
    is_power: bool = False
    window: int = N_INTEGERS

    @property
    def has_offset(self) -> bool:
        """Whether a block has an offset beside its scale."""
        return self.window < N_INTEGERS


@dataclass(frozen=True)
class GgmlType:
    """One row of the table.

    Attributes:
        name: ggml's name.
        number: ggml's number, as in GGUF files.
        block_size: Weights per quantisation block.
        block_bytes: Bytes per block.
        ftype: llama-quantize's name of a file whose main type this is; None for
            types that cannot be planned.
        fallback: Type that llama-quantize writes where rows are no whole number of
            blocks; None where that is F16 (src/llama-quant.cpp, tensor_type_fallback).
        dot_type: Type that the CPU rounds activations to before it multiplies them with
            weights of this type (ggml-cpu.c, vec_dot_type); None without a kernel.
        needs_imatrix: Whether llama-quantize refuses the type without an importance
            matrix (src/llama-quant.cpp, tensor_requires_imatrix).
        is_slow: Whether its quantiser searches a grid, ten times slower than others.
        lattice: The weights that it holds exactly; None where no checkpoint is checked
            for them.
    """

    name: str
    number: int
    block_size: int
    block_bytes: int
    ftype: str | None = None
    fallback: str | None = None
    dot_type: str | None = None
    needs_imatrix: bool = False
    is_slow: bool = False
    lattice: Lattice | None = None

    @property
    def bits(self) -> float:
        """Bits per weight: 4.5 for Q4_K (144 bytes / 256 weights)."""
        return 8 * self.block_bytes / self.block_size

    @property
    def is_float(self) -> bool:
        """Whether llama-quantize converts to it without quantising."""
        return self.ftype is not None and self.block_size == 1

    @property
    def is_ternary(self) -> bool:
        """Whether its weights are -1, 0 and 1 times a scale."""
        return self.lattice is not None and set(self.lattice.integers) == {-1, 0, 1}


def _lattice(
    integers: Iterable[int], *, is_power: bool = False, window: int = N_INTEGERS
) -> Lattice:
    falling = sorted({*integers}, key=lambda q: (-abs(q), -q))
    return Lattice(tuple(falling), is_power, window)


def _of_32(
    name: str,
    number: int,
    n_bytes: int,
    lattice: Lattice | None = None,
    *,
    dot_type: str = "Q8_0",
    ftype: str | None = None,
) -> GgmlType:
    """A type with blocks of 32 weights; there is no fallback for it but F16."""
    return GgmlType(
        name, number, 32, n_bytes, ftype or name, dot_type=dot_type, lattice=lattice
    )


def _of_256(
    name: str,
    number: int,
    n_bytes: int,
    fallback: str,
    ftype: str | None = None,
    lattice: Lattice | None = None,
) -> GgmlType:
    """A type with blocks of 256 weights, which CPUs multiply with Q8_K."""
    return GgmlType(
        name, number, 256, n_bytes, ftype or name, fallback, "Q8_K", lattice=lattice
    )


def _grid(
    name: str, number: int, n_bytes: int, *, needs_imatrix: bool = True
) -> GgmlType:
    """A type whose quantiser searches a grid."""
    return replace(
        _of_256(name, number, n_bytes, "IQ4_NL"),
        needs_imatrix=needs_imatrix,
        is_slow=True,
    )


_TERNARY = _lattice(range(-1, 2))

# First those that can be planned, from large to small: saved plans of policy `optimal`
# have its types in this order.
_ROWS = (
    GgmlType("F32", 0, 1, 4, "F32", dot_type="F32"),
    GgmlType("F16", 1, 1, 2, "F16", dot_type="F16"),
    GgmlType("BF16", 30, 1, 2, "BF16", dot_type="BF16"),
    _of_32("Q8_0", 8, 34, _lattice(range(-128, 128))),
    _of_256("Q6_K", 14, 210, "Q8_0"),
    _of_256("Q5_K", 13, 176, "Q5_1", "Q5_K_M"),
    _of_32("Q5_1", 7, 24, dot_type="Q8_1"),
    _of_32("Q5_0", 6, 22, _lattice(range(-16, 16))),
    _of_256("Q4_K", 12, 144, "Q5_0", "Q4_K_M"),
    _of_32("Q4_1", 3, 20, _lattice(range(-15, 16), window=15), dot_type="Q8_1"),
    _of_32("Q4_0", 2, 18, _lattice(range(-8, 8))),
    _of_32("IQ4_NL", 20, 18, _lattice(IQ4_NL_VALUES)),
    _of_256("IQ4_XS", 23, 136, "IQ4_NL"),
    _of_32("MXFP4", 39, 17, _lattice(MXFP4_VALUES, is_power=True), ftype="MXFP4_MOE"),
    _of_256("Q3_K", 11, 110, "Q4_0", "Q3_K_M"),
    _grid("IQ3_S", 21, 110, needs_imatrix=False),
    _grid("IQ3_XXS", 18, 98),
    _of_256("Q2_K", 10, 84, "Q4_0"),
    _grid("IQ2_S", 22, 82),
    _grid("IQ2_XS", 17, 74),
    _grid("IQ2_XXS", 16, 66),
    _of_256("TQ2_0", 35, 66, "Q4_0", lattice=_TERNARY),
    _grid("IQ1_M", 29, 56),
    _of_256("TQ1_0", 34, 54, "Q4_0", lattice=_TERNARY),
    _grid("IQ1_S", 19, 50),
    # Files may have these; none can be planned.
    GgmlType("NVFP4", 40, 64, 36, dot_type="Q8_0"),
    GgmlType("Q1_0", 41, 128, 18, dot_type="Q8_0"),
    GgmlType("Q8_1", 9, 32, 40),
    GgmlType("Q8_K", 15, 256, 292),
    GgmlType("I8", 24, 1, 1),
    GgmlType("I16", 25, 1, 2),
    GgmlType("I32", 26, 1, 4),
    GgmlType("I64", 27, 1, 8),
    GgmlType("F64", 28, 1, 8),
)

#: Every type of ggml, by name.
TYPES = {row.name: row for row in _ROWS}
_BY_NUMBER = {row.number: row.name for row in _ROWS}

#: Types that a plan may ask for, large to small.
PLANNABLE = tuple(row.name for row in _ROWS if row.ftype)
#: Types that llama-quantize copies or converts without quantising.
FLOAT_TYPES = frozenset(row.name for row in _ROWS if row.is_float)
#: Plannable types that llama-quantize quantises to, large to small.
QUANTISED_TYPES = tuple(name for name in PLANNABLE if name not in FLOAT_TYPES)
#: Types that llama-quantize refuses without an importance matrix.
IMATRIX_TYPES = frozenset(row.name for row in _ROWS if row.needs_imatrix)
#: Types whose lattices checkpoints are checked for, small to large.
LATTICE_TYPES = tuple(
    row.name for row in sorted(_ROWS, key=lambda row: row.bits) if row.lattice
)
#: Types of weights that were trained to be ternary.
TERNARY_TYPES = frozenset(row.name for row in _ROWS if row.is_ternary)


def type_of_dtype(dtype: str) -> str:
    """The ggml type of the base GGUF for a checkpoint's dtype; FP8 becomes BF16."""
    return {"F16": "F16", "F32": "F32", "F64": "F32"}.get(dtype, "BF16")


def type_name(number: int) -> str | None:
    """The name of ggml's type number, or None where there is none."""
    return _BY_NUMBER.get(number)


def type_number(ggml_type: str) -> int:
    """Ggml's number of a type.

    Raises:
        KeyError: There is no such type.
    """
    return TYPES[ggml_type].number


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
    return TYPES[ggml_type].block_size


def row_bytes(ggml_type: str, n_columns: int) -> int:
    """Bytes of one row.

    Raises:
        ValueError: The row is not a whole number of blocks.
    """
    row = TYPES[ggml_type]
    if n_columns % row.block_size:
        raise ValueError(
            f"row length {n_columns} is not a multiple of {ggml_type}'s "
            f"{row.block_size}"
        )
    return n_columns // row.block_size * row.block_bytes


def tensor_bytes(ggml_type: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor's data, without padding; the row is the shape's last."""
    return row_bytes(ggml_type, shape[-1]) * prod(shape[:-1])


def bits_per_weight(ggml_type: str) -> float:
    """Bits per weight of a type: 4.5 for Q4_K (144 bytes / 256 weights)."""
    return TYPES[ggml_type].bits


def written_type(ggml_type: str, n_columns: int) -> str:
    """The type that llama-quantize writes when asked for one on rows of this length.

    Source: llama.cpp src/llama-quant.cpp, tensor_type_fallback.
    """
    row = TYPES[ggml_type]
    if n_columns % row.block_size == 0:
        return ggml_type
    fallback = row.fallback
    return fallback if fallback and n_columns % block_size(fallback) == 0 else "F16"


def activation_block(ggml_type: str) -> int:
    """Activations that a CPU rounds with one scale: 32 for Q4_0, 256 for Q4_K."""
    return block_size(TYPES[ggml_type].dot_type or ggml_type)


def finest_types() -> dict[int, str]:
    """The quantised type of most bits for every length of activation blocks."""
    return {activation_block(name): name for name in reversed(QUANTISED_TYPES)}
