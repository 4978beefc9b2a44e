"""Make docs/frontier.md: the built-in model's curve of size against KL divergence.

    EWQ_TEXT_DIR=FOLDER EWQ_MMLU_DIR=FOLDER python -m benchmarks.frontier

Policy `optimal` at the sizes of seven presets, judged on a text that nothing was chosen
on, and MMLU beside each preset. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from benchmarks.results import MODEL, N_CHUNKS, Commands, machine
from ewq_gguf import store
from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.experiments.comparison import compare_pair
from ewq_gguf.experiments.comparison_record import ComparedPair, Comparison
from ewq_gguf.experiments.study_record import Frontier, FrontierFile, Study
from ewq_gguf.libraries import LLAMA_CPP_COMMIT
from ewq_gguf.records import load_record

PAGE = Path(__file__).parents[1] / "docs" / "frontier.md"
PRESETS = ("Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_M", "IQ4_XS")

TEXT = """# Size against KL divergence

`make frontier` makes this page: `python -m benchmarks.frontier`. {machine}, {date}; the
commands below took {minutes} minutes together.

Policy `optimal` at the sizes of seven presets of the built-in model, judged on {n}
windows of WikiText-2's test split, which nothing was calibrated, probed or chosen on:
for all of that the model wrote its own text. One model of 135M weights; its rows of 576
are no multiple of 256, which makes the low presets weak. Do not expect such margins
everywhere.

{commands}

![size against KL divergence](frontier.png)

```text
{view}
```

## MMLU

Each optimal file, and the unquantised base, beside the preset of that size; both files
were made with the importance matrix. The difference of the mean -ln p of the right
letter, 570 questions with 5 examples. The model answers at chance: this says how
letters shift, which nearness to the base does not tell.

{mmlu}
"""


def main() -> None:
    """Run what has not been run, and write the page."""
    data = [os.environ.get(name) for name in ("EWQ_TEXT_DIR", "EWQ_MMLU_DIR")]
    key = store.sha256_text(f"frontier {data} {LLAMA_CPP_COMMIT}")[:16]
    folder = store.cache_dir("results-page", key)
    run = Commands(folder)
    shown = run(
        "frontier", MODEL, "--presets", ",".join(PRESETS), "--chunks", str(N_CHUNKS),
        "--picture", "frontier.png", "-o", "frontier.json",
    )  # fmt: skip
    study = load_record(Study, folder / "frontier.json", STAGE)
    assert isinstance(study.findings, Frontier)
    best = {one.budget: one for one in study.findings.files if one.source == "optimal"}
    plans = ",".join(f"optimal@{_asked(one)}" for one in best.values())
    hub = [] if os.environ.get("EWQ_MMLU_DIR") else ["--mmlu", "hub"]
    run(
        "compare", MODEL, "--plans", plans, "--presets", ",".join(PRESETS), "--tasks",
        "mmlu", "-o", "compare", *hub,
    )  # fmt: skip
    comparison = load_record(Comparison, folder / "compare/comparison.json", STAGE)
    text = TEXT.format(
        machine=machine(),
        date=time.strftime("%Y-%m-%d"),
        minutes=round(run.seconds / 60),
        n=N_CHUNKS,
        commands="\n".join(f"    {line}" for line in run.commands),
        view=shown.rstrip(),
        mmlu=mmlu_table(comparison, best),
    )
    PAGE.write_text(text, encoding="utf-8")
    shutil.copyfile(folder / "frontier.png", PAGE.with_suffix(".png"))
    print(f"wrote {PAGE}")


def _asked(one: FrontierFile) -> str:
    """The size of its budget: what it may take, not what it takes."""
    return f"{one.limit_bytes}B"


def mmlu_table(comparison: Comparison, best: dict[str | None, FrontierFile]) -> str:
    """Every optimal file, and the base, beside the preset whose size it has."""
    rows = {row.name: row for row in comparison.rows}
    lines = [
        "| size of | optimal | 95 % | the base | 95 % |",
        "|---|---:|---:|---:|---:|",
    ]
    for preset, one in best.items():
        pair = next(
            (p for p in comparison.pairs if _is_pair(p, preset, _asked(one))), None
        )
        if pair is None:
            continue
        base = compare_pair(rows["base"], rows[pair.second])
        lines.append(f"| {preset} | {_letters(pair)} | {_letters(base)} |")
    return "\n".join(lines)


def _letters(pair: ComparedPair) -> str:
    """The difference of two files' right letters, and its interval."""
    test = pair.mmlu_nats
    assert test is not None
    return (
        f"{test.difference:+.4f} | {test.difference_low:+.4f} to "
        f"{test.difference_high:+.4f}"
    )


def _is_pair(pair: ComparedPair, preset: str | None, asked: str) -> bool:
    return pair.second == preset and asked in pair.first


if __name__ == "__main__":
    main()
