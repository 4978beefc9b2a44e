"""Names for the way a byte-level BPE cuts a text before it merges bytes.

A GGUF names it (`tokenizer.ggml.pre`) and llama.cpp has code for each name. The
converter takes the name from a table of hashes; a tokenizer that is not in the table
needs one from the user. Which one fits is measured: llama.cpp reads the converter's
test text under each name, and its tokens are compared with the checkpoint's own.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ewq_gguf import store
from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.errors import UsageError
from ewq_gguf.llamacpp.convert import base_type, header_of
from ewq_gguf.llamacpp.logs import child_log
from ewq_gguf.llamacpp.pre_regexes import (
    expressions,
    likeness,
    names_of,
    own_expressions,
)
from ewq_gguf.llamacpp.staging import stage_checkpoint
from ewq_gguf.llamacpp.toolchain import Toolchain
from ewq_gguf.process import python_argv, run
from ewq_gguf.tensor_names import nearest_name

_TABLE = "get_vocab_base_pre"


@dataclass(frozen=True)
class Fit:
    """How well a name fits a tokenizer.

    Attributes:
        name: The name that llama.cpp has for the pre-tokenizer.
        n_same: tokens of the test text that are the checkpoint's own, in order.
        n_tokens: The number of tokens in the longer of the two readings.
        likeness: Similarity of the expressions that cut the text, 0 to 1.
    """

    name: str
    n_same: int
    n_tokens: int
    likeness: float

    @property
    def rank(self) -> tuple[float, float]:
        """A sort key: the best first. Tokens count, then what the expressions say."""
        return (-self.n_same / self.n_tokens, -self.likeness)

    @property
    def text(self) -> str:
        """How many tokens agree, for people."""
        if self.n_same == self.n_tokens:
            return f"all {self.n_tokens} tokens of the converter's test text are equal"
        return (
            f"{self.n_same} of {self.n_tokens} tokens of the converter's test text are "
            "equal"
        )


def known_names(toolchain: Toolchain) -> frozenset[str]:
    """Every name that llama.cpp has code for; empty where its source is not there."""
    path = _vocab_source(toolchain)
    return frozenset(names_of(path)) if path.is_file() else frozenset()


def check_name(name: str, toolchain: Toolchain) -> None:
    """Refuse a name that llama.cpp would refuse when it loads the file.

    Raises:
        UsageError: it has no such pre-tokenizer.
    """
    names = known_names(toolchain)
    if names and name not in names:
        raise UsageError(
            "convert",
            f"--pre {name}",
            "llama.cpp has no pre-tokenizer of this name",
            f"the nearest name is {nearest_name(name, names)}",
        )


def fits(
    checkpoint: Checkpoint, toolchain: Toolchain, names: Sequence[str] = ()
) -> list[Fit]:
    """How well names fit a checkpoint's tokenizer, the best first.

    Args:
        checkpoint: whose tokenizer.
        toolchain: whose converter and libraries.
        names: to compare; none for every name of the converter's table.

    Raises:
        ChildError: the converter refuses the checkpoint whatever the name.
    """
    text, table = _test_text_and_names(toolchain)
    names = names or table
    chosen = {**checkpoint.identity.chosen, "pre": names[0]}
    identity = checkpoint.identity.model_copy(update={"chosen": chosen})
    named = replace(checkpoint, identity=identity)
    out = store.cache_dir("layouts") / f"{identity.fingerprint}-pre.json"
    with (
        header_of(named, toolchain, outtype=base_type(named)) as header,
        store.work_dir(out, stage="convert") as folder,
        child_log("pre", out) as log_path,
    ):
        staged = stage_checkpoint(named, folder)
        job, answer = folder / "job.json", folder / "answer.json"
        job.write_text(
            json.dumps(
                {
                    "gguf": str(header.path),
                    "tokenizer": str(staged),
                    "text": text,
                    "names": list(names),
                }
            )
        )
        run(
            python_argv("ewq_gguf.llamacpp.pre_fit_child", job, answer),
            stage="convert",
            log_path=log_path,
            env={"PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"},
        )
        found = json.loads(answer.read_text())
    source = _vocab_source(toolchain)
    theirs = expressions(source) if source.is_file() else {}
    own = own_expressions(checkpoint.folder / "tokenizer.json")
    ranked = [
        Fit(name, same, total, likeness(own, theirs.get(name, ())))
        for name, (same, total) in sorted(found.items())
    ]
    return sorted(ranked, key=lambda fit: fit.rank)


def _vocab_source(toolchain: Toolchain) -> Path:
    return toolchain.source_dir / "src" / "llama-vocab.cpp"


def _test_text_and_names(toolchain: Toolchain) -> tuple[str, list[str]]:
    """The converter's test text and its table's names, read from its source."""
    source = _table_source(toolchain.source_dir)
    text, names = "", set()
    for node in ast.walk(source):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            if node.targets[0].id == "chktxt":
                text = node.value.value
            elif node.targets[0].id == "res":
                names.add(node.value.value)
    return text, sorted(names)


def _table_source(source_dir: Path) -> ast.AST:
    """The converter's function that holds the table."""
    tree = ast.parse((source_dir / "conversion" / "base.py").read_text("utf-8"))
    return next(
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == _TABLE
    )
