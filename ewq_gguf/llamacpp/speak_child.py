"""Child process: load a GGUF and let it do what its family can; print one JSON line.

A decoder continues a prompt greedily, an encoder-decoder reads it and writes, an
encoder gives its embedding or score.

    python -m ewq_gguf.llamacpp.speak_child FILE PROMPT N_TOKENS

The last line of the log is llama.cpp's message.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ewq_gguf.checkpoint.gguf_file import read_gguf

_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_N_CTX = 256


def main(path: str, prompt: str, n_tokens: int) -> None:
    """Print `{"answer": ..., "is_finite": ...}` as the last line of stdout."""
    import llama_cpp

    errors: list[str] = []

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def note(level: int, text: bytes, _: object) -> None:
        if level == _ERROR:
            errors.append(text.decode(errors="replace").strip())
            sys.stderr.write(f"{errors[-1]}\n")

    llama_cpp.llama_log_set(note, ctypes.c_void_p(0))
    try:
        model = _load(path)
        if llama_cpp.llama_get_memory(model.ctx) is None or not _writes(model):
            model.close()
            answer, is_finite = _embed(_load(path, embedding=True), prompt)
        else:
            answer, is_finite = _write(model, prompt, n_tokens)
    except ValueError as error:  # what the bindings raise says less than llama.cpp
        sys.exit(errors[0] if errors else str(error))
    sys.stdout.write(f"\n{json.dumps({'answer': answer, 'is_finite': is_finite})}\n")


def _load(path: str, *, embedding: bool = False) -> Any:
    import llama_cpp

    pooling = llama_cpp.LLAMA_POOLING_TYPE_UNSPECIFIED
    if embedding and any(
        t.name.startswith("cls") for t in read_gguf(Path(path)).tensors
    ):
        pooling = (
            llama_cpp.LLAMA_POOLING_TYPE_RANK
        )  # the user of a reranker asks for it
    return llama_cpp.Llama(
        path,
        n_ctx=_N_CTX,
        n_batch=_N_CTX,
        n_ubatch=_N_CTX,
        n_gpu_layers=0,
        embedding=embedding,
        pooling_type=pooling,
        verbose=True,  # else the bindings close stderr while llama.cpp says why
    )


def _writes(model: Any) -> bool:
    import llama_cpp

    return bool(llama_cpp.llama_model_has_decoder(model.model))


def _write(model: Any, prompt: str, n_tokens: int) -> tuple[str, bool]:
    """The greedy continuation, or what a decoder makes of the encoded prompt."""
    import llama_cpp

    tokens = model.tokenize(prompt.encode(), add_bos=True)
    begin = tokens
    if llama_cpp.llama_model_has_encoder(model.model):
        _encode(model, tokens)
        start = llama_cpp.llama_model_decoder_start_token(model.model)
        begin = [start if start >= 0 else model.token_bos()]
    answer, is_finite = [], True
    model.eval(begin)
    for _ in range(n_tokens):
        pointer = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        logits = np.ctypeslib.as_array(pointer, (model.n_vocab(),))
        is_finite = is_finite and bool(np.isfinite(logits).all())
        token = int(np.argmax(logits))
        if token == model.token_eos():
            break
        answer.append(token)
        model.eval([token])
    text = model.detokenize(answer, prev_tokens=begin).decode(errors="replace")
    return text, is_finite


def _embed(model: Any, prompt: str) -> tuple[str, bool]:
    """The output of an encoder for the prompt: an embedding, or a score of a pair."""
    import llama_cpp

    tokens = model.tokenize(prompt.encode(), add_bos=True)
    _encode(model, tokens)
    size = llama_cpp.llama_model_n_embd_out(model.model)
    pooling = llama_cpp.llama_pooling_type(model.ctx)
    if pooling == llama_cpp.LLAMA_POOLING_TYPE_NONE:
        pointer = llama_cpp.llama_get_embeddings_ith(model.ctx, -1)
    else:
        pointer = llama_cpp.llama_get_embeddings_seq(model.ctx, 0)
    what = "embedding"
    if pooling == llama_cpp.LLAMA_POOLING_TYPE_RANK:
        size, what = llama_cpp.llama_model_n_cls_out(model.model), "score"
    if not pointer:
        raise ValueError("llama.cpp gives no embedding")
    values: NDArray[np.float32] = np.ctypeslib.as_array(pointer, (size,))
    return f" -> {what} of {size} number{'s'[: size > 1]}", bool(
        np.isfinite(values).all()
    )


def _encode(model: Any, tokens: list[int]) -> None:
    import llama_cpp

    array = (llama_cpp.llama_token * len(tokens))(*tokens)
    batch = llama_cpp.llama_batch_get_one(array, len(tokens))
    code = llama_cpp.llama_encode(model.ctx, batch)
    if code != 0:
        raise ValueError(f"llama_encode returned {code}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
