"""Sizes of the layers of the paper's models, from their public config.json files."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A dense layer, and what lies outside the layers.

    Attributes:
        hidden: width.
        q: rows of the query projection, and columns of the output projection.
        kv: rows of the key and of the value projection.
        ffn: rows of gate and of up.
        n_vector: parameters of norms and biases.
        n_outside: parameters outside the layers: embedding, head, last norm.
    """

    hidden: int
    q: int
    kv: int
    ffn: int
    n_vector: int
    n_outside: int = 0

    @property
    def n_parameters(self) -> int:
        """Parameters of one layer."""
        matrices = 2 * self.q + 2 * self.kv + 3 * self.ffn
        return self.hidden * matrices + self.n_vector


#: By Hub id.
SHAPES = {
    "meta-llama/Meta-Llama-3.1-8B-Instruct": Shape(
        4096, 4096, 1024, 14336, 2 * 4096, 2 * 128256 * 4096 + 4096
    ),
    "Qwen/Qwen2-7B-Instruct": Shape(
        3584, 3584, 512, 18944, 2 * 3584 + 3584 + 2 * 512, 2 * 152064 * 3584 + 3584
    ),
    "google/gemma-2-9b-it": Shape(
        3584, 4096, 2048, 14336, 4 * 3584, 256000 * 3584 + 3584
    ),
    "microsoft/Phi-3.5-mini-instruct": Shape(
        3072, 3072, 3072, 8192, 2 * 3072, 2 * 32064 * 3072 + 3072
    ),
    "google/gemma-2-2b-it": Shape(2304, 2048, 1024, 9216, 4 * 2304),
    "google/gemma-2b-it": Shape(2048, 2048, 256, 16384, 2 * 2048),
    "google/gemma-7b-it": Shape(3072, 4096, 4096, 24576, 2 * 3072),
    "meta-llama/Llama-3.1-405B-Instruct": Shape(16384, 16384, 1024, 53248, 2 * 16384),
    "meta-llama/Llama-3.1-8B-Instruct": Shape(4096, 4096, 1024, 14336, 2 * 4096),
    "meta-llama/Llama-3.2-1B-Instruct": Shape(2048, 2048, 512, 8192, 2 * 2048),
    "meta-llama/Llama-3.2-3B-Instruct": Shape(3072, 3072, 1024, 8192, 2 * 3072),
    "meta-llama/Llama-3.3-70B-Instruct": Shape(8192, 8192, 1024, 28672, 2 * 8192),
    "meta-llama/Meta-Llama-3.1-70B-Instruct": Shape(8192, 8192, 1024, 28672, 2 * 8192),
    "microsoft/Phi-3-mini-128k-instruct": Shape(3072, 3072, 3072, 8192, 2 * 3072),
    "mistralai/Mistral-7B-Instruct-v0.3": Shape(4096, 4096, 1024, 14336, 2 * 4096),
    # LayerNorms with biases, and biases of q, k and v.
    "stabilityai/stablelm-2-1_6b-chat": Shape(
        2048, 2048, 2048, 5632, 4 * 2048 + 3 * 2048
    ),
}
#: Latent attention of DeepSeek-V2-Lite: q, kv_a, kv_b, o and three norms.
_MLA = 2048 * (3072 + 576) + 512 * 4096 + 2048 * 2048 + 2 * 2048 + 512
#: Its first layer is dense; the others have 64 experts, 2 shared ones and a router.
DEEPSEEK = {
    "deepseek-ai/DeepSeek-Coder-V2-Lite-Instruct": _MLA + 3 * 10944 * 2048,
    "deepseek-ai/DeepSeek-V2-Lite": _MLA + 66 * 3 * 1408 * 2048 + 64 * 2048,
}


def layer_parameters(model: str) -> int:
    """Parameters of a layer of table 2, norms and biases included."""
    return DEEPSEEK[model] if model in DEEPSEEK else SHAPES[model].n_parameters
