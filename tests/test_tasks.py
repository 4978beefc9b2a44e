"""What the registry promises: a task is one module, and old results are read."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from ewq_gguf.bench import tasks
from ewq_gguf.bench.runner import Request
from ewq_gguf.bench.task import ResultTable, Settings, Task, TaskOption, TaskRun
from ewq_gguf.records import BenchParameters, Result
from ewq_gguf.records.result import BenchSetup
from tests.bench_models import Table

#: The fields of a result before tasks had a registry.
OLD = (
    '{"schema_name":"ewq.result","schema_version":1,"file":{"name":"a.gguf",'
    '"size_bytes":9,"sha256":"ab","reference_of":null},"base":null,"parameters":'
    '{"tasks":["perplexity","kld","mmlu","generation","speed","memory"],"setup":'
    '{"device":"cpu","n_gpu_layers":null,"tensor_split":[],"rpc":[],"n_threads":2,'
    '"cache_type_k":"f16","cache_type_v":"f16"},"texts":[],"n_ctx":512,"n_chunks":null,'
    '"is_lines":false,"n_prompt":512,"n_generated":128,"n_repeats":5,'
    '"mmlu_sha256":"cd","prompts_sha256":null,"max_tokens":null,"plan_sha256":null},'
    '"engine":{"name":"llama.cpp","version":"1","commit":"0c1e","system":"",'
    '"devices":{},"n_layers_offloaded":0},"size_bytes":9,"ppl":7.5,"texts":[]}'
)


def test_an_old_result_is_read_and_equals_the_same_request():
    result = Result.model_validate_json(OLD)

    assert (result.ppl, result.scores) == (7.5, {})
    setup = BenchSetup(
        device="cpu", n_gpu_layers=None, tensor_split=(), rpc=(), n_threads=2,
        cache_type_k="f16", cache_type_v="f16",
    )  # fmt: skip
    assert result.parameters == BenchParameters(
        tasks=tuple(name for name in tasks.task_names() if name in OLD), setup=setup,
        texts=(), n_ctx=512, n_chunks=None, is_lines=False, n_prompt=512,
        n_generated=128, n_repeats=5, mmlu_sha256="cd",
    )  # fmt: skip


def test_names_and_options_are_of_one_task_each():
    names = tasks.task_names()
    flags = [option.flag for task in tasks.all_tasks() for option in task.options]

    assert len(set(names)) == len(names)
    assert len(set(flags)) == len(flags)
    for task in tasks.all_tasks():
        assert task.compared <= set(task.names)
        assert task.is_default or task.options


class CountSettings(Settings):
    """Settings of the task below."""

    path: str

    def parameters(self) -> dict[str, object]:
        return {"data_sha256": {"count": self.path}}


class Count(Task):
    """A task of a test's own."""

    name = "count"
    names = ("count",)
    options = (TaskOption("--count", "Data.", metavar="FILE"),)
    is_default = False

    def settings_of(self, values):
        return CountSettings(path=values["count"]) if values["count"] else None

    def measure(self, run: TaskRun) -> dict[str, object]:
        return {}

    def tables(self, results: Sequence[Result]) -> list[ResultTable]:
        return []


def test_a_request_takes_a_new_task_from_the_registry_alone(monkeypatch):
    known = (*tasks.all_tasks(), Count())
    monkeypatch.setattr(tasks, "all_tasks", lambda: known)

    request = Request(tasks=("count", "speed"), settings={})
    with pytest.raises(Exception, match="--count: is missing"):
        request.parameters()
    settings = {"count": CountSettings(path="x")}
    asked = Request(tasks=("count", "speed"), settings=settings).parameters()

    assert asked.data_sha256 == {"count": "x"}
    assert "count" in tasks.task_names()
    assert Table().engine.name == "table"
