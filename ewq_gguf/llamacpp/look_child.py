"""Child process: let llama.cpp use a file beside a text model; print one JSON line.

    python -m ewq_gguf.llamacpp.look_child mmproj TEXT_MODEL MMPROJ N_TOKENS
    python -m ewq_gguf.llamacpp.look_child mtp TEXT_MODEL HEADS N_TOKENS

An mmproj shows the text model a test image. Heads for further tokens are only loaded.

An mmproj without vision is given a second of sound. The library is llama.cpp's libmtmd,
from the folder that the environment names.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import numpy as np

_SIDE_PIXELS = 64
_QUESTION = "What is this? <__media__>"
_SPARE_TOKENS = 64


def main(content: str, text_model: str, path: str, n_tokens: int) -> None:
    """Print what was seen as the last line of stdout."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    if content == "mtp":
        _load(llama_cpp, path, with_heads=True)
        result: dict[str, Any] = {"is_finite": True}
    else:
        result = _look(_load(llama_cpp, text_model), path, n_tokens)
    sys.stdout.write(f"\n{json.dumps(result)}\n")


def _load(llama_cpp: Any, path: str, *, with_heads: bool = False) -> Any:
    """A model on the CPU.

    Raises:
        SystemExit: llama.cpp refuses it.
    """
    settings = llama_cpp.llama_model_default_params()
    settings.n_gpu_layers, settings.load_mtp = 0, with_heads
    model = llama_cpp.llama_model_load_from_file(path.encode(), settings)
    if not model:
        raise SystemExit(f"llama.cpp does not load {path}")
    return model


def _look(model: Any, mmproj: str, n_tokens: int) -> dict[str, Any]:
    """`embedded`, `answer` and `is_finite` of a test image.

    Raises:
        SystemExit: libmtmd refuses the file, or cannot use it with the model.
    """
    import llama_cpp
    from llama_cpp import mtmd_cpp as mtmd

    settings: Any = mtmd.mtmd_context_params_default()
    settings.use_gpu, settings.warmup, settings.print_timings = False, False, False
    projector = mtmd.mtmd_init_from_file(mmproj.encode(), model, settings)
    if not projector:
        raise SystemExit("llama.cpp's libmtmd does not load the mmproj")
    chunks = mtmd.mtmd_input_chunks_init()
    text = mtmd.mtmd_input_text(_QUESTION.encode(), len(_QUESTION), True, True)
    media = (ctypes.c_void_p * 1)(_media(mtmd, projector))
    if mtmd.mtmd_tokenize(projector, chunks, ctypes.byref(text), media, 1) != 0:
        raise SystemExit("libmtmd cannot prepare the image or sound")
    n_prompt = int(mtmd.mtmd_helper_get_n_tokens(chunks))
    context = _context(llama_cpp, model, n_prompt + n_tokens + _SPARE_TOKENS)
    position = llama_cpp.llama_pos(0)
    if mtmd.mtmd_helper_eval_chunks(
        projector, context, chunks, 0, 0, n_prompt, True, ctypes.byref(position)
    ):
        raise SystemExit("llama.cpp cannot evaluate the image or sound")
    n_embedded = _n_embedded(mtmd, chunks)
    shape = (n_embedded, llama_cpp.llama_model_n_embd_inp(model))
    embeddings = np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(projector), shape)
    is_finite = bool(np.isfinite(embeddings).all())
    answer, logits_finite = _continue(llama_cpp, model, context, position, n_tokens)
    return {
        "embedded": n_embedded,
        "answer": answer,
        "is_finite": is_finite and logits_finite,
    }


def _context(llama_cpp: Any, model: Any, n_ctx: int) -> Any:
    """A context whose one batch holds all: some models see an image as a whole."""
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = max(512, n_ctx)
    return llama_cpp.llama_init_from_model(model, settings)


def _media(mtmd: Any, projector: Any) -> Any:
    """A picture of two gradients, or a second of a tone where there is no vision."""
    if mtmd.mtmd_support_vision(projector):
        rows, columns = np.indices((_SIDE_PIXELS, _SIDE_PIXELS)) * 255 // _SIDE_PIXELS
        pixels = np.stack([rows, columns, np.full_like(rows, 128)], -1).astype(np.uint8)
        data = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        return mtmd.mtmd_bitmap_init(_SIDE_PIXELS, _SIDE_PIXELS, data)
    rate = max(mtmd.mtmd_get_audio_sample_rate(projector), 8000)
    tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32)
    samples = tone.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return mtmd.mtmd_bitmap_init_from_audio(rate, samples)


def _n_embedded(mtmd: Any, chunks: Any) -> int:
    """Tokens of the last image or sound."""
    found = [
        int(mtmd.mtmd_input_chunk_get_n_tokens(chunk))
        for chunk in (
            mtmd.mtmd_input_chunks_get(chunks, index)
            for index in range(mtmd.mtmd_input_chunks_size(chunks))
        )
        if mtmd.mtmd_input_chunk_get_type(chunk) != mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT
    ]
    return found[-1]


def _continue(
    llama_cpp: Any, model: Any, context: Any, position: Any, n_tokens: int
) -> tuple[str, bool]:
    """The greedy continuation, and whether all logits were finite."""
    vocab = llama_cpp.llama_model_get_vocab(model)
    n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)
    answer, is_finite = b"", True
    for _ in range(n_tokens):
        pointer = llama_cpp.llama_get_logits_ith(context, -1)
        logits = np.ctypeslib.as_array(pointer, (n_vocab,))
        is_finite = is_finite and bool(np.isfinite(logits).all())
        token = int(np.argmax(logits))
        if llama_cpp.llama_vocab_is_eog(vocab, token):
            break
        piece = ctypes.create_string_buffer(256)
        length = llama_cpp.llama_token_to_piece(vocab, token, piece, 256, 0, False)
        answer += piece.raw[: max(length, 0)]
        one = llama_cpp.llama_batch_get_one((llama_cpp.llama_token * 1)(token), 1)
        if llama_cpp.llama_decode(context, one):
            raise SystemExit("llama.cpp cannot go on after the image or sound")
        position.value += 1
    return answer.decode(errors="replace"), is_finite


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
