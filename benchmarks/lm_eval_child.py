"""Run lm-evaluation-harness's `mmlu` over local questions, in its own environment.

    PYTHON -P lm_eval_child.py JOB OUT

JOB is JSON: `model` (a folder), `dtype`, `n_shots`, and `files`: by subject, the JSON
lines of `test` and `dev`. The tasks are the harness's own files; only the data set is
another. OUT gets, by subject and question, the log-probabilities of the four letters
and whether the harness counts it as right. `-P`: this folder has a module that is
called as the harness is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml


def main(job_path: Path, out: Path) -> None:
    """Ask all questions."""
    import lm_eval

    job = json.loads(job_path.read_text(encoding="utf-8"))
    folder = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": job["model"], "dtype": job["dtype"]},
        tasks=[task_of(folder, *item) for item in job["files"].items()],
        num_fewshot=job["n_shots"],
        batch_size=1,
        device="cpu",
        bootstrap_iters=0,
        log_samples=True,
    )
    answers = {
        task.removeprefix("mmlu_"): [
            {
                "logprobs_nats": [float(one) for one, _ in sample["filtered_resps"]],
                "is_right": bool(sample["acc"]),
            }
            for sample in sorted(samples, key=lambda sample: int(sample["doc_id"]))
        ]
        for task, samples in found["samples"].items()
    }
    out.write_text(json.dumps(answers))


def task_of(folder: Path, subject: str, files: dict[str, str]) -> dict[str, Any]:
    """The harness's task of a subject, with its data set replaced by local files."""
    task: dict[str, Any] = yaml.safe_load(
        (folder / "_default_template_yaml").read_text()
    )
    task |= yaml.safe_load((folder / f"mmlu_{subject}.yaml").read_text())
    for key in ("include", "tag", "dataset_name"):
        task.pop(key, None)
    return task | {"dataset_path": "json", "dataset_kwargs": {"data_files": files}}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
