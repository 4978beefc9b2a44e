"""Prompts as a model's own chat template writes them."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ewq_gguf.errors import ChildError, InputError, ToolError
from ewq_gguf.process import python_argv, run

STAGE = "bench"
TIMEOUT_SECONDS = 30.0
#: Of all prompts of a file together.
MAX_CHARS = 1 << 26
_SUBJECT = "chat template"
_REMEDY = "give prompts without it, or a file with a sound one"


def apply_chat_template(
    template: str,
    prompts: Sequence[str],
    *,
    bos_token: str = "",
    eos_token: str = "",
    timeout_seconds: float = TIMEOUT_SECONDS,
    max_chars: int = MAX_CHARS,
) -> list[str]:
    """Each prompt as the only message of a user, up to where the answer begins.

    The texts hold special tokens by name: `answers.chat_tokens` reads them. The
    date that templates may ask for is always 26 July 2024.

    Args:
        template: jinja2, from the model's file; never trusted.
        prompts: messages of users.
        bos_token: the text of the tokenizer's first token.
        eos_token: the text of its last one.
        timeout_seconds: for all prompts together.
        max_chars: most characters of all texts together.

    Raises:
        InputError: the template is broken, refuses, takes too long or too much.
        ToolError: jinja2 is missing.
        ChildError: the child could not be run.
    """
    if importlib.util.find_spec("jinja2") is None:
        remedy = "pip install 'ewq-gguf[eval]'"
        raise ToolError(STAGE, "jinja2", "is not installed", remedy)
    job = {
        "template": template,
        "conversations": [[{"role": "user", "content": text}] for text in prompts],
        "variables": {"bos_token": bos_token, "eos_token": eos_token},
        "max_chars": max_chars,
    }
    answer = _rendered(job, timeout_seconds)
    if "problem" in answer:
        raise InputError(STAGE, _SUBJECT, answer["problem"], _REMEDY)
    return [str(text) for text in answer["texts"]]


def _rendered(job: dict[str, Any], timeout_seconds: float) -> dict[str, Any]:
    """The child's answer: `texts`, or the `problem` with the template."""
    with tempfile.TemporaryDirectory() as folder:
        job_path, answer_path, log_path = (
            Path(folder) / name for name in ("job.json", "answer.json", "child.log")
        )
        job_path.write_text(json.dumps(job), encoding="utf-8")
        argv = python_argv(
            "ewq_gguf.bench.answers.template_child", job_path, answer_path
        )
        try:
            run(
                argv,
                stage=STAGE,
                log_path=log_path,
                # Nothing is imported from where the user happens to be.
                cwd=Path(folder),
                timeout_seconds=timeout_seconds,
            )
        except ChildError as error:
            if error.return_code > 0:  # not by a signal: the template did not do it
                raise
            raise InputError(STAGE, _SUBJECT, error.problem, _REMEDY) from error
        answer: dict[str, Any] = json.loads(answer_path.read_text(encoding="utf-8"))
    return answer
