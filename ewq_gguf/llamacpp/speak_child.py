"""Child process: load a GGUF, continue a prompt greedily, print one JSON line.

python -m ewq_gguf.llamacpp.speak_child FILE PROMPT N_TOKENS
"""

from __future__ import annotations

import json
import sys

import numpy as np


def main(path: str, prompt: str, n_tokens: int) -> None:
    """Print `{"answer": ..., "is_finite": ...}` as the last line of stdout."""
    import llama_cpp

    model = llama_cpp.Llama(path, n_ctx=256, n_batch=256, n_gpu_layers=0, verbose=False)
    tokens = model.tokenize(prompt.encode(), add_bos=True)
    answer, is_finite = [], True
    model.eval(tokens)
    for _ in range(n_tokens):
        pointer = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        logits = np.ctypeslib.as_array(pointer, (model.n_vocab(),))
        is_finite = is_finite and bool(np.isfinite(logits).all())
        token = int(np.argmax(logits))
        if token == model.token_eos():
            break
        answer.append(token)
        model.eval([token])
    text = model.detokenize(answer, prev_tokens=tokens).decode(errors="replace")
    sys.stdout.write(f"\n{json.dumps({'answer': text, 'is_finite': is_finite})}\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
