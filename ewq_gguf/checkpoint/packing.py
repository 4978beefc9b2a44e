"""How a checkpoint's weights are packed, as its config tells it.

compressed-tensors (integers and MXFP4), the MXFP4 of gpt-oss, GPTQ and AWQ all keep an
integer per weight and a scale per group of weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

#: Formats of compressed-tensors that hold integers or MXFP4 codes.
_INTEGER_FORMATS = frozenset(
    {"pack-quantized", "int-quantized", "naive-quantized", "mxfp4-pack-quantized"}
)
#: By method and the dtype of the integers, the endings of the tensors that a weight is
#: kept in, the integers first; those in brackets may be missing.
_ENDINGS: Mapping[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "compressed-tensors": (
        ("I32", (".weight_packed", ".weight_scale", ".weight_shape",
                 "(.weight_zero_point)", "(.weight_g_idx)")),
        ("I8", (".weight", ".weight_scale", "(.weight_zero_point)")),
        ("U8", (".weight_packed", ".weight_scale")),
    ),
    "mxfp4": (("any", ("_blocks", "_scales")),),
    "gptq": (("any", (".qweight", ".scales", ".qzeros", "(.g_idx)")),),
    "awq": (("any", (".qweight", ".scales", ".qzeros")),),
}  # fmt: skip

#: Endings of the scales of activations and caches, which no GGUF has: left out.
UNUSED = (
    ".input_scale", ".input_zero_point", ".output_scale", ".output_zero_point",
    ".k_scale", ".v_scale", ".q_scale", ".input_global_scale",
)  # fmt: skip


@dataclass(frozen=True)
class Packing:
    """How a checkpoint's weights are packed, from its config.

    Attributes:
        method: `compressed-tensors`, `mxfp4`, `gptq` or `awq`.
        bits: the numbers of bits that an integer may have.
        zero_is_less_one: whether GPTQ's zero points were written less 1.
        needs: endings of parts that every weight has, though other checkpoints of this
            method are without them.
    """

    method: str
    bits: tuple[int, ...]
    zero_is_less_one: bool = False
    needs: frozenset[str] = frozenset()

    def endings(self, dtype: str) -> Iterator[tuple[str, ...]]:
        """The parts that a weight may be kept in whose integers have this dtype.

        They are endings of names, the integers first; in brackets those of parts that
        may be missing.
        """
        for of_dtype, endings in _ENDINGS[self.method]:
            if of_dtype in (dtype, "any"):
                bare = (end.strip("()") for end in endings)
                yield tuple(
                    end if end in self.needs else given
                    for end, given in zip(bare, endings, strict=True)
                )

    def ending_of_part(self, name: str, dtype: str) -> str | None:
        """The ending of a tensor that can only be a packed weight's part, or None."""
        for of_dtype, (first, *others) in _ENDINGS[self.method]:
            if name.endswith(first) and of_dtype in (dtype, "any"):
                return first
            for ending in others:
                if name.endswith(ending.strip("()")):
                    return ending.strip("()")
        return None


def packing_of(quantised: object) -> Packing | None:
    """The packing that a config tells; None where it is none that is read here.

    Args:
        quantised: `quantization_config` of config.json.
    """
    if not isinstance(quantised, Mapping):
        return None
    method = str(quantised.get("quant_method", "")).replace("_", "-")
    if method == "compressed-tensors":
        return _compressed_tensors(quantised)
    if method == "mxfp4":
        return Packing(method, (4,))
    if method == "gptq":
        bits = quantised.get("bits")
        is_v1 = quantised.get("checkpoint_format", "gptq") == "gptq"
        needs = frozenset({".g_idx"} if quantised.get("desc_act") is True else ())
        return Packing(method, (bits,), is_v1, needs) if bits in (2, 4, 8) else None
    if method == "awq":
        is_gemm = str(quantised.get("version", "gemm")).lower() == "gemm"
        bits = quantised.get("bits", quantised.get("w_bit"))
        return Packing(method, (4,)) if is_gemm and bits == 4 else None
    return None


def _compressed_tensors(quantised: Mapping[str, Any]) -> Packing | None:
    groups = quantised.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        return None
    formats, bits = set(), set()
    needs = {".weight_zero_point", ".weight_g_idx"}
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            return None
        formats.add(group.get("format") or quantised.get("format"))
        bits.add(weights.get("num_bits"))
        if weights.get("symmetric") is not False:
            needs.discard(".weight_zero_point")
        if weights.get("actorder") not in ("group", True):
            needs.discard(".weight_g_idx")
    known = sorted(n for n in bits if type(n) is int and 1 < n <= 8)
    if len(known) < len(bits) or not formats <= _INTEGER_FORMATS:
        return None
    return Packing("compressed-tensors", tuple(known), needs=frozenset(needs))
