"""Every fault has a test: `pytest.mark.fault` names it.

1-5 a file that is no safetensors, 6-8 its JSON, 9-12 offsets and shapes, 13-14 dtypes,
15-18 odd tensors, 19 hostile names, 20-21 files that change, 22-24 paths, links and
pipes, 25-30 index and shards, 31-33 repositories without weights of ours, 34-36 config
and code, 37-38 tokenizer, 39 chat template (test_generation.py), 40 tied embeddings,
41-52 plans (test_plan_faults.py), 53-61 GGUF files (test_gguf_faults.py,
test_gguf_file.py), 62-64 budgets, 65, 66 and 68 questions (test_mmlu.py), 70 empty
answers, 77-80, 92, 93 and 95 children, devices and workers (test_bench_faults.py).
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from ewq_gguf.checkpoint.source import open_checkpoint
from ewq_gguf.cli import main
from ewq_gguf.errors import InputError
from ewq_gguf.llamacpp.convertible import check_tokenizer
from tests.checkpoints import write_llama


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("EWQ_CACHE", str(tmp_path / "cache"))
    return write_llama(tmp_path / "tiny", n_layers=1, n_shards=2)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def marked() -> set[int]:
    """The numbers of every `pytest.mark.fault(...)` among the tests."""
    return {
        number.value
        for path in Path(__file__).parent.glob("test_*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.fault"
        for number in call.args
        if isinstance(number, ast.Constant) and isinstance(number.value, int)
    }


def test_every_fault_has_a_test():
    assert marked() >= {*range(1, 71), *range(77, 81), 92, 93, 95}


@pytest.mark.fault(29, 30)
def test_what_is_odd_is_said_on_stderr_and_the_scan_goes_on(tiny, tmp_path, capsys):
    index = tiny / "model.safetensors.index.json"
    edit(index, metadata={"total_size": 7})
    (tiny / "consolidated.safetensors").write_bytes(b"not read")
    found = open_checkpoint(str(tiny))
    total = sum(tensor.end - tensor.begin for _, tensor in found.tensors)
    out = tmp_path / "scan.json"
    assert main(["scan", str(tiny), "-o", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}\n"
    said = " ".join(printed.err.split())  # lines of any width
    assert f"total_size is 7, its tensors have {total} bytes" in said
    assert "reads the index's files, and leaves consolidated.safetensors" in said


@pytest.mark.fault(36)
def test_code_that_the_config_names_is_said_not_to_run(tiny):
    edit(tiny / "config.json", auto_map={"AutoConfig": "evil.Config"})
    (note,) = open_checkpoint(str(tiny)).notes
    assert note.endswith("auto_map names code of the repository, which never runs")


@pytest.mark.fault(37)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model": {\n"vocab": {},\n}}', "is not JSON at line 3"),
        (b'{"a": "\xff"}', "is not JSON .*utf-8"),
        (b'{"a":' * 100_000, "is not JSON .*nested too deep"),
    ],
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer_is_named_with_its_line(tiny, name, content, message):
    (tiny / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: {message}") as caught:
        check_tokenizer(open_checkpoint(str(tiny)))
    assert caught.value.exit_code == 3


@pytest.mark.fault(38)
def test_a_vocabulary_of_another_size_than_the_embedding_is_refused(tiny):
    rows = json.loads((tiny / "config.json").read_text())["vocab_size"]
    check_tokenizer(open_checkpoint(str(tiny)))
    edit(tiny / "config.json", vocab_size=rows + 1)
    with pytest.raises(
        InputError, match=rf"vocab_size is {rows + 1}, .*shape \({rows}, 64\)"
    ) as caught:
        check_tokenizer(open_checkpoint(str(tiny)))
    assert caught.value.exit_code == 3
