"""Child process: evaluate tiny models on every device and keep the logits.

python -m ewq_gguf.llamacpp.self_test_child FOLDER

Each evaluation is announced before it begins: after a crash, the log's last line
tells which kernels were at work. The logits go to FOLDER/NUMBER.npy;
FOLDER/runs.json, which is written last, says what each of them is.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ewq_gguf.process import N_CPUS

#: Positions in the prompt, and tokens that follow it one by one.
N_PROMPT, N_SINGLE = 40, 3
TOKENS_NAME, RUNS_NAME = "tokens.npy", "runs.json"


def main(folder: Path) -> None:
    """Evaluate each GGUF file of the folder on each device, by one thread and more."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    tokens = np.load(folder / TOKENS_NAME)
    runs: list[dict[str, object]] = []
    for device_name, device in _devices(llama_cpp):
        # Threads are of the CPU; one count is enough for a GPU.
        counts = (1, max(2, min(N_CPUS, 4))) if device is None else (1,)
        for path in sorted(folder.glob("*.gguf")):
            for n_threads in counts:
                sys.stdout.write(f"{device_name}: {path.stem}, {n_threads} threads\n")
                sys.stdout.flush()
                logits = _evaluate(llama_cpp, path, tokens, device, n_threads)
                np.save(folder / f"{len(runs)}.npy", logits)
                runs.append(
                    {"device": device_name, "file": path.name, "threads": n_threads}
                )
    (folder / RUNS_NAME).write_text(json.dumps(runs), encoding="utf-8")


def _devices(llama_cpp: Any) -> list[tuple[str, int | None]]:
    """The CPU, then each GPU of this build: a name and ggml's handle."""
    library = llama_cpp.llama_cpp._lib

    def function(name: str, result: Any, *arguments: Any) -> Any:
        found = getattr(library, name)
        found.restype, found.argtypes = result, arguments
        return found

    function("ggml_backend_load_all", None)()
    count = function("ggml_backend_dev_count", ctypes.c_size_t)()
    get = function("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
    kind = function("ggml_backend_dev_type", ctypes.c_int, ctypes.c_void_p)
    name = function("ggml_backend_dev_name", ctypes.c_char_p, ctypes.c_void_p)
    handles = [get(i) for i in range(count)]
    # ggml_backend_dev_type: 1 is a GPU, 2 one that shares the host's memory.
    gpus = [(name(h).decode(), h) for h in handles if kind(h) in {1, 2}]
    return [("CPU", None), *gpus]


def _evaluate(
    llama_cpp: Any,
    path: Path,
    tokens: NDArray[np.int32],
    device: int | None,
    n_threads: int,
) -> NDArray[np.float32]:
    """Logits of the prompt in one batch, then of the other tokens one by one."""
    params = llama_cpp.llama_model_default_params()
    chosen = (ctypes.c_void_p * 2)(device, None)
    params.devices = ctypes.cast(chosen, ctypes.c_void_p)
    params.n_gpu_layers = 0 if device is None else -1
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise SystemExit(f"{path.name} does not load")
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 64
    settings.n_threads = settings.n_threads_batch = n_threads
    context = llama_cpp.llama_init_from_model(model, settings)
    if not context:
        raise SystemExit(f"{path.name} gets no context")
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    rows = []
    for begin, end in [
        (0, N_PROMPT),
        *((i, i + 1) for i in range(N_PROMPT, len(tokens))),
    ]:
        batch = llama_cpp.llama_batch_init(end - begin, 0, 1)
        batch.n_tokens = end - begin
        for i in range(end - begin):
            batch.token[i], batch.pos[i] = int(tokens[begin + i]), begin + i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
        if code := llama_cpp.llama_decode(context, batch):
            raise SystemExit(f"{path.name}: llama_decode returned {code}")
        pointer = llama_cpp.llama_get_logits(context)
        rows.append(np.ctypeslib.as_array(pointer, (end - begin, n_vocab)).copy())
        llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return np.concatenate(rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
