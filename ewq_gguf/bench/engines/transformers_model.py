"""transformers behind `Model`: a checkpoint as it is, or with bitsandbytes' layers.

Only child processes import this. No code of a checkpoint is run.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ewq_gguf.bench.engines.precision import SAVED_NAME, Precision, library_versions
from ewq_gguf.bench.engines.scorer import STAGE, IntArray
from ewq_gguf.bench.engines.transformers_scorer import TransformersScorer
from ewq_gguf.errors import InputError, ToolError, UsageError, VerificationError
from ewq_gguf.records import BenchSetup, Engine
from ewq_gguf.strict_json import read_json

_N_BATCH = 2048
#: Caches that can be copied and cut; a recurrent state cannot.
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
#: Tokens that end an answer in llama.cpp too (llama-vocab.cpp, special_eog_ids).
_END_NAMES = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>",
    "<|calls|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>",
    "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>",
)  # fmt: skip
_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_LOCAL = {"local_files_only": True, "trust_remote_code": False}


class TransformersModel:
    """A checkpoint in memory.

    Args:
        folder: the checkpoint's, or one that `--save` wrote.
        setup: where it goes.
        precisions: by the names of the parameters that are quantised.

    Raises:
        ToolError: CUDA is asked for and not there.
        UsageError: an option of llama.cpp's is asked for, or there is no such device.
        InputError: bitsandbytes cannot do what is asked, or the model has a state that
            cannot be copied.
        VerificationError: it does not load.
    """

    def __init__(
        self, folder: Path, setup: BenchSetup, precisions: Mapping[str, Precision]
    ) -> None:
        """Load it, and quantise what is to be."""
        self.folder = folder
        self._device = device_of(setup)
        torch.set_num_threads(setup.n_threads)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        # For each of its matrices it says that activations are cast.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        is_quantised = bool(precisions) or (folder / SAVED_NAME).exists()
        self._versions = library_versions(needs_bitsandbytes=is_quantised)
        self._n_modules: dict[str, int] = {}
        started = time.perf_counter()
        self._load(precisions)
        self._model.eval()
        self.load_seconds = time.perf_counter() - started
        self._check_cache()
        if is_quantised:
            from ewq_gguf.bench.engines.bitsandbytes_layers import count_modules

            self._n_modules |= count_modules(self._model)
        self._weights_bytes = _bytes_of(self._model)
        whole = self._tokenizer.encode("a", add_special_tokens=True)
        bos = self._tokenizer.bos_token_id
        self.bos = -1 if bos is None else int(bos)
        self.add_bos = whole[0] == bos
        eos = self._tokenizer.eos_token_id
        self.eos = -1 if eos is None else int(eos)
        self.add_eos = whole[-1] == eos
        # Some have several by name.
        template = self._tokenizer.chat_template or ""
        self.chat_template: str = (
            template.get("default", "") if isinstance(template, dict) else template
        )
        self._ends = self._end_tokens()
        # Decoded alone, some tokenizers' first token loses the space before it.
        self._before = self.tokenize("a")
        self._n_before = len(self._decode(self._before))

    @property
    def engine(self) -> Engine:
        """The libraries, the device, and what became of the model's matrices."""
        devices, n_layers = {}, 0
        if self._device.type == "cuda":
            devices = {str(self._device): torch.cuda.get_device_name(self._device)}
            n_layers = self._model.config.get_text_config().num_hidden_layers + 1
        return Engine(
            name="transformers",
            version=self._versions,
            commit="",
            system=f"{torch.backends.cpu.get_cpu_capability()}, "
            f"{str(self._model.dtype).removeprefix('torch.')}",
            devices=devices,
            n_layers_offloaded=n_layers,
            n_modules=self._n_modules,
            weights_bytes=self._weights_bytes,
        )

    def tokenize(self, text: str, *, special: bool = False) -> IntArray:
        """Token ids of a text, without the ones that begin and end it."""
        tokens = self._tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=not special
        )
        return np.array(tokens, np.int32)

    def detokenize(self, tokens: IntArray) -> str:
        """The text of tokens; what is no UTF-8 is replaced."""
        return self._decode(np.concatenate([self._before, tokens]))[self._n_before :]

    def is_end(self, token: int) -> bool:
        """Whether a token ends an answer."""
        return token in self._ends

    @contextmanager
    def scorer(
        self,
        n_ctx: int,
        *,
        n_sequences: int = 1,
        n_batch: int | None = None,
        is_shared: bool = True,
    ) -> Iterator[TransformersScorer]:
        """Make a context for sequences, until the block ends."""
        scorer = TransformersScorer(
            self._model,
            self._weights_bytes,
            n_ctx=n_ctx,
            n_sequences=n_sequences,
            n_batch=n_batch or _N_BATCH,
        )
        try:
            yield scorer
        finally:
            scorer.clear()

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the weights as they are now; before anything was evaluated.

        Args:
            path: the file.
            metadata: for its header, beside the dtype.
        """
        from ewq_gguf.bench.engines.bitsandbytes_layers import write

        dtype = str(self._model.dtype).removeprefix("torch.")
        write(self._model, path, {"format": "pt", "dtype": dtype, **metadata})

    def _quantised(self, precisions: Mapping[str, Precision]) -> Any:
        model, info = AutoModelForCausalLM.from_pretrained(
            self.folder, dtype="auto", output_loading_info=True, **_LOCAL
        )
        # What is missing would be drawn at random.
        for problem in ("missing_keys", "mismatched_keys"):
            if found := sorted(map(str, info[problem])):
                what = problem.replace("_keys", " in the checkpoint")
                raise ValueError(f"{found[0]} is {what}, of {len(found)} tensors")
        if precisions:
            from ewq_gguf.bench.engines.bitsandbytes_layers import move_rest, quantise

            if n_kept := quantise(model, precisions, self._device):
                self._n_modules["kept_raw"] = n_kept
            move_rest(model, self._device)
            return model
        return model.to(self._device)

    def _load(self, precisions: Mapping[str, Precision]) -> None:
        """The tokenizer and the model.

        Raises:
            ToolError: a library that they need is missing.
            VerificationError: they do not load.
        """
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(self.folder, **_LOCAL)
            if (self.folder / SAVED_NAME).exists():
                self._model = self._saved()
            else:
                self._model = self._quantised(precisions)
        except ImportError as error:
            problem = f"does not load: {_first_line(error)}"
            remedy = "pip install 'ewq-gguf[bnb]'"
            raise ToolError(STAGE, self.folder, problem, remedy) from error
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            problem = f"does not load: {_first_line(error)}"
            remedy = "check the checkpoint"
            raise VerificationError(STAGE, self.folder, problem, remedy) from error

    def _saved(self) -> Any:
        from ewq_gguf.bench.engines.bitsandbytes_layers import no_weights, read

        path = self.folder / SAVED_NAME
        with safe_open(path, framework="pt") as file:
            dtype = _DTYPES[(file.metadata() or {})["dtype"]]
        config = AutoConfig.from_pretrained(self.folder, **_LOCAL)
        with no_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        read(model, path, self._device)
        return model

    def _check_cache(self) -> None:
        config = self._model.config.get_text_config()
        types = set(getattr(config, "layer_types", None) or ())
        if getattr(self._model, "_is_stateful", False) or types - _LAYER_TYPES:
            raise InputError(
                STAGE,
                self.folder,
                "has recurrent layers, whose state cannot be shared or cut",
                "bench its GGUF file",
            )

    def _end_tokens(self) -> frozenset[int]:
        """Tokens that end an answer, by configs, tokenizer and names."""
        names = self._tokenizer.get_vocab()
        tokens: list[Any] = [names.get(name) for name in _END_NAMES]
        tokens += [self._tokenizer.eos_token_id, self._model.config.eos_token_id]
        path = self.folder / "generation_config.json"
        if path.is_file():
            _, config = read_json(path, STAGE, "check the checkpoint")
            if isinstance(config, dict):
                tokens.append(config.get("eos_token_id"))
        lists = [token if isinstance(token, list) else [token] for token in tokens]
        return frozenset(
            int(token) for part in lists for token in part if token is not None
        )

    def _decode(self, tokens: IntArray) -> str:
        return str(
            self._tokenizer.decode(
                tokens.tolist(),
                skip_special_tokens=False,
                clean_up_tokenization_spaces=False,
            )
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def device_of(setup: BenchSetup) -> torch.device:
    """Where a model goes; CUDA is used or refused, never silently left.

    Raises:
        ToolError: CUDA is asked for and this torch or this machine has none.
        UsageError: there is no such device, or llama.cpp's options are asked for.
    """
    is_f16 = {setup.cache_type_k, setup.cache_type_v} == {"f16"}
    if setup.n_gpu_layers is not None or setup.tensor_split or setup.rpc or not is_f16:
        problem = "does not take -ngl, --tensor-split, --rpc or --cache-type-k and -v"
        raise UsageError(STAGE, "transformers", problem, "leave them away")
    name = setup.device
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        problem = f"transformers has no {name!r}"
        raise UsageError(STAGE, "--device", problem, "use auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ToolError(
            STAGE,
            "--device",
            f"{name} is asked for, and torch {torch.__version__} finds no CUDA device",
            "install a torch with CUDA, or use --device cpu",
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        problem = f"there are {torch.cuda.device_count()} CUDA devices, {name} is none"
        raise UsageError(STAGE, "--device", problem, "use a smaller number")
    return device


def _bytes_of(model: Any) -> int:
    """Bytes of parameters, buffers and statistics, what is shared counted once."""
    places = {
        (tensor.data_ptr(), tensor.shape): tensor.nbytes
        for tensor in model.state_dict().values()
    }
    return sum(places.values())
