"""adapter_config.json: which adapters are merged here, and by which factor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Any

from ewq_gguf.checkpoint.files import read_json_object
from ewq_gguf.checkpoint.model_config import ADAPTER_CONFIG
from ewq_gguf.errors import InputError

STAGE = "merge"
CONFIG, WEIGHTS = ADAPTER_CONFIG, "adapter_model.safetensors"
AS_SAVED = "give the adapter as PEFT saved it"
#: What to do with an adapter of a kind that is not merged here.
MERGE_YOURSELF = "merge it with PEFT's merge_and_unload, and give the merged folder"

#: Settings that only matter in training, or that this module reads.
_KNOWN = frozenset((
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config",
    "megatron_config", "megatron_core", "modules_to_save", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "target_parameters", "task_type", "trainable_token_indices",
    "use_dora", "use_rslora", "velora_config",
))  # fmt: skip
#: Initialisations that leave the base's weights as they are; others train against a
#: changed base, to which the adapter does not belong.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
#: In a pattern of a config, which may be anybody's: more could take for ever to match.
_MAX_REPEATS = 2


def bad_adapter(folder: Path, problem: str, remedy: str = AS_SAVED) -> InputError:
    """The error about something in an adapter's folder."""
    return InputError(STAGE, folder, problem, remedy)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, refused where the merge would not be W + s B A or DoRA's.

    Raises:
        InputError: it is missing or not sound, or sets what is not merged here.
    """
    if not (folder / CONFIG).is_file():
        raise bad_adapter(
            folder,
            f"has no {CONFIG}: it is no PEFT adapter",
            f"give a folder with {CONFIG} and {WEIGHTS}",
        )
    config = read_json_object(folder, CONFIG)
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        problem = f"its peft_type is {peft_type!r}; only LORA is merged here"
        raise bad_adapter(folder, problem, MERGE_YOURSELF)
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_INITS:
        raise bad_adapter(
            folder,
            f"init_lora_weights is {start!r}: it was trained on a changed base",
            "save it with path_initial_model_for_weight_conversion, or merge it with "
            "PEFT and give the merged folder",
        )
    unknown = [key for key, value in config.items() if value and key not in _KNOWN]
    if unknown:
        problem = f"{CONFIG} sets {', '.join(unknown[:4])}, which are not merged here"
        raise bad_adapter(folder, problem, MERGE_YOURSELF)
    _check_patterns(folder, config)
    return config


def scale_of(config: Mapping[str, Any], folder: Path, module: str, rank: int) -> float:
    """The factor of a module's product B A: alpha / r, or alpha / sqrt(r) (rsLoRA).

    Args:
        config: The adapter's config.
        folder: for messages.
        module: its name in the model.
        rank: The rank of its A in the file.

    Raises:
        InputError: the config says another rank, or no number.
    """
    wanted = _by_pattern(config, "rank_pattern", module, config.get("r"))
    if wanted != rank:
        problem = f"{module}: lora_A has rank {rank}, {CONFIG} says {wanted!r}"
        raise bad_adapter(folder, problem)
    alpha = _by_pattern(config, "alpha_pattern", module, config.get("lora_alpha"))
    if type(alpha) not in (int, float) or not abs(alpha) < 1e30:
        raise bad_adapter(folder, f"{module}: lora_alpha is {alpha!r}")
    return float(alpha) / (sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(
    config: Mapping[str, Any], key: str, module: str, default: object
) -> Any:
    """A module's own value, by the first pattern that its name ends with."""
    for pattern, value in (config.get(key) or {}).items():
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
            return value
    return default


def _check_patterns(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse what is no pattern, and what could take for ever to match."""
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise bad_adapter(folder, f"{CONFIG}: {key} is no object")
        for pattern in patterns:
            n_repeats = len(re.findall(r"[*+{]", pattern))
            is_nested = re.search(r"\)[*+{]", pattern)
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                problem = f"{CONFIG}: {key}: {pattern!r} is no pattern ({error})"
                raise bad_adapter(folder, problem) from error
            if n_repeats > _MAX_REPEATS or is_nested:
                problem = f"{CONFIG}: {key}: {pattern!r} repeats too much"
                raise bad_adapter(folder, problem, "use the modules' names")
