"""Whether the converter can write a model and its heads for further tokens apart."""

from __future__ import annotations

from ewq_gguf import store
from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.llamacpp.converter import run_converter
from ewq_gguf.llamacpp.convertible import check_packages
from ewq_gguf.llamacpp.logs import child_log
from ewq_gguf.llamacpp.staging import stage_checkpoint
from ewq_gguf.llamacpp.toolchain import Toolchain
from ewq_gguf.process import python_argv


def can_leave_heads_out(checkpoint: Checkpoint, toolchain: Toolchain) -> bool:
    """Whether the converter can write this model without its heads, or them alone.

    Raises:
        ToolError: the converter's own packages are missing.
        InputError, ChildError: it does not know the model.
    """
    check_packages()
    config_sha256 = checkpoint.identity.files_sha256.get("config.json")
    key = store.cache_key(config_sha256, toolchain.key)[:32]
    known = store.cache_dir("layouts") / f"mtp-{key}.txt"
    if not known.exists():
        with (
            store.work_dir(known, stage="convert") as folder,
            child_log("convert", known) as log_path,
        ):
            staged, answer = stage_checkpoint(checkpoint, folder), folder / "answer"
            argv = python_argv("ewq_gguf.llamacpp.mtp_child", staged, answer)
            run_converter(checkpoint, toolchain, argv, log_path)
            text = answer.read_text()
        store.write_text(known, text, stage="convert", force=True)
    return known.read_text() == "true"
