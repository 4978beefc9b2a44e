"""The self-test of a build: does llama.cpp compute here what it should?

A build that links can still crash or compute wrong numbers: compilers drop stores that
an instruction needs, hypervisors show features that they do not enable, drivers change.
So tiny models, one per class of kernels, are evaluated in a child process, on every
device, and their logits are compared with numpy's.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from ewq_gguf import store
from ewq_gguf.errors import (
    ChildError,
    EwqError,
    ResourceError,
    ToolError,
    VerificationError,
)
from ewq_gguf.libraries import LIBRARY_VARIABLE, RECORD_NAME, cpu_name, machine_key
from ewq_gguf.llamacpp.logs import child_log
from ewq_gguf.process import python_argv, run

STAGE = "toolchain"
_REMEDY = "run `ewq setup`, which builds it again and leaves out what fails"

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
    """What a self-test found; kept in the build's record.

    Attributes:
        is_ok: every evaluation ended and gave the right numbers.
        problem: what failed first; None where nothing did.
        failed_device: where; None likewise, and where nothing was evaluated.
        hardware: where it ran; on other hardware it is to be run again.
        devices: that were tested: `CPU`, `CUDA0` and the like.
        n_evaluations: models times devices times numbers of threads.
        worst_error: the largest share of its limit that a difference took.
        seconds: that it took.
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


def hardware_key(backend: str) -> str:
    """The CPU, and for builds with GPUs also those and their driver, as one line."""
    parts = [machine_key(), cpu_name()]
    if backend != "cpu":
        parts += _gpu_facts()
    return "; ".join(part for part in parts if part)


def run_self_test(
    lib_dir: Path, backend: str, *, timeout_seconds: float = _SECONDS
) -> SelfTest:
    """Evaluate the tiny models with a build's libraries; never raises for what fails.

    Args:
        lib_dir: holds libllama.
        backend: of the build.
        timeout_seconds: after which it counts as hanging.

    Raises:
        ToolError: the bindings are missing.
        ResourceError: the temporary folder cannot be written.
    """
    # gguf, which the models are written with, takes a while to import.
    from ewq_gguf.llamacpp.self_test_child import (
        N_PROMPT,
        N_SINGLE,
        RUNS_NAME,
        TOKENS_NAME,
    )
    from ewq_gguf.llamacpp.tiny_models import N_VOCAB, TINY_MODELS

    check_testable()
    started = time.monotonic()
    hardware = hardware_key(backend)
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, N_VOCAB, N_PROMPT + N_SINGLE).astype(np.int32)
    with TemporaryDirectory(prefix="ewq-self-test-") as name:
        folder = Path(name)
        try:
            for model in TINY_MODELS:
                model.write(folder / model.file_name)
            np.save(folder / TOKENS_NAME, tokens)
        except OSError as error:
            problem = f"cannot be written ({error.strerror})"
            remedy = "free some space, or name another folder with TMPDIR"
            raise ResourceError(STAGE, folder, problem, remedy) from error
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
        runs = json.loads((folder / RUNS_NAME).read_text(encoding="utf-8"))
        expected = {m.file_name: (m, m.logits(tokens)) for m in TINY_MODELS}
        wrong: list[tuple[str, str]] = []
        shares = [0.0]
        for number, entry in enumerate(runs):
            model, right = expected[entry["file"]]
            share = error_share(
                np.load(folder / f"{number}.npy"), right, model.ggml_type
            )
            shares.append(share)
            if not share <= 1:
                device = str(entry["device"])
                problem = (
                    f"{device} computes wrong numbers with {model.name} "
                    f"({entry['threads']} threads): {share:.0f} times the difference "
                    "that rounding explains"
                )
                wrong.append((device, problem))
    return SelfTest(
        is_ok=not wrong,
        problem=wrong[0][1] if wrong else None,
        failed_device=wrong[0][0] if wrong else None,
        hardware=hardware,
        devices=tuple(dict.fromkeys(entry["device"] for entry in runs)),
        n_evaluations=len(runs),
        worst_error=round(max(shares), 3) if np.isfinite(max(shares)) else 1e9,
        seconds=round(time.monotonic() - started, 2),
    )


def error_share(
    found: NDArray[np.float32], right: NDArray[np.float64], ggml_type: str
) -> float:
    """How much of the allowed difference two sets of logits take; above 1 is wrong.

    Args:
        found: (T, V), the build's.
        right: (T, V), numpy's.
        ggml_type: of the model's matrices, which decides what rounding explains.

    Returns:
        A share; infinite for NaN.
    """
    if found.shape != right.shape or not np.isfinite(found).all():
        return float("inf")
    limit = _LIMITS.get(ggml_type, _QUANTISED_LIMIT)
    difference = (found - right) / right.std()
    mean = float(np.sqrt((difference**2).mean()))
    return max(mean, float(np.abs(difference).max()) / _OUTLIER) / limit


def explain_failure(error: EwqError) -> EwqError:
    """Tell whose fault it is that llama.cpp did not load or compute something.

    The self-test runs anew: where it fails, the toolchain is at fault, whatever the
    file; where it passes, the error stays what it is.

    Args:
        error: what a child of the bindings or of our build ended with.

    Returns:
        A ToolError, or the same error.
    """
    # Others have a cause of their own: a missing device, full memory, a wrong option.
    if not isinstance(error, ChildError | VerificationError):
        return error
    lib_dir = os.environ.get(LIBRARY_VARIABLE)
    if not lib_dir or not can_load():
        return error
    record_path = Path(lib_dir).parent / RECORD_NAME
    try:
        record = json.loads(record_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = {}
    backend = str(record.get("backend", "cpu"))
    verdict = run_self_test(Path(lib_dir), backend)
    if record:
        keep_self_test(record_path.parent, record, verdict)
    return error if verdict.is_ok else failed(verdict)


def failed(verdict: SelfTest) -> ToolError:
    """The error for a build that has failed."""
    problem = f"fails its self-test on this machine ({verdict.problem})"
    return ToolError(STAGE, "llama.cpp", problem, _REMEDY)


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


@cache
def _gpu_facts() -> list[str]:
    """GPUs and drivers, from files that the system has of them."""
    return [fact for path in _gpu_files() if (fact := _first_line(path))]


def _gpu_files() -> Iterator[Path]:
    yield Path("/proc/driver/nvidia/version")
    yield from sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    for card in sorted(Path("/sys/class/drm").glob("card[0-9]")):
        yield from (card / "device/vendor", card / "device/device")
    # macOS has its GPUs' driver in the system.
    yield Path("/System/Library/CoreServices/SystemVersion.plist")


def _first_line(path: Path) -> str:
    try:
        return path.read_text(errors="replace").split("\n", 1)[0].strip()
    except OSError:
        return ""
