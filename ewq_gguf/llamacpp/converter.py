"""llama.cpp's converter as a child: what it is told, and why it stops."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.errors import ChildError, InputError
from ewq_gguf.llamacpp.converter_words import converter_error, converter_warnings
from ewq_gguf.llamacpp.pre_child import VARIABLE as PRE_VARIABLE
from ewq_gguf.llamacpp.toolchain import Toolchain
from ewq_gguf.process import run
from ewq_gguf.records import ModelIdentity

#: The converter must not reach the network nor import from the working folder, which
#: may be the checkpoint's own.
_CHILD_ENV = {
    "PYTHONSAFEPATH": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}
_UNKNOWN_PRE = re.compile(r"chkhsh:\s+([0-9a-f]{64})")

#: What the converter writes: the model that reads text, the part that turns images or
#: sounds into its embeddings, or the heads that draft further tokens.
Content = Literal["text", "mmproj", "mtp"]


class UnknownPreTokenizerError(InputError):
    """The converter does not know how this tokenizer cuts a text.

    Attributes:
        hash: by which the converter knows pre-tokenizers.
    """

    hash: str = ""


def content_flags(checkpoint: Checkpoint, content: Content) -> list[str]:
    """The converter's options for what it is to write of a checkpoint."""
    return [f"--{content}"] if content != "text" else text_flags(checkpoint.identity)


def text_flags(model: ModelIdentity) -> list[str]:
    """The converter's options for the text model's file."""
    return ["--no-nextn"] if model.chosen.get("mtp") == "drop" else []


def run_converter(
    checkpoint: Checkpoint,
    toolchain: Toolchain,
    argv: Sequence[str | Path],
    log_path: Path,
    *,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> list[str]:
    """Run the converter, or a child that stops it before it writes data.

    Returns:
        The converter's warnings.

    Raises:
        UnknownPreTokenizerError: the tokenizer's cutting of a text is not known.
        InputError: it names what in the checkpoint it cannot read.
        ChildError: it failed otherwise.
    """
    values = _CHILD_ENV | toolchain.converter_env() | dict(env or {})
    if pre := checkpoint.identity.chosen.get("pre"):
        values[PRE_VARIABLE] = pre
    try:
        text = run(
            argv, stage="convert", log_path=log_path, env=values, on_line=on_line
        )
    except ChildError as error:
        if match := _UNKNOWN_PRE.search(error.output):
            unknown = UnknownPreTokenizerError(
                "convert",
                checkpoint.folder,
                "llama.cpp's converter does not know its pre-tokenizer, hash "
                f"{match[1]}",
                "name one with --pre",
            )
            unknown.hash = match[1]
            raise unknown from error
        raise converter_error(checkpoint, error) from error
    return converter_warnings(text)


def converter_architectures(
    toolchain: Toolchain, content: Content = "text"
) -> frozenset[str]:
    """The Hugging Face architectures of which the converter can write a content.

    Read from its source, because importing it imports torch.
    """
    table = "MMPROJ_MODEL_MAP" if content == "mmproj" else "TEXT_MODEL_MAP"
    path = toolchain.source_dir / "conversion" / "__init__.py"
    if not path.is_file():
        return frozenset()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and node.target.id == table
            and isinstance(node.value, ast.Dict)
        ):
            return frozenset(
                str(key.value)
                for key in node.value.keys
                if isinstance(key, ast.Constant)
            )
    return frozenset()
