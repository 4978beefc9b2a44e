"""Our MMLU beside lm-evaluation-harness's: the same checkpoint and questions.

    EWQ_MMLU_DIR=FOLDER python -m benchmarks.lm_eval [--limit 10] [--shots 5]
        [--subject NAME]... [--dtype float32] [--json FILE]

The built-in model: the bench reads its BF16 file through llama.cpp, the harness (its hf
backend) the checkpoint's folder through transformers. The harness's own `mmlu` tasks
are run, over the rows of the CSV files as Python's csv module reads them. Exit code 1
where the accuracies are more than three standard errors apart.

The harness lives in a virtual environment in the cache, which this makes; it takes
torch and transformers from the environment that runs this. The first use downloads it.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
import sysconfig
import tempfile
import venv
from itertools import groupby
from pathlib import Path
from typing import Any

import click
import numpy as np

from ewq_gguf import store
from ewq_gguf.api import Run, base_file
from ewq_gguf.bench.questions.mmlu_files import LETTERS
from ewq_gguf.bench.runner import Request, bench_file
from ewq_gguf.bench.tasks.mmlu import Settings
from ewq_gguf.checkpoint.demo import demo_checkpoint
from ewq_gguf.process import run
from ewq_gguf.records.scores import MmluScores

_STAGE = "benchmark"
_PACKAGES = ("lm_eval==0.4.13", "accelerate==1.15.0", "datasets==5.2.0")
_N_STDERR = 3


@click.command(help=__doc__)
@click.option("--limit", type=int, default=10, show_default=True, help="Of a subject.")
@click.option("--shots", type=int, default=5, show_default=True)
@click.option("--subject", "subjects", multiple=True, help="All without one.")
@click.option("--dtype", default="float32", show_default=True, help="Of transformers.")
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(
    limit: int,
    shots: int,
    subjects: tuple[str, ...],
    dtype: str,
    json_path: Path | None,
) -> None:
    """Ask both, and print what differs."""
    folder = Path(os.environ["EWQ_MMLU_DIR"])
    python = harness()
    request = Settings(
        folder=str(folder.absolute()), n_shots=shots, limit=limit or None
    )
    with tempfile.TemporaryDirectory() as work:
        ours = bench(asked_only(request, subjects, Path(work, "questions")))
        theirs = ask_harness(python, ours, folder, dtype, Path(work))
    found = compare(ours, theirs) | {"dtype": dtype, "packages": _PACKAGES}
    table(found)
    if json_path:
        json_path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    if not found["agrees"]:
        sys.exit(1)


def harness() -> Path:
    """The Python of an environment with the harness; made where it is missing."""
    folder = store.cache_dir("lm-eval-venv")
    python, ready = folder / "bin" / "python", folder / "ready"
    wanted = "\n".join((sys.executable, *_PACKAGES))
    if not ready.exists() or ready.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder)
        here = sysconfig.get_path("purelib")
        there = sysconfig.get_path(
            "purelib", vars={"base": str(folder), "platbase": str(folder)}
        )
        # Its own packages first, then ours: pip runs from there, and finds torch.
        Path(there, "parent.pth").write_text(f"{here}\n")
        argv: list[str | Path] = [python, "-m", "pip", "install", "--quiet", *_PACKAGES]
        run(argv, stage=_STAGE, log_path=folder / "pip.log")
        ready.write_text(wanted)
    return python


def asked_only(request: Settings, subjects: tuple[str, ...], work: Path) -> Request:
    """A request for some subjects: the bench asks all that are in a folder."""
    if subjects:
        for part in ("test", "dev"):
            (work / part).mkdir(parents=True)
            for subject in subjects:
                name = f"{subject}_{part}.csv"
                shutil.copyfile(Path(request.folder, part, name), work / part / name)
        request = request.model_copy(update={"folder": str(work)})
    return Request(tasks=("mmlu",), settings={"mmlu": request})


def bench(request: Request) -> MmluScores:
    """Ours."""
    file = base_file(Run("demo"))
    scores = bench_file(file, request, lambda share, rss_bytes: None).mmlu
    assert scores is not None
    return scores


def ask_harness(
    python: Path, ours: MmluScores, folder: Path, dtype: str, work: Path
) -> dict[str, Any]:
    """Theirs, of the questions that the bench has asked."""
    files: dict[str, dict[str, str]] = {}
    asked = groupby(ours.outcomes, key=lambda one: one.id.rpartition("/")[0])
    for subject, outcomes in asked:
        rows = [int(one.id.rpartition("/")[2]) for one in outcomes]
        files[subject] = {
            "test": write_rows(folder, subject, "test", rows, work),
            "dev": write_rows(folder, subject, "dev", range(1, 6), work),
        }
    job, out = work / "job.json", work / "out.json"
    told = {"dtype": dtype, "n_shots": ours.n_shots, "files": files}
    job.write_text(json.dumps(told | {"model": str(demo_checkpoint())}))
    offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    run(
        [python, "-P", Path(__file__).with_name("lm_eval_child.py"), job, out],
        stage=_STAGE,
        log_path=store.cache_dir("logs") / "lm_eval.log",
        env=dict.fromkeys(offline, "1") | {"HF_HOME": str(work / "hf")},
    )
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def write_rows(folder: Path, subject: str, part: str, numbers: Any, work: Path) -> str:
    """Rows of a CSV file, as the Hub's data set has them."""
    path = folder / part / f"{subject}_{part}.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = [fields for fields in csv.reader(file) if fields]
    out = work / f"{subject}_{part}.jsonl"
    with out.open("w", encoding="utf-8") as file:
        for number in numbers:
            question, *choices, answer = rows[number - 1]
            row = {"question": question, "choices": choices}
            answer_index = LETTERS.index(answer.strip())
            file.write(json.dumps(row | {"answer": answer_index}) + "\n")
    return str(out)


def compare(ours: MmluScores, theirs: dict[str, Any]) -> dict[str, Any]:
    """All figures of both, and the questions with another letter."""
    subjects = dict.fromkeys(one.id.rpartition("/")[0] for one in ours.outcomes)
    asked = [found for subject in subjects for found in theirs[subject]]
    answers = [found["logprobs_nats"] for found in asked]
    own = np.array([one.letter_logprobs_nats for one in ours.outcomes])
    other = np.array(answers)
    gaps = np.abs(own - other)
    chosen = [LETTERS[i] for i in other.argmax(axis=1)]
    accuracy = float(np.mean([found["is_right"] for found in asked]))
    assert ours.accuracy_stderr is not None, "more than one question"
    return {
        "n": ours.n,
        "n_shots": ours.n_shots,
        "accuracy": ours.accuracy,
        "accuracy_stderr": ours.accuracy_stderr,
        "lm_eval_accuracy": accuracy,
        "agrees": abs(ours.accuracy - accuracy) <= _N_STDERR * ours.accuracy_stderr,
        "logprob_mean_gap_nats": float(gaps.mean()),
        "logprob_max_gap_nats": float(gaps.max()),
        "logprob_mean_shift_nats": float((own - other).mean()),
        "other_letters": [
            {
                "id": one.id,
                "answer": one.answer,
                "ours": one.chosen,
                "margin_nats": margin(one.letter_logprobs_nats),
                "lm_eval": letter,
                "lm_eval_margin_nats": margin(found),
            }
            for one, letter, found in zip(ours.outcomes, chosen, answers, strict=True)
            if one.chosen != letter
        ],
    }


def margin(logprobs_nats: Any) -> float:
    """How much likelier the likeliest letter is than the next, nats."""
    return float(np.diff(np.sort(logprobs_nats))[-1])


def table(found: dict[str, Any]) -> None:
    """Print it."""
    print(
        f"{found['n']} questions, {found['n_shots']} examples\n"
        f"accuracy: ours {found['accuracy']:.4f} ± {found['accuracy_stderr']:.4f}, "
        f"lm-eval {found['lm_eval_accuracy']:.4f}\n"
        f"log-probabilities of letters apart: mean {found['logprob_mean_gap_nats']:.4f}"
        f", at most {found['logprob_max_gap_nats']:.4f} nats; "
        f"ours are {found['logprob_mean_shift_nats']:+.4f} higher\n"
        f"{len(found['other_letters'])} other letters:"
    )
    for one in found["other_letters"]:
        print(
            f"  {one['id']:45} answer {one['answer']}, "
            f"ours {one['ours']} by {one['margin_nats']:.4f}, "
            f"lm-eval {one['lm_eval']} by {one['lm_eval_margin_nats']:.4f} nats"
        )


if __name__ == "__main__":
    main()
