"""Make docs/results.md: the built-in model's files beside each other, and the studies.

    EWQ_TEXT_DIR=FOLDER EWQ_MMLU_DIR=FOLDER python -m benchmarks.results

Everything is run by the command line as the page shows it. A run that was stopped goes
on where it was; FULL=1 asks all of MMLU's questions.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ewq_gguf import store
from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.experiments.comparison import estimates
from ewq_gguf.experiments.comparison_record import ComparedFile, Comparison, Estimate
from ewq_gguf.libraries import LLAMA_CPP_COMMIT
from ewq_gguf.process import N_CPUS
from ewq_gguf.records import Result, load_record
from ewq_gguf.size_text import size_text

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
N_CHUNKS = 40
MODEL = "demo"
#: Per subject, of the bitsandbytes row: its kernels are slow on a CPU.
N_BNB_QUESTIONS = 2
PLANS = "ewq,ewq:tensor,fastewq"
PRESETS = "Q4_K_M,Q5_K_M,Q6_K,Q8_0"
STUDIES = {
    "controls": "Is it the entropy?",
    "sensitivity": "What foretells a layer's cost?",
    "factor": "The factor X",
}
STUDY_OPTIONS = {
    "controls": ["--permutations", "19", "--chunks", "10"],
    "sensitivity": ["--chunks", "4"],
    "factor": ["--chunks", "10"],
}
_SECONDS = "seconds.json"

INTRODUCTION = """# Results on the built-in model

`make bench` makes this page: {command}. {machine}, {date}; the commands
below took {minutes} minutes together.

One model of 135M weights, one text, English: nothing here holds for another
model: `ewq compare` and `ewq study` measure yours. Policy `optimal` beside every
preset, size by size, is on [a page of its own](frontier.md).

## Files of one model

± is half of a 95 % interval, of speeds the standard deviation. KLD is in nats against
the BF16 file; `like base` is ROUGE-L of greedy answers beside the base's. MMLU has
{n_mmlu} questions with 5 examples, of the last row 2 per subject; chance is 25 %.
bitsandbytes computes in transformers, in the same process as the BF16 GGUF that it is
compared with: its KLD holds what the two engines differ in (0.001 without any
quantisation, see [evaluation](evaluation.md)), its size is that of the weights in
memory, its peak memory counts the unquantised weights too, and its speed on a
CPU is not what it is made for.
"""


def main() -> None:
    """Run what has not been run, and write the page."""
    full = ["--limit", "0"] if os.environ.get("FULL") == "1" else []
    few = full or ["--limit", str(N_BNB_QUESTIONS)]
    hub = [] if os.environ.get("EWQ_MMLU_DIR") else ["--mmlu", "hub"]
    # Other data, other questions or another llama.cpp are another page.
    data = [os.environ.get(name) for name in ("EWQ_TEXT_DIR", "EWQ_MMLU_DIR")]
    key = store.sha256_text(f"{data} {full} {LLAMA_CPP_COMMIT}")[:16]
    folder = store.cache_dir("results-page", key)
    run = Commands(folder)
    force = ["--force"] if (folder / "base.gguf").exists() else []
    run("convert", MODEL, "-o", "base.gguf", *force)
    shown = run(
        "compare", MODEL, "--plans", PLANS, "--presets", PRESETS,
        "--chunks", str(N_CHUNKS), "-o", "compare", *full, *hub,
    )  # fmt: skip
    comparison = load_record(Comparison, folder / "compare/comparison.json", STAGE)
    (plan,) = (folder / "compare" / "plans").glob("ewq.json")
    run(
        "bench", MODEL, "--backend", "bnb", "--plan", str(plan.relative_to(folder)),
        "--base", "base.gguf", "--chunks", str(N_CHUNKS), "--repeats", "3",
        "-o", "bnb.json", *few, *hub,
    )  # fmt: skip
    bitsandbytes = load_record(Result, folder / "bnb.json", STAGE)
    parts = [table(comparison, bitsandbytes), *sentences(shown)]
    for name, title in STUDIES.items():
        out = f"{name}.json"
        text = run("study", name, MODEL, *STUDY_OPTIONS[name], "-o", out)
        parts += [f"## {title}", f"`{run.command}`", f"```text\n{text.rstrip()}\n```"]
    first = comparison.rows[0].result
    introduction = INTRODUCTION.format(
        command="`python -m benchmarks.results`",
        machine=machine(),
        date=time.strftime("%Y-%m-%d"),
        minutes=round(run.seconds / 60),
        n_mmlu=f"{first.mmlu.n:,}" if first.mmlu else "no",
    )
    commands = "\n".join(f"    {line}" for line in run.commands)
    page = "\n\n".join([introduction.rstrip(), commands, *parts]) + "\n"
    PAGE.write_text(page, encoding="utf-8")
    print(f"wrote {PAGE}")


@dataclass
class Times:
    """How long a command took, all its attempts together."""

    seconds: float = 0.0
    is_done: bool = False


class Commands:
    """Runs `ewq` in a folder, shows it, and remembers how long each took first."""

    def __init__(self, folder: Path) -> None:
        """Go on with what the folder has."""
        self._folder = folder
        self._times = folder / _SECONDS
        self._known: dict[str, Times] = {}
        if self._times.exists():
            told = json.loads(self._times.read_text())
            self._known = {name: Times(**one) for name, one in told.items()}
        self.commands: list[str] = []

    @property
    def command(self) -> str:
        """The last one."""
        return self.commands[-1]

    @property
    def seconds(self) -> float:
        """Of all that were run here, each at its first time."""
        return sum(self._known[command].seconds for command in self.commands)

    def __call__(self, *arguments: str) -> str:
        """Run one to its end, and return what it printed."""
        shown = [one for one in arguments if one != "--force"]
        self.commands.append(" ".join(["ewq", *shown]))
        print(f"$ {self.command}", flush=True)
        times = self._known.setdefault(self.command, Times())
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "ewq_gguf", *arguments],
            cwd=self._folder,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            env={**os.environ, "COLUMNS": "96"},
        )
        # What was there already when a later run asked took its time before.
        if not times.is_done:
            times.seconds += time.monotonic() - started
            times.is_done = done.returncode == 0
        dumped = {name: asdict(one) for name, one in self._known.items()}
        self._times.write_text(json.dumps(dumped, indent=1, sort_keys=True))
        if done.returncode:
            sys.exit(done.returncode)  # it has said why
        print(done.stdout, flush=True)
        return done.stdout


def table(comparison: Comparison, bitsandbytes: Result) -> str:
    """All versions as a table of Markdown."""
    titles = ("version", "size", "bpw", "KLD", "perplexity", "same top, %", "MMLU, %")
    more = ("MMLU ppl", "ROUGE-L", "like base", "tokens/s", "prompt/s", "memory")
    lines = [" | ".join([*titles, *more]), "---|" + "---:|" * (len(titles + more) - 2)]
    lines[1] += "---:"
    lines += [" | ".join(cells(row)) for row in comparison.rows]
    lines.append(" | ".join(cells(of_bitsandbytes(comparison, bitsandbytes))))
    return "\n".join(f"| {line} |" for line in lines)


def of_bitsandbytes(comparison: Comparison, result: Result) -> ComparedFile:
    """Its row; its bits are per weight of the same model."""
    base = comparison.rows[0]
    return ComparedFile(
        name="ewq, bitsandbytes",
        kind="plan",
        plan_sha256=None,
        bpw=base.bpw * result.size_bytes / base.result.size_bytes,
        brackets=(),
        result=result,
        **estimates(result),
    )


def cells(row: ComparedFile) -> Iterator[str]:
    """One line of the table."""
    result = row.result
    speed, memory = result.speed, result.memory
    yield f"**{row.name}**" if row.kind == "plan" else row.name
    yield size_text(result.size_bytes)
    yield f"{row.bpw:.2f}"
    yield number(row.kld_mean_nats, 5)
    yield number(row.ppl, 2)
    yield number(row.top1_agreement, 1, 100)
    yield number(row.accuracy, 1, 100)
    yield number(row.mmlu_perplexity, 3)
    yield number(row.rouge_l, 3)
    yield number(row.fidelity, 3)
    yield f"{speed.generation_tps:.1f} ±{speed.generation_tps_std:.1f}" if speed else ""
    yield f"{speed.prompt_tps:.0f} ±{speed.prompt_tps_std:.0f}" if speed else ""
    yield size_text(memory.peak_rss_bytes) if memory else ""


def number(estimate: Estimate | None, digits: int, scale: float = 1.0) -> str:
    """`26.06 ±1.76`."""
    if estimate is None:
        return ""
    text = f"{scale * estimate.value:.{digits}f}"
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} ±{scale * (estimate.high - estimate.low) / 2:.{digits}f}"


def sentences(shown: str) -> list[str]:
    """What `ewq compare` says below its tables."""
    _, _, text = shown.partition("± is half")
    return [f"What `ewq compare` says of it:\n\n```text\n± is half{text.rstrip()}\n```"]


def machine() -> str:
    """`2 cores of Intel(R) Xeon(R)`."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return f"{N_CPUS} threads, {names[0] if names else platform.machine()}"


if __name__ == "__main__":
    main()
