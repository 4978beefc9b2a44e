"""Result: the numbers of one model file, and what it was measured with."""

from __future__ import annotations

from typing import Literal

from ewq_gguf.records.base import Part, Record
from ewq_gguf.records.generation import GenerationScores
from ewq_gguf.records.scores import MmluScores, TaskScores
from ewq_gguf.records.texts import TextResult


class BenchedFile(Part):
    """A GGUF file or a checkpoint, whatever it is called now.

    Attributes:
        name: without its folder.
        size_bytes: all its parts, of a checkpoint those with weights.
        sha256: hash of the file; of its parts' hashes where there are several.
        reference_of: SHA-256 of the model that a reference file was made of; None for
            a model itself.
    """

    name: str
    size_bytes: int
    sha256: str
    reference_of: str | None = None


class BenchSetup(Part):
    """How a model is loaded.

    Attributes:
        device: `auto`, `cpu`, or names of llama.cpp's devices with commas.
        n_gpu_layers: layers on the devices; None for all where there is a device.
        tensor_split: shares of the devices, in their order.
        rpc: llama.cpp's RPC workers, `host:port`.
        n_threads: on the CPU.
        cache_type_k: ggml type of the keys.
        cache_type_v: ggml type of the values.
    """

    device: str
    n_gpu_layers: int | None
    tensor_split: tuple[float, ...]
    rpc: tuple[str, ...]
    n_threads: int
    cache_type_k: str
    cache_type_v: str


class BenchText(Part):
    """A text that is scored.

    Attributes:
        name: the user's.
        sha256: hash of the file.
    """

    name: str
    sha256: str


class BenchParameters(Part):
    """Everything that was asked.

    Attributes:
        tasks: in order.
        setup: how the models were loaded.
        texts: texts that they read.
        n_ctx: tokens of a window, or the longest document.
        n_chunks: windows or documents of each text, at most; None for all.
        is_lines: each line is a document and every token of it is scored.
        n_prompt: tokens of the speed test's prompt.
        n_generated: tokens it generates.
        n_repeats: repeats of each test, after a warm-up.
        mmlu_sha256: hash of MMLU's prompts; None where none was asked.
        prompts_sha256: hash of the prompts to be answered; None for none.
        max_tokens: longest answer; None likewise.
        plan_sha256: hash of the plan that bitsandbytes followed; None without one.
        data_sha256: hash of everything that is asked, by the names of other tasks.
    """

    tasks: tuple[str, ...]
    setup: BenchSetup
    texts: tuple[BenchText, ...]
    n_ctx: int
    n_chunks: int | None
    is_lines: bool
    n_prompt: int
    n_generated: int
    n_repeats: int
    mmlu_sha256: str | None = None
    prompts_sha256: str | None = None
    max_tokens: int | None = None
    plan_sha256: str | None = None
    data_sha256: dict[str, str] = {}


class Engine(Part):
    """The library that computed, and where.

    Attributes:
        name: `llama.cpp` or `transformers`.
        version: the bindings', or that of all libraries that numbers depend on.
        commit: llama.cpp's; empty for transformers.
        system: CPU features and libraries, as it prints them.
        devices: descriptions of the devices used, by their names; empty for the CPU.
        n_layers_offloaded: to them, the output head counted as one.
        n_modules: with bitsandbytes' layers, the number of matrices that are `int8`,
            `nf4` or `raw`, and `kept_raw` embeddings that the plan quantises.
        weights_bytes: parameters, buffers and statistics of a transformers model, in
            memory as in a file; else None.
    """

    name: str
    version: str
    commit: str
    system: str
    devices: dict[str, str]
    n_layers_offloaded: int
    n_modules: dict[str, int] = {}
    weights_bytes: int | None = None

    @property
    def key(self) -> str:
        """Version that must be the same for numbers to be the same."""
        return self.commit or self.version


class Speed(Part):
    """Tokens per second as llama-bench counts them; each with its deviation.

    Attributes:
        prompt_tps: reading a prompt in one batch.
        prompt_tps_std: between repeats.
        generation_tps: generating one token after another.
        generation_tps_std: between repeats.
        ttft_seconds: from the prompt's tokens to the first token of the answer.
        ttft_seconds_std: between repeats.
        load_seconds: for weights and context; the disk's cache may have held the file.
    """

    prompt_tps: float
    prompt_tps_std: float
    generation_tps: float
    generation_tps_std: float
    ttft_seconds: float
    ttft_seconds_std: float
    load_seconds: float


class Memory(Part):
    """Bytes while the speed test's prompt and answer are in the context.

    Attributes:
        peak_rss_bytes: the process's, pages of the mapped file included.
        device_bytes: weights, KV cache and compute buffers on devices; 0 on the CPU.
        weights_bytes: buffers of weights, as llama.cpp prints them, wherever they are.
        kv_bytes: size of the KV cache, and of recurrent states.
        compute_bytes: size of compute and output buffers.
        n_ctx: tokens that the KV cache can hold.
        nvml_bytes: the process's memory on NVIDIA's GPUs, as their driver counts;
            None where it does not tell.
    """

    peak_rss_bytes: int
    device_bytes: int
    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    n_ctx: int
    nvml_bytes: int | None = None


class Result(Record):
    """The numbers of a file.

    The headline numbers `ppl`, `kld_mean_nats` and so on are those of all texts
    together; what was not asked is None.

    Attributes:
        file: the model.
        base: model that it was compared with.
        parameters: everything that was asked.
        engine: library that computed.
        size_bytes: the file's, or that of the weights that bitsandbytes left.
        ppl: perplexity over all texts' tokens.
        ppl_stderr: tokens taken as independent.
        kld_mean_nats: against the base.
        kld_p99_nats: its 99th percentile.
        top1_agreement: with the base.
        accuracy: share of MMLU's questions that were right.
        accuracy_stderr: its standard error.
        mmlu_perplexity: the paper's, of the right letters.
        bleu: answers beside the prompts' references; None without any.
        rouge_l: likewise, 0 to 1.
        fidelity_rouge_l: answers beside the base's.
        common_prefix_share: share of an answer before it leaves the base's.
        prompt_tps: tokens per second.
        generation_tps: tokens per second.
        ttft_seconds: to the first token.
        peak_rss_bytes: the process's.
        device_bytes: on devices.
        texts: each text's numbers, in the order asked.
        mmlu: all about it.
        generation: all about the answers.
        speed: all about it.
        memory: all about it.
        scores: the other tasks' numbers, by their names.
    """

    schema_name: Literal["ewq.result"] = "ewq.result"
    schema_version: Literal[1] = 1

    file: BenchedFile
    base: BenchedFile | None
    parameters: BenchParameters
    engine: Engine
    size_bytes: int
    ppl: float | None = None
    ppl_stderr: float | None = None
    kld_mean_nats: float | None = None
    kld_p99_nats: float | None = None
    top1_agreement: float | None = None
    accuracy: float | None = None
    accuracy_stderr: float | None = None
    mmlu_perplexity: float | None = None
    bleu: float | None = None
    rouge_l: float | None = None
    fidelity_rouge_l: float | None = None
    common_prefix_share: float | None = None
    prompt_tps: float | None = None
    generation_tps: float | None = None
    ttft_seconds: float | None = None
    peak_rss_bytes: int | None = None
    device_bytes: int | None = None
    texts: tuple[TextResult, ...] = ()
    mmlu: MmluScores | None = None
    generation: GenerationScores | None = None
    speed: Speed | None = None
    memory: Memory | None = None
    scores: dict[str, TaskScores] = {}
