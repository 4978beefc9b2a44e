"""The expressions by which llama.cpp's pre-tokenizers cut a text, from its source.

Several names may read a short text alike; then the one whose expressions look most like
those of the checkpoint's tokenizer.json comes first. llama.cpp writes many of them in
another way and keeps the original in a comment, which counts as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from ewq_gguf.strict_json import parse_json

_NAMED = re.compile(
    r'((?:tokenizer_pre == "[^"]+"[\s|]*)+)\)\s*\{\s*'
    r"pre_type = LLAMA_VOCAB_PRE_TYPE_(\w+)"
)
_NAME = re.compile(r'tokenizer_pre == "([^"]+)"')
_CASES = re.compile(
    r"((?:case LLAMA_VOCAB_PRE_TYPE_\w+:\s*)+)(?://[^\n]*\s*)*"
    r"regex_exprs = \{(.*?)\n\s*\};",
    re.DOTALL,
)
_CASE = re.compile(r"LLAMA_VOCAB_PRE_TYPE_(\w+)")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
#: What ByteLevel with `use_regex` cuts by: GPT-2's.
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGITS = {True: r"\p{N}", False: r"\p{N}+"}


def names_of(source: Path) -> dict[str, str]:
    """Each name llama.cpp takes, and which of its pre-tokenizers it stands for."""
    text = source.read_text(encoding="utf-8")
    return {
        name: kind
        for names, kind in _NAMED.findall(text)
        for name in _NAME.findall(names)
    }


def expressions(source: Path) -> dict[str, tuple[str, ...]]:
    """The expressions of each name; of those that cut by none, nothing."""
    text = source.read_text(encoding="utf-8")
    by_kind = {
        kind: tuple(s.replace(r"\\", "\\") for s in _STRING.findall(body))
        for cases, body in _CASES.findall(text)
        for kind in _CASE.findall(cases)
    }
    return {
        name: by_kind[kind]
        for name, kind in names_of(source).items()
        if kind in by_kind
    }


def own_expressions(tokenizer_json: Path) -> tuple[str, ...]:
    """The expressions of a checkpoint's tokenizer; none where it has no such file."""
    try:
        values = parse_json(tokenizer_json.read_bytes(), [])
    except (OSError, ValueError):
        return ()
    found = values.get("pre_tokenizer") if isinstance(values, dict) else None
    return tuple(_walk(found))


def likeness(own: Sequence[str], theirs: Sequence[str]) -> float:
    """How much a tokenizer's expressions look like a name's, 0 to 1.

    The mean over its own of the nearest among theirs.
    """
    if not own or not theirs:
        return 0.0
    return sum(
        max(SequenceMatcher(None, a, b, autojunk=False).ratio() for b in theirs)
        for a in own
    ) / len(own)


def _walk(part: Any) -> Iterator[str]:
    if isinstance(part, list):
        for each in part:
            yield from _walk(each)
    elif isinstance(part, dict):
        if part.get("type") == "ByteLevel" and part.get("use_regex", True):
            yield _GPT_2
        elif part.get("type") == "Digits":
            yield _DIGITS[bool(part.get("individual_digits"))]
        elif isinstance(part.get("Regex"), str):
            yield part["Regex"]
        else:
            for each in part.values():
                yield from _walk(each)
