"""How far every type moves every tensor: measured once per base, kept in the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

from ewq_gguf import store
from ewq_gguf.bench.files import identify
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.ggml_types import FLOAT_TYPES
from ewq_gguf.libraries import LLAMA_CPP_COMMIT
from ewq_gguf.llamacpp.ggml import Ggml
from ewq_gguf.llamacpp.imatrix import importance_values
from ewq_gguf.llamacpp.quant_error import quant_errors
from ewq_gguf.records import open_journal, read_journal
from ewq_gguf.records.quant_error import QuantError
from ewq_gguf.stages.options import SILENT, Options, Progress

STAGE = "plan"
#: Weights that are tried, at most; but 2 % of a large model's.
_MAX_SAMPLED = 40_000_000
_LEAST_SHARE = 0.02


def error_table(
    base: Path,
    menus: Mapping[str, Sequence[str]],
    lib_dir: Path,
    *,
    options: Options | None = None,
    progress: Progress = SILENT,
) -> dict[str, dict[str, QuantError]]:
    """What each tensor loses in each type of its menu.

    A run that was killed goes on where it was; another menu adds what it lacks.

    Args:
        base: the base GGUF.
        menus: types by tensor; float types lose nothing worth counting.
        lib_dir: holds ggml's quantisers.
        options: for the whole run; its matrix weighs columns.
        progress: who is told.

    Raises:
        InputError: the base or the matrix cannot be read.
    """
    options = options or Options()
    tensors = {t.name: t for t in read_gguf(base).tensors if t.name in menus}
    n_weights = sum(prod(tensor.shape) for tensor in tensors.values())
    share = min(max(_MAX_SAMPLED / n_weights, _LEAST_SHARE), 1.0)
    matrix = options.imatrix
    weighed = store.sha256_file(matrix) if matrix else None
    made_by = f"{identify(base).sha256} {weighed} {LLAMA_CPP_COMMIT} {share}"
    journal = store.cache_dir("errors") / f"{store.sha256_text(made_by)}.journal"
    wanted = {
        name: [ggml_type for ggml_type in menu if ggml_type not in FLOAT_TYPES]
        for name, menu in menus.items()
    }
    with store.locked(journal, stage=STAGE, wait=True):
        known = read_journal(journal, QuantError)
        todo = [
            (
                tensors[name],
                [ggml_type for ggml_type in menu if f"{name} {ggml_type}" not in known],
            )
            for name, menu in wanted.items()
        ]
        n_todo = sum(len(menu) for _, menu in todo)
        if n_todo:
            with (
                progress.stage(f"errors of {n_todo} types") as tell,
                open_journal(journal) as keep,
            ):
                found = quant_errors(
                    base,
                    [one for one in todo if one[1]],
                    Ggml(lib_dir),
                    share=share,
                    importance=importance_values(matrix) if matrix else None,
                    n_threads=options.n_threads,
                )
                for i, error in enumerate(found):
                    keep(error)
                    known[error.name] = error
                    tell((i + 1) / n_todo)
    return {
        name: {
            ggml_type: known[f"{name} {ggml_type}"]
            if ggml_type in wanted[name]
            else _nothing(name, ggml_type)
            for ggml_type in menu
        }
        for name, menu in menus.items()
    }


def _nothing(name: str, ggml_type: str) -> QuantError:
    """What a float type loses: nothing worth counting."""
    return QuantError(
        name=f"{name} {ggml_type}",
        error=0.0,
        error_stderr=0.0,
        plain_error=0.0,
        n_rows=0,
    )
