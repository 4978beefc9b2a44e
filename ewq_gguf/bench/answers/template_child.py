"""Child process: render conversations with a model's chat template, in a sandbox.

python -m ewq_gguf.bench.answers.template_child JOB ANSWER

A template comes with the model and is anybody's program. jinja2's sandbox keeps it from
the machine; the limits set here, and the parent's time-out, keep it from using it up.
"""

from __future__ import annotations

import json
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

#: Of address space; an interpreter with jinja2 takes a tenth.
_MAX_BYTES = 1 << 30
_MAX_MESSAGE = 500
#: The date templates see: a benchmark's prompts must not change from day to day.
_DATE = (2024, 7, 26)


def main(job_path: str, answer_path: str) -> None:
    """Write `{"texts": [...]}`, or `{"problem": ...}` if the template is at fault."""
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    with suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (_MAX_BYTES, _MAX_BYTES))
    try:
        answer: dict[str, Any] = {"texts": render(**job)}
    except MemoryError:
        answer = {"problem": f"wants more than {_MAX_BYTES >> 20} MiB of memory"}
    except Exception as error:  # whatever somebody's program raises
        # It chooses the message too, and so its length.
        name, message = type(error).__name__, str(error)[:_MAX_MESSAGE]
        answer = {"problem": f"cannot be rendered ({name}: {message})"}
    Path(answer_path).write_text(json.dumps(answer), encoding="utf-8")


def render(
    template: str,
    conversations: list[list[dict[str, str]]],
    variables: dict[str, str],
    max_chars: int,
) -> list[str]:
    """One text per conversation; all together no longer than `max_chars`."""
    compiled = environment().from_string(template)
    texts, n_left = [], max_chars
    for messages in conversations:
        pieces = []
        for piece in compiled.generate(
            messages=messages, add_generation_prompt=True, tools=None, documents=None,
            **variables,
        ):  # fmt: skip
            n_left -= len(piece)
            if n_left < 0:
                raise ValueError(f"more than {max_chars:,} characters")
            pieces.append(piece)
        texts.append("".join(pieces))
        texts[-1].encode()  # half a character would end the tokenizer
    return texts


def syntax_error(template: str) -> str | None:
    """The first error in a template's syntax; nothing of it runs.

    None where it is sound, or where jinja2 is not installed.
    """
    try:
        from jinja2 import TemplateSyntaxError
    except ImportError:
        return None
    try:
        environment().parse(template)
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    except RecursionError:
        return "it is nested too deeply"
    return None


def environment() -> Any:
    """A sandbox with what chat templates rely on, as transformers defines it."""
    from datetime import datetime

    from jinja2 import TemplateError, ext, nodes, parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """`{% generation %}` marks answers for training; its content is kept."""

        tags = {"generation"}

        def parse(self, parser: parser.Parser) -> list[nodes.Node]:
            """Keep everything between the tags."""
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime(*_DATE).strftime(form)

    def tojson(value: Any, indent: int | None = None) -> str:
        # jinja2's own escapes HTML.
        return json.dumps(value, ensure_ascii=False, indent=indent)

    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, Generation]
    )
    sandbox.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
    }
    sandbox.filters["tojson"] = tojson
    return sandbox


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
