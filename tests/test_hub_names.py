"""What people paste for a model of the Hub, and what they mean by it."""

from __future__ import annotations

import pytest

from ewq_gguf.checkpoint.hub_names import HubName, hub_name
from ewq_gguf.errors import InputError, UsageError

HUB = "https://huggingface.co"
MIRROR = "https://mirror.example:8443/hf/"
SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("model", "meant"),
    [
        ("org/name", HubName("org/name")),
        ("org/name@v1.0", HubName("org/name", "v1.0")),
        ("org/name@refs/pr/3", HubName("org/name", "refs/pr/3")),
        ("hf.co/org/name", HubName("org/name")),
        ("HF.co/org/name", HubName("org/name")),
        ("huggingface.co/org/name/", HubName("org/name")),
        ("huggingface.co/org/name@dev", HubName("org/name", "dev")),
        ("https://huggingface.co/org/name", HubName("org/name")),
        ("http://www.huggingface.co/org/name?a=b#c", HubName("org/name")),
        ("https://huggingface.co/gpt2", HubName("gpt2")),
        ("https://huggingface.co/gpt2/tree/main", HubName("gpt2", "main")),
        ("hf://org/name", HubName("org/name")),
        ("https://hf.co/org/name/tree/main", HubName("org/name", "main")),
        ("https://hf.co/org/name/tree/main/", HubName("org/name", "main")),
        (f"https://hf.co/org/name/commit/{SHA}", HubName("org/name", SHA)),
        ("https://hf.co/org/name/tree/refs%2Fpr%2F3", HubName("org/name", "refs/pr/3")),
        ("https://hf.co/org/name/discussions/7", HubName("org/name")),
        (
            "https://huggingface.co/org/name/blob/main/model.safetensors",
            HubName("org/name", "main", "model.safetensors"),
        ),
        (
            "https://huggingface.co/org/name/resolve/v1/a-BF16.gguf?download=true",
            HubName("org/name", "v1", "a-BF16.gguf"),
        ),
        (
            "https://mirror.example:8443/hf/org/name/raw/refs/pr/1/config.json",
            HubName("org/name", "refs/pr/1", "config.json"),
        ),
        ("https://mirror.example:8443/other/org", None),
        ("https://example.org/org/name", None),
        ("example.org/org/name", None),
        ("./org/name", None),
        ("org", None),
        ("org/name/deeper", None),
        ("https://[bad/org/name", None),
    ],
)
def test_an_id_and_a_page_are_the_same_model(model, meant):
    assert hub_name(model, MIRROR) == meant


@pytest.mark.parametrize(
    "model", ["org/name:Q4_K_M", "hf.co/org/name:q4_k_m", f"{HUB}/org/name:Q4_K_M"]
)
def test_a_tag_is_told_to_be_a_policy(model):
    with pytest.raises(UsageError) as caught:
        hub_name(model, HUB)
    assert "give org/name (not its GGUF copy)" in caught.value.remedy
    assert "`--policy preset:Q4_K_M`" in caught.value.remedy


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (f"{HUB}/datasets/org/name", "is no model's page"),
        (f"{HUB}/spaces/org/name", "is no model's page"),
        (f"{HUB}/org/na me", "is no model's page"),
        (f"{HUB}/org/name/tree/main/fp16", r"--include 'fp16/\*' --local-dir DIR"),
        (f"{HUB}/org/name/blob/main/fp16/a.safetensors", "in a subfolder"),
    ],
)
def test_other_pages_are_refused_by_name(model, message):
    with pytest.raises(InputError, match=message):
        hub_name(model, HUB)
