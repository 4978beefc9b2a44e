"""Small words that several views share."""

from __future__ import annotations

from ewq_gguf import ggml_types


def size_text(n_bytes: int) -> str:
    """Bytes as people compare them: `316.2 MB`."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.2f} {unit}"
    return f"{n_bytes} B"


def type_style(ggml_type: str) -> str:
    """A colour for a type: the fewer bits, the warmer."""
    bits = ggml_types.bits_per_weight(ggml_type)
    for limit, style in (
        (2.7, "red"),
        (3.6, "dark_orange"),
        (4.8, "yellow"),
        (6.0, "green"),
        (9.0, "cyan"),
        (16.0, "blue"),
    ):
        if bits <= limit:
            return style
    return "magenta"
