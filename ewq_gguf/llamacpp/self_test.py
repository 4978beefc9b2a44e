"""The self-test of a build: does llama.cpp compute here what it should?

A build that links can still crash or compute wrong numbers: compilers drop stores that
an instruction needs, hypervisors show features that they do not enable, drivers change.
So tiny models, one per class of kernels, are evaluated in a child process, on every
device, and their logits are compared with numpy's.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from ewq_gguf import store
from ewq_gguf.errors import (
    ChildError,
    ResourceError,
    ToolError,
)
from ewq_gguf.libraries import LIBRARY_VARIABLE, RECORD_NAME
from ewq_gguf.llamacpp.hardware import hardware_key
from ewq_gguf.llamacpp.logs import child_log
from ewq_gguf.process import python_argv, run

STAGE = "toolchain"

_SECONDS = 120.0
#: Root of the mean squared difference from numpy's logits, in their own standard
#: deviations. Measured on CPUs: 0.0003 to 0.003 for 16 and 32 bits, 0.008 to 0.015 for
#: quantised types, whose inputs are rounded to 8 bits. A wrong kernel is near 1.
_LIMITS = {"F32": 0.02, "F16": 0.02, "BF16": 0.02}
_QUANTISED_LIMIT = 0.05
#: A single logit may be this many times the limit off: one wrong position is found.
_OUTLIER = 8.0
#: What the child says before each evaluation.
_ANNOUNCED = re.compile(r"^((\S+): \S+-rows-of-\S+, \d+ threads)$", re.MULTILINE)


@dataclass(frozen=True)
class SelfTest:
    """The result of a self-test; kept in the build's record.

    Attributes:
        is_ok: Whether every evaluation ended and gave the right numbers.
        problem: The first failure; None without one.
        failed_device: The device of that failure; None without one, and where nothing
            was evaluated.
        hardware: The hardware it ran on; on other hardware it is run again.
        devices: The tested devices: `CPU`, `CUDA0` and the like.
        n_evaluations: Models times devices times numbers of threads.
        worst_error: The largest share of its limit that a difference took.
        seconds: The time it took.
    """

    is_ok: bool
    problem: str | None
    hardware: str
    failed_device: str | None = None
    devices: tuple[str, ...] = ()
    n_evaluations: int = 0
    worst_error: float = 0.0
    seconds: float = 0.0

    def to_record(self) -> dict[str, object]:
        """For build.json."""
        return asdict(self)

    def __str__(self) -> str:
        """One line for people."""
        if not self.is_ok:
            return f"failed: {self.problem}"
        return (
            f"passed: {self.n_evaluations} evaluations on {', '.join(self.devices)} "
            f"in {self.seconds:.1f} s"
        )


def read_self_test(record: dict[str, object], backend: str) -> SelfTest | None:
    """The verdict in a build's record; None where this hardware has none."""
    found = record.get("self_test")
    if not isinstance(found, dict) or found.get("hardware") != hardware_key(backend):
        return None
    try:
        return SelfTest(**{**found, "devices": tuple(found["devices"])})
    except (KeyError, TypeError):
        return None


def can_load() -> bool:
    """Whether the bindings are installed."""
    return find_spec("llama_cpp") is not None


def check_testable() -> None:
    """Refuse where a build cannot be tested.

    Raises:
        ToolError: the bindings are missing.
    """
    if not can_load():
        raise ToolError(
            STAGE,
            "llama-cpp-python",
            "is not installed, and a build is tested through it",
            "run `ewq setup`",
        )


def run_self_test(
    lib_dir: Path, backend: str, *, timeout_seconds: float = _SECONDS
) -> SelfTest:
    """Evaluate the tiny models with a build's libraries; never raises for what fails.

    Args:
        lib_dir: holds libllama.
        backend: The build's: `cpu`, `cuda`, `metal` or `vulkan`.
        timeout_seconds: after which it counts as hanging.

    Raises:
        ToolError: the bindings are missing.
        ResourceError: the temporary folder cannot be written.
    """
    check_testable()
    started = time.monotonic()
    hardware = hardware_key(backend)
    with TemporaryDirectory(prefix="ewq-self-test-") as name:
        folder = Path(name)
        tokens = _write_models(folder)
        try:
            _evaluate(folder, lib_dir, timeout_seconds)
        except ChildError as error:
            device, problem = _reason(error)
            return SelfTest(
                is_ok=False,
                problem=problem,
                hardware=hardware,
                failed_device=device,
                seconds=round(time.monotonic() - started, 2),
            )
        evaluations = _compare(folder, tokens)
    failed_first = next((e for e in evaluations if not e.share <= 1), None)
    worst = max((e.share for e in evaluations), default=0.0)
    return SelfTest(
        is_ok=failed_first is None,
        problem=None if failed_first is None else failed_first.problem,
        failed_device=None if failed_first is None else failed_first.device,
        hardware=hardware,
        devices=tuple(dict.fromkeys(e.device for e in evaluations)),
        n_evaluations=len(evaluations),
        worst_error=round(worst, 3) if isfinite(worst) else 1e9,
        seconds=round(time.monotonic() - started, 2),
    )


def _write_models(folder: Path) -> NDArray[np.int32]:
    """Write the tiny models and the tokens that the child evaluates.

    Returns:
        The tokens.

    Raises:
        ResourceError: the folder cannot be written.
    """
    # gguf, which the models are written with, takes a while to import.
    from ewq_gguf.llamacpp.self_test_child import N_PROMPT, N_SINGLE, TOKENS_NAME
    from ewq_gguf.llamacpp.tiny_models import N_VOCAB, TINY_MODELS

    rng = np.random.default_rng(5)
    tokens = rng.integers(0, N_VOCAB, N_PROMPT + N_SINGLE).astype(np.int32)
    try:
        for model in TINY_MODELS:
            model.write(folder / model.file_name)
        np.save(folder / TOKENS_NAME, tokens)
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
        remedy = "free some space, or name another folder with TMPDIR"
        raise ResourceError(STAGE, folder, problem, remedy) from error
    return tokens


@dataclass(frozen=True)
class _Evaluation:
    """A model that a device has evaluated.

    Attributes:
        device: `CPU`, `CUDA0` and the like.
        share: How much of the allowed difference from numpy its logits take.
        problem: A sentence for a share above 1.
    """

    device: str
    share: float
    problem: str


def _compare(folder: Path, tokens: NDArray[np.int32]) -> list[_Evaluation]:
    """Compare what the child computed with numpy's logits."""
    from ewq_gguf.llamacpp.self_test_child import RUNS_NAME
    from ewq_gguf.llamacpp.tiny_models import TINY_MODELS

    expected = {m.file_name: (m, m.logits(tokens)) for m in TINY_MODELS}
    evaluations = []
    for number, run_ in enumerate(json.loads((folder / RUNS_NAME).read_text("utf-8"))):
        model, logits = expected[run_["file"]]
        computed = np.load(folder / f"{number}.npy")
        share = error_share(computed, logits, model.ggml_type)
        device = str(run_["device"])
        problem = (
            f"{device} computes wrong numbers with {model.name} ({run_['threads']} "
            f"threads): {share:.0f} times the difference that rounding explains"
        )
        evaluations.append(_Evaluation(device, share, problem))
    return evaluations


def error_share(
    computed: NDArray[np.float32], expected: NDArray[np.float64], ggml_type: str
) -> float:
    """How much of the allowed difference two sets of logits take; above 1 is wrong.

    Args:
        computed: (T, V), the build's logits.
        expected: (T, V), numpy's.
        ggml_type: The type of the matrices, which decides what rounding explains.

    Returns:
        A share; infinite for NaN.
    """
    if computed.shape != expected.shape or not np.isfinite(computed).all():
        return float("inf")
    limit = _LIMITS.get(ggml_type, _QUANTISED_LIMIT)
    difference = (computed - expected) / expected.std()
    mean = float(np.sqrt((difference**2).mean()))
    return max(mean, float(np.abs(difference).max()) / _OUTLIER) / limit


def keep_self_test(folder: Path, record: dict[str, object], verdict: SelfTest) -> None:
    """Write a verdict into a build's record."""
    text = json.dumps(
        {**record, "self_test": verdict.to_record()}, indent=2, sort_keys=True
    )
    store.write_text(folder / RECORD_NAME, text + "\n", stage=STAGE, force=True)


def _evaluate(folder: Path, lib_dir: Path, timeout_seconds: float) -> None:
    with child_log("self-test", lib_dir) as log_path:
        run(
            python_argv("ewq_gguf.llamacpp.self_test_child", folder),
            stage=STAGE,
            log_path=log_path,
            env={LIBRARY_VARIABLE: str(lib_dir), "PYTHONSAFEPATH": "1"},
            timeout_seconds=timeout_seconds,
        )


def _reason(error: ChildError) -> tuple[str | None, str]:
    """The device and the kernels at work when the child ended, and how it ended."""
    text = ""
    if error.log_path is not None and error.log_path.is_file():
        text = error.log_path.read_text(encoding="utf-8", errors="replace")
    announced = _ANNOUNCED.findall(text)
    line, device = announced[-1] if announced else ("", None)
    where = f" at {line.replace('-', ' ')}" if line else ""
    ended = error.problem.partition(";")[0]
    return device, f"{ended}{where}; its log is {error.log_path}"
