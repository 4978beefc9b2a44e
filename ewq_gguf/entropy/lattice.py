"""Weights that are quantised already: does a block type of ggml hold them exactly?

A block of these types is one scale d and a small integer q per weight, from the set
that the type allows: its weights are d q. A tensor is on a type's lattice if each of
its blocks has a d that the type can write and allowed integers so that d q, rounded to
the dtype of the tensor, is the weight itself. So a checkpoint that holds the rounded
products of integers and scales in 16 bits is on the lattice too; of a 32-bit one no
product is rounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ewq_gguf.entropy.block_scale import (
    F16_MAX,
    N_INTEGERS,
    OFFSET,
    Codes,
    Rule,
    fit_blocks,
)
from ewq_gguf.entropy.intervals import Floats, intervals
from ewq_gguf.ggml_types import IQ4_NL_VALUES, MXFP4_VALUES

#: Blocks that are tried before a whole piece is prepared: nearly all weights end here.
_N_FIRST = 4
#: An integer lattice within a window of 16, written as d q + m.
_WINDOW = 15


@dataclass(frozen=True)
class Lattice:
    """What a block of a type can hold.

    Attributes:
        block: weights per scale.
        integers: that are allowed, falling in magnitude.
        is_power: whether the scale is a power of two, else F16.
        window: by how much a block's integers may differ: less than they could where
            the type adds an offset m of its own.
    """

    block: int
    integers: tuple[int, ...]
    is_power: bool = False
    window: int = N_INTEGERS

    @property
    def has_offset(self) -> bool:
        """Whether m is added."""
        return self.window < N_INTEGERS

    @property
    def rule(self) -> Rule:
        """The same for the kernel."""
        allowed = np.zeros(N_INTEGERS, np.bool_)
        allowed[np.array(self.integers) + OFFSET] = True
        largest = np.array([q for q in self.integers if q], np.float64)
        return Rule(allowed, largest, self.is_power, self.window)


def _falling(integers: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted({*integers}, key=lambda q: (-abs(q), -q)))


#: By type, small to large. What fits a type of integers fits each larger one as well.
LATTICES: Mapping[str, Lattice] = {
    "TQ1_0": Lattice(256, _falling(range(-1, 2))),
    "TQ2_0": Lattice(256, _falling(range(-1, 2))),
    "MXFP4": Lattice(32, _falling(MXFP4_VALUES), is_power=True),
    "Q4_0": Lattice(32, _falling(range(-8, 8))),
    "IQ4_NL": Lattice(32, _falling(IQ4_NL_VALUES)),
    "Q4_1": Lattice(32, _falling(range(-15, 16)), window=_WINDOW),
    "Q5_0": Lattice(32, _falling(range(-16, 16))),
    "Q8_0": Lattice(32, _falling(range(-128, 128))),
}


@dataclass(frozen=True)
class Blocks:
    """Blocks as a type writes them: weight = scale x integer.

    Attributes:
        scales: (n,), exact in F16 or, for MXFP4, powers of two.
        integers: (n, block).
    """

    scales: Floats
    integers: Codes


def holding(
    types: Iterable[str], data: NDArray[np.generic], dtype: str
) -> tuple[str, ...]:
    """Those of some types that hold some weights exactly.

    Args:
        types: of `LATTICES`, all with blocks that divide the weights.
        data: (n,) as for `intervals`.
        dtype: as for `intervals`.
    """
    found = tuple(types)
    largest = max((LATTICES[name].block for name in found), default=1)
    for part in (data[: _N_FIRST * largest], data[_N_FIRST * largest :]):
        if not found or not part.size:
            break
        low, high = intervals(part, dtype)
        held: list[str] = []
        for name in found:
            is_known = any(_implies(smaller, name) for smaller in held)
            if is_known or fit(name, low, high) is not None:
                held.append(name)
        found = tuple(held)
    return found


@cache
def _implies(small: str, large: str) -> bool:
    """Whether what one type holds another does too, with the same scales."""
    one, two = LATTICES[small], LATTICES[large]
    span = max(one.integers) - min(one.integers)
    return (
        one.is_power == two.is_power
        and set(one.integers) <= set(two.integers)
        and one.block >= two.block
        and span <= two.window
    )


def fit(name: str, low: Floats, high: Floats) -> Blocks | None:
    """Weights as blocks of a type; None where a block is not on its lattice.

    Args:
        name: of `LATTICES`.
        low: (n,) from `intervals`, n a multiple of the block.
        high: likewise.
    """
    lattice = LATTICES[name]
    n_blocks = low.size // lattice.block
    blocks = Blocks(np.zeros(n_blocks), np.zeros((n_blocks, lattice.block), np.int8))
    n_fitted = fit_blocks(
        low.reshape(n_blocks, -1),
        high.reshape(n_blocks, -1),
        lattice.rule,
        blocks.scales,
        blocks.integers,
    )
    if n_fitted < n_blocks:
        return None
    return _with_offsets(blocks) if lattice.has_offset else blocks


def offsets(blocks: Blocks) -> NDArray[np.int64]:
    """By block, an integer m0 so that all are m0 to m0 + 15 and d m0 is exact in F16.

    Returns:
        (n,); 256 where a block has none.
    """
    first = blocks.integers.min(axis=1).astype(np.int64)
    span = blocks.integers.max(axis=1) - first
    result = np.full(first.size, N_INTEGERS)
    for step in range(_WINDOW + 1):  # the highest that is exact
        product = blocks.scales * (first - step)
        is_exact = (np.abs(product) <= F16_MAX) & (_in_f16(product) == product)
        is_new = (result == N_INTEGERS) & is_exact & (span + step <= _WINDOW)
        result = np.where(is_new, first - step, result)
    return result


def _with_offsets(blocks: Blocks) -> Blocks | None:
    """Blocks that all have an offset, some of them with both signs turned."""
    turn = np.where(offsets(blocks) == N_INTEGERS, -1, 1)
    turned = Blocks(
        blocks.scales * turn, blocks.integers * turn[:, None].astype(np.int8)
    )
    return None if (offsets(turned) == N_INTEGERS).any() else turned


def _in_f16(values: Floats) -> Floats:
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float64)
