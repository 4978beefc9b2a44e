"""Which text calibrates best: the model's own, or a real one?

    EWQ_TEXT_DIR=FOLDER EWQ_MMLU_DIR=FOLDER python -m benchmarks.calibration

Importance matrices of as many windows of three texts: what the built-in model writes
itself, WikiText-2's validation split, MMLU's questions with answers (`dev`). Presets
made with each are judged on WikiText-2's test split and on MMLU's test questions, so
that each real text is judged once on its own kind and once on another's; the model's
own text is never at home. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from ewq_gguf import api, store
from ewq_gguf.bench.questions.mmlu_data import Question
from ewq_gguf.bench.questions.mmlu_files import find_subjects
from ewq_gguf.bench.runner import CPU_SETUP, Request
from ewq_gguf.bench.statistics import kld_difference
from ewq_gguf.records import TextResult
from ewq_gguf.records.scores import Letter
from ewq_gguf.stages.candidate_files import measure_plans, types_sha256

PRESETS = ("Q5_K_M", "Q4_K_M", "IQ4_XS")
N_CALIBRATION, N_JUDGED = 40, 40


def main() -> None:
    """Print one table per judge."""
    texts = Path(os.environ["EWQ_TEXT_DIR"])
    folder = store.cache_dir("calibration")
    dev, test = (
        _questions(Path(os.environ["EWQ_MMLU_DIR"]), split, folder)
        for split in ("dev", "test")
    )
    calibrations: Mapping[str, Path | None] = {
        "own": None,
        "WikiText": texts / "wikitext-2" / "valid.txt",
        "questions": dev,
    }
    judges = {
        "WikiText": texts / "wikitext-2-raw" / "wiki.test.raw",
        "questions": test,
    }
    run = api.open_model("demo")
    matrices: dict[str, Path | None] = {"none": None}
    for name, text in calibrations.items():
        matrices[name], importance = api.make_imatrix(
            run, calibration=text, n_chunks=N_CALIBRATION
        )
        n_chunks = importance.record.n_chunks
        print(f"calibrated on {name}: {n_chunks} windows of 512 tokens", flush=True)
    for judge, text in judges.items():
        found = {
            name: _measured(run.with_options(imatrix=matrix), judge, text)
            for name, matrix in matrices.items()
        }
        print(f"\njudged on {judge}, {N_JUDGED} windows; KLD in nats\n")
        print("| preset | calibrated on | KLD | less own's, 95 % |")
        print("|---|---|---:|---|")
        for preset in PRESETS:
            own = found["own"][preset]
            for name in matrices:
                one = found[name][preset]
                print(f"| {preset} | {name} | {_nats(one):.5f} | {_less(one, own)} |")


def _questions(folder: Path, split: str, to: Path) -> Path:
    """The questions of a split with choices and answers, subjects in turn, as a text.

    A text that begins with one subject would be judged on that alone.
    """
    subjects = [rows.read() for rows in find_subjects(folder, split).values()]
    parts = [
        f"{Question('', i, row[0], tuple(row[1:5]), answer).block} {answer}\n\n"
        for i in range(max(map(len, subjects)))
        for row in (rows[i] for rows in subjects if i < len(rows))
        for answer in [cast("Letter", row[5])]
    ]
    path = to / f"questions-{split}.txt"
    store.write_text(path, "".join(parts), stage="bench", force=True)
    return path


def _measured(run: api.Run, judge: str, text: Path) -> dict[str, TextResult]:
    plans = api.preset_plans(run, presets=PRESETS)
    request = Request(
        tasks=("kld",),
        base=api.base_file(run),
        texts=((judge, text),),
        setup=CPU_SETUP,
        n_chunks=N_JUDGED,
    )
    parts = measure_plans(
        list(plans.values()),
        request,
        run.toolchain,
        options=run.options,
        progress=run.progress,
    )
    return {name: parts[types_sha256(plan)].quality for name, plan in plans.items()}


def _nats(result: TextResult) -> float:
    assert result.kld is not None
    return result.kld.kld_mean_nats


def _less(result: TextResult, own: TextResult) -> str:
    if result is own:
        return ""
    test = kld_difference(result, own)
    return (
        f"{test.difference:+.5f}, {test.difference_low:+.5f} to "
        f"{test.difference_high:+.5f}"
    )


if __name__ == "__main__":
    main()
