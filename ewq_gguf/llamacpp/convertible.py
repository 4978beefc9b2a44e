"""Checks of a checkpoint before llama.cpp's converter starts."""

from __future__ import annotations

from importlib.util import find_spec

from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.errors import InputError, ToolError
from ewq_gguf.strict_json import read_json

_EMBEDDING = "model.embed_tokens.weight"


_TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "vocab.json", "vocab.txt", "tekken.json", "rwkv_vocab_v20230424.txt",
)  # fmt: skip


def check_is_local(checkpoint: Checkpoint) -> None:
    """Refuse to convert a checkpoint whose weights stay on a server.

    Raises:
        InputError: they do.
    """
    for shard in checkpoint.shards:
        if shard.remote is not None:
            raise InputError(
                "convert",
                shard.remote.url,
                "its weights are not on this machine",
                "download the checkpoint, or leave --stream away",
            )


def check_is_no_gguf(checkpoint: Checkpoint) -> None:
    """Refuse to convert what is a base GGUF already.

    Raises:
        InputError: it is.
    """
    if checkpoint.identity.is_gguf:
        raise InputError(
            "convert",
            checkpoint.folder,
            "is a base GGUF already",
            "give it to `ewq gguf` or `ewq quantize` as it is",
        )


def check_tokenizer(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that no GGUF can be made of, before the converter starts.

    Raises:
        InputError: there is no tokenizer file, one is not JSON, or its tokens are not
            the rows of the embedding.
    """
    names = checkpoint.small_files
    if not any(n in _TOKENIZERS or n.endswith(".tiktoken") for n in names):
        raise InputError(
            "convert",
            checkpoint.folder,
            f"has no tokenizer ({', '.join(_TOKENIZERS)})",
            "download the checkpoint's tokenizer files too",
        )
    for name in ("tokenizer_config.json", *_TOKENIZERS):
        if name in names and name.endswith(".json"):
            read_json(names[name], "convert", "download it again", repeated=[])
    _check_vocab(checkpoint)


def _check_vocab(checkpoint: Checkpoint) -> None:
    """Where the names are known, the embedding has a row for each token."""
    vocab = checkpoint.config.get("vocab_size")
    if not checkpoint.is_mapped_by_name or type(vocab) is not int:
        return
    for _, tensor in checkpoint.tensors:
        if tensor.name == _EMBEDDING and tensor.shape[:1] != (vocab,):
            raise InputError(
                "convert",
                checkpoint.folder / "config.json",
                f"vocab_size is {vocab}, {_EMBEDDING} has shape {tensor.shape}",
                "download config.json and the weights of one revision",
            )


def check_packages() -> None:
    """Refuse where the converter's own packages are missing.

    Raises:
        ToolError: naming them.
    """
    missing = [
        name
        for name in ("torch", "transformers", "sentencepiece")
        if find_spec(name) is None
    ]
    if missing:
        raise ToolError(
            "convert",
            None,
            f"the converter needs {', '.join(missing)}",
            "pip install 'ewq-gguf[convert]'",
        )
