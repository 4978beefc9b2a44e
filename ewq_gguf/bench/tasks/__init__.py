"""Tasks of `ewq bench`, a module with one class `Task` each.

A new task is a module here, and its name in `_MODULES`.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from importlib import import_module

from ewq_gguf.bench.task import Task

#: In the order in which they run and are shown.
_MODULES = ("text", "mmlu", "generation", "speed", "arc", "hellaswag")


@cache
def all_tasks() -> tuple[Task, ...]:
    """Every task; modules are imported on the first call."""
    modules = (import_module(f"ewq_gguf.bench.tasks.{name}") for name in _MODULES)
    return tuple(module.Task() for module in modules)


def task_names() -> tuple[str, ...]:
    """The words that `--tasks` takes."""
    return tuple(name for task in all_tasks() for name in task.names)


def tasks_of(names: Collection[str]) -> tuple[Task, ...]:
    """The tasks that measure what is named."""
    return tuple(task for task in all_tasks() if not {*names}.isdisjoint(task.names))
