"""Weights that are quantised already: does a block type of ggml hold them exactly?

A block of these types is one scale d and a small integer q per weight, from a set
allowed by the type: its weights are d q. A tensor is on a type's lattice if each of
its blocks has a d that the type can write and allowed integers so that d q, rounded to
the dtype of the tensor, is the weight itself. So a checkpoint that holds the rounded
products of integers and scales in 16 bits is on the lattice too; of a 32-bit one no
product is rounded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ewq_gguf.entropy.block_scale import (
    F16_MAX,
    OFFSET,
    Codes,
    Rule,
    fit_blocks,
)
from ewq_gguf.entropy.intervals import Floats, intervals
from ewq_gguf.ggml_types import N_INTEGERS, TYPES, Lattice, block_size

#: Blocks that are tried before a whole piece is prepared: nearly all weights end here.
_N_FIRST = 4
#: Largest offset m0 below a block's integers, in Q4_1's codes of 4 bits.
_WINDOW = 15


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
    """Keep the types that hold all of some weights exactly.

    Args:
        types: Candidates from `LATTICE_TYPES`, whose blocks divide the weights.
        data: (n,) weights as `intervals` takes them.
        dtype: Their dtype in the checkpoint.
    """
    remaining = tuple(types)
    n_first = _N_FIRST * max(map(block_size, remaining), default=1)
    for part in (data[:n_first], data[n_first:]):
        if not remaining or not part.size:
            break
        low, high = intervals(part, dtype)
        held: list[str] = []
        for name in remaining:
            is_implied = any(_implies(smaller, name) for smaller in held)
            if is_implied or fit(name, low, high) is not None:
                held.append(name)
        remaining = tuple(held)
    return remaining


def _lattice(name: str) -> Lattice:
    lattice = TYPES[name].lattice
    assert lattice is not None
    return lattice


def _rule(lattice: Lattice) -> Rule:
    """The lattice as arrays, for the kernel."""
    allowed = np.zeros(N_INTEGERS, np.bool_)
    allowed[np.array(lattice.integers) + OFFSET] = True
    largest = np.array([q for q in lattice.integers if q], np.float64)
    return Rule(allowed, largest, lattice.is_power, lattice.window)


@cache
def _implies(small: str, large: str) -> bool:
    """Whether what one type holds another does too, with the same scales."""
    first, second = _lattice(small), _lattice(large)
    span = max(first.integers) - min(first.integers)
    return (
        first.is_power == second.is_power
        and set(first.integers) <= set(second.integers)
        and block_size(small) >= block_size(large)
        and span <= second.window
    )


def fit(name: str, low: Floats, high: Floats) -> Blocks | None:
    """Weights as blocks of a type; None where a block is not on its lattice.

    Args:
        name: A type from `LATTICE_TYPES`.
        low: (n,) lower ends from `intervals`, n a multiple of the block.
        high: (n,) upper ends.
    """
    lattice, size = _lattice(name), block_size(name)
    n_blocks = low.size // size
    blocks = Blocks(np.zeros(n_blocks), np.zeros((n_blocks, size), np.int8))
    n_fitted = fit_blocks(
        low.reshape(n_blocks, -1),
        high.reshape(n_blocks, -1),
        _rule(lattice),
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
