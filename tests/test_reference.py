"""A base's reference file: as good as the base, checked, and of nothing else."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from ewq_gguf.api import Run, base_file
from ewq_gguf.bench import reference_run
from ewq_gguf.bench.engines.scorer import Batch
from ewq_gguf.bench.reference_file import KEY, read_reference
from ewq_gguf.bench.reference_run import cached_reference, make_reference
from ewq_gguf.bench.runner import Request, bench_file
from ewq_gguf.bench.texts.quality import Named, check_stored, score_text
from ewq_gguf.bench.texts.scoring import divergence, largest_error
from ewq_gguf.bench.texts.windows import Window, Windows
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.checkpoint.source import open_checkpoint
from ewq_gguf.cli import main
from ewq_gguf.errors import ChildError, InputError, VerificationError
from ewq_gguf.records import Reference
from tests.bench_models import Table
from tests.families import write_family
from tests.test_bench_llama import prose, quantised, silent

pytest_plugins = ["tests.toolchain_fixtures"]
pytestmark = [pytest.mark.llamacpp, pytest.mark.usefixtures("own_cache")]

N_CTX = 64


@pytest.fixture(scope="session")
def words(tmp_path_factory) -> Path:
    path: Path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text(prose(400))
    return path


@pytest.fixture(scope="session")
def request_(words) -> Request:
    """Six windows of words, compared with whatever base is put in."""
    return Request(tasks=("kld",), texts=(("words", words),), n_ctx=N_CTX, n_chunks=6)


@pytest.fixture(scope="session")
def made(tiny, request_, session_cache, tmp_path_factory) -> Path:
    """The reference of the tiny model; not to be changed."""
    path: Path = tmp_path_factory.mktemp("made") / "tiny.ref"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EWQ_CACHE", str(session_cache))
        make_reference(tiny.base, path, request_, silent)
    return path


def self_divergence(base: Path, request: Request, folder: Path) -> tuple[Path, float]:
    """The reference of a base, and the base's mean divergence through it, nats."""
    path = folder / "base.ref"
    make_reference(base, path, request, silent)
    found = bench_file(base, replace(request, base=path), silent)
    assert found.kld_mean_nats is not None
    return path, found.kld_mean_nats


# As good as the base


@pytest.mark.parametrize(
    ("ftype", "kept"),
    [
        ("BF16", "BF16"),
        ("F16", "F16"),
        ("F32", "F32"),
        ("Q8_0", "F32"),
        ("Q4_0", "F32"),
    ],
)
def test_a_base_diverges_from_its_own_reference_by_nothing(
    tiny, toolchain, request_, tmp_path, ftype, kept
):
    base = tiny.base
    if ftype != "BF16":
        base = quantised(toolchain, base, tmp_path, ftype)

    path, kld = self_divergence(base, request_, tmp_path)

    assert abs(kld) < 1e-6
    states = {t.name: t for t in read_gguf(path).tensors}["text.0.states"]
    assert states.ggml_type == kept


def family_base(label: str, folder: Path, toolchain) -> Path:
    """The base GGUF of a tiny checkpoint of a family; converted once a run.

    Its logits are a hundred times larger, so that a cap of 30 is felt.
    """
    checkpoint = open_checkpoint(str(write_family(folder / "tiny", label)))
    base = Path(shutil.copy(base_file(Run(checkpoint)), folder / "loud.gguf"))
    norm = next(t for t in read_gguf(base).tensors if t.name == "output_norm.weight")
    values = np.fromfile(base, np.float32, norm.shape[0], offset=norm.offset)
    with base.open("r+b") as file:
        file.seek(norm.offset)
        file.write((100 * values).tobytes())
    return base


def copied(
    base: Path,
    out: Path,
    *,
    without: str = "",
    tensors: Mapping[str, NDArray[np.float32]] = MappingProxyType({}),
) -> Path:
    """A GGUF file without one of its keys, or with more tensors."""
    reader = gguf.GGUFReader(base)
    family = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, family)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in {"general.architecture", without}:
            continue
        kind, sub_type = field.types[0], field.types[-1]
        is_array = kind == gguf.GGUFValueType.ARRAY
        writer.add_key_value(
            name, field.contents(), kind, sub_type if is_array else None
        )
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    finish(writer)
    return out


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "scale", "softcap"),
    [("Gemma 2", 1.0, 30.0), ("Granite", 1 / 8, None), ("Qwen2", 1.0, None)],
)
def test_scales_caps_and_biases_of_logits_are_found(
    toolchain, request_, tmp_path, family, scale, softcap
):
    base = family_base(family, tmp_path, toolchain)
    if has_bias := family == "Qwen2":
        n_vocab = next(
            t.shape[0] for t in read_gguf(base).tensors if t.name == "token_embd.weight"
        )
        bias = np.random.default_rng(0).standard_normal(n_vocab, np.float32)
        base = copied(base, tmp_path / "b.gguf", tensors={"output.bias": bias})

    path, kld = self_divergence(base, request_, tmp_path)

    file = read_reference(path)
    assert (file.record.head.scale, file.record.head.softcap) == (scale, softcap)
    assert ("output.bias" in file.tensors) == has_bias
    assert abs(kld) < 1e-6


@pytest.mark.parametrize("is_lines", [False, True], ids=["windows", "lines"])
def test_a_file_diverges_from_a_reference_as_from_the_base(
    tiny, toolchain, request_, tmp_path, is_lines
):
    text = tmp_path / "lines.txt"
    text.write_text("\n".join(prose(3 + i % 9)[i % 5 :] for i in range(100)))
    request = replace(request_, base=tiny.base, n_chunks=None, is_lines=is_lines)
    if is_lines:
        request = replace(request, texts=(("lines", text),))
    file = quantised(toolchain, tiny.base, tmp_path, "Q4_0")
    path = tmp_path / "base.ref"
    record = make_reference(tiny.base, path, request, silent)

    lockstep = bench_file(file, request, silent)
    found = bench_file(file, replace(request, base=path), silent)

    assert found.kld_mean_nats == pytest.approx(lockstep.kld_mean_nats, rel=1e-4)
    assert found.top1_agreement == lockstep.top1_agreement
    assert found.ppl == lockstep.ppl
    assert found.base is not None
    assert found.base.reference_of == record.model.sha256
    assert lockstep.base is not None
    assert lockstep.base.sha256 == record.model.sha256
    assert lockstep.base.reference_of is None


def test_windows_longer_than_a_forward_pass_are_found(tiny, request_, tmp_path):
    text = tmp_path / "long.txt"
    text.write_text(prose(2500))
    request = replace(request_, texts=(("long", text),), n_ctx=1100, n_chunks=1)

    _, kld = self_divergence(tiny.base, request, tmp_path)

    assert abs(kld) < 1e-6


def test_fewer_windows_than_stored_are_enough(tiny, made, request_):
    found = bench_file(tiny.base, replace(request_, base=made, n_chunks=2), silent)

    assert len(found.texts[0].chunks) == 2
    assert abs(found.texts[0].chunks[1].kld_nats or 0.0) < 1e-6


def test_a_reference_is_found_by_tokens_in_any_order(made):
    reference = pytest.importorskip("ewq_gguf.bench.reference")
    model = reference.ReferenceModel(made, 1)
    first, second = model.windows(read_reference(made).record.texts[0].sha256).windows[
        :2
    ]
    last = len(first.tokens) - 1
    one, other = (
        Batch.of(window.tokens[:last], 0, sequence=i, n_outputs=2)
        for i, window in enumerate((first, second))
    )
    both = Batch.join([one, other])
    turns = np.argsort(both.positions, kind="stable")
    mixed = Batch(
        both.tokens[turns],
        both.positions[turns],
        both.sequences[turns],
        both.is_output[turns],
    )

    with model.scorer(2 * N_CTX, n_sequences=3) as scorer:
        apart = np.concatenate([scorer.evaluate(one), scorer.evaluate(other)])
        scorer.clear()
        together = scorer.evaluate(mixed)
        scorer.remove(0, last - 1)
        scorer.copy(0, 2)
        again = scorer.evaluate(Batch.of(first.tokens[last - 1 : last], last - 1, 2))

    np.testing.assert_array_equal(together[[0, 2, 1, 3]], apart)
    np.testing.assert_array_equal(again[0], apart[1])


def test_the_largest_error_bounds_the_divergence():
    random = np.random.default_rng(0)
    base = random.standard_normal((7, 50)).astype(np.float32)
    own = base + 1e-3 * random.standard_normal((7, 50)).astype(np.float32)

    error = largest_error(own, base)

    assert largest_error(base, base + 5) < 1e-6
    kld = divergence(own, base, np.zeros(7, np.int32)).kld_nats
    assert 0 < kld.max() < error**2 / 2 * 1.01


def test_a_reference_is_a_tenth_of_all_logits(made, tiny):
    """Beside its matrix: 16 bits of each of 64 numbers, not of each logit."""
    tensors = {t.name: t for t in read_gguf(made).tensors}
    matrix, states = tensors["output.weight"], tensors["text.0.states"]
    n_scored = read_reference(made).record.texts[0].n_scored

    assert states.size_bytes == n_scored * matrix.shape[1] * 2
    assert made.stat().st_size < matrix.size_bytes + states.size_bytes + 8192


# Faults


@pytest.mark.fault(69)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_ctx": 32}, "its context has 64 tokens, 32 are asked"),
        ({"is_lines": True}, "cut into windows, lines are asked"),
        ({"n_chunks": 7}, "has 6 windows of the text, 7 are asked"),
        ({"n_chunks": None}, r"has 6 windows of the text, \d+ are asked"),
    ],
    ids=["context", "cut", "chunks", "all"],
)
def test_a_reference_of_something_else_is_refused(
    tiny, made, request_, changes, message
):
    with pytest.raises(InputError, match=message):
        bench_file(tiny.base, replace(request_, base=made, **changes), silent)


@pytest.mark.fault(69)
def test_a_reference_of_another_text_is_refused(tiny, made, request_, tmp_path):
    text = tmp_path / "other.txt"
    text.write_text(prose(401))
    request = replace(request_, base=made, texts=(("other", text),))

    with pytest.raises(InputError, match="the bytes of other, only words"):
        bench_file(tiny.base, request, silent)


@pytest.mark.fault(69)
def test_a_reference_of_another_tokenizer_is_refused():
    window = Window(np.arange(8, dtype=np.int32), 5)
    stored = Windows((window, window))
    own = Windows((Window(window.tokens + 1, 5),))
    model, base = (Named(Path(name), Table()) for name in ("a.gguf", "b.ref"))

    with pytest.raises(InputError, match=r"another tokenizer than a\.gguf"):
        check_stored(model, base, own, stored)
    check_stored(model, base, Windows((window,)), stored)


@pytest.mark.fault(69)
def test_a_base_of_another_vocabulary_is_refused():
    class Padded(Table):
        @contextmanager
        def scorer(self, *args, **options):
            with super().scorer(*args, **options) as scorer:
                scorer.n_vocab = 130
                yield scorer

    model, base = Named(Path("a.gguf"), Table()), Named(Path("b.ref"), Padded())
    windows = Windows((Window(np.arange(8, dtype=np.int32), 5),))

    with pytest.raises(InputError, match=r"130 logits per token, a\.gguf has 128"):
        list(score_text(model, base, windows, 8, lambda i: False))


@pytest.mark.fault(69)
def test_a_reference_is_no_model_and_a_model_no_reference(tiny, made, request_):
    with pytest.raises(InputError, match="is a reference and no model"):
        bench_file(made, replace(request_, base=tiny.base), silent)
    with pytest.raises(InputError, match="no reference"):
        read_reference(tiny.base)


@pytest.mark.fault(53, 69)
def test_a_truncated_reference_is_refused(tiny, made, request_, tmp_path):
    path = tmp_path / "short.ref"
    path.write_bytes(made.read_bytes()[:-100])
    with pytest.raises(VerificationError, match="truncated"):
        bench_file(tiny.base, replace(request_, base=path), silent)


class Making:
    """Counts how often a reference has to be made."""

    def __init__(self) -> None:
        self.n = 0

    @contextmanager
    def __call__(self):
        self.n += 1
        yield silent


def test_the_cache_keeps_a_reference_by_what_it_depends_on(
    tiny, request_, tmp_path, own_cache, monkeypatch
):
    monkeypatch.setenv("EWQ_CACHE", str(tmp_path))
    making = Making()
    path = cached_reference(tiny.base, request_, making)

    other = replace(
        request_, tasks=("perplexity", "kld"), base=tiny.base, n_repeats=9, n_prompt=7
    )
    assert cached_reference(tiny.base, other, making) == path
    assert making.n == 1
    shorter = replace(request_, n_chunks=5)
    assert cached_reference(tiny.base, shorter, making) != path
    assert making.n == 2


def test_a_refusal_is_forgotten_with_the_llama_cpp_that_gave_it(
    tiny, request_, tmp_path, own_cache, monkeypatch
):
    monkeypatch.setenv("EWQ_CACHE", str(tmp_path))

    def refuse(*_args):
        raise InputError("bench", "base", "cannot be recomputed", "")

    with monkeypatch.context() as patch:
        patch.setattr(reference_run, "make_reference", refuse)
        assert cached_reference(tiny.base, request_, Making()) is None
    making = Making()
    assert cached_reference(tiny.base, request_, making) is None
    assert making.n == 0  # it would take a whole pass to find out
    monkeypatch.setattr(reference_run, "LLAMA_CPP_COMMIT", "another")
    cached_reference(tiny.base, request_, making)
    assert making.n == 1


def rewritten(path: Path, out: Path, change) -> Path:
    """A reference with another record; the data stay as they are."""
    reader = gguf.GGUFReader(path)
    record = json.loads(reader.fields[KEY].contents())
    change(record)
    writer = gguf.GGUFWriter(out, "ewq-reference")
    writer.add_string(KEY, json.dumps(record))
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    finish(writer)
    return out


@pytest.mark.fault(69)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(schema_version=2), "/schema_version"),
        (lambda r: r.update(extra=1), "/extra"),
        (lambda r: r["head"].update(softcap=0.0), "/head/softcap"),
        (lambda r: r["texts"][0].update(first=0), "/texts/0/first"),
        (lambda r: r["texts"][0].update(n_scored=1), "tensors are not what it says"),
        (lambda r: r["texts"].append(r["texts"][0]), "tensors are not what it says"),
        (lambda r: r["texts"][0].update(first=1), "the windows of words"),
    ],
    ids=["version", "key", "cap", "first", "scored", "text", "windows"],
)
def test_a_hostile_record_is_refused(tiny, made, request_, tmp_path, change, message):
    path = rewritten(made, tmp_path / "hostile.ref", change)
    with pytest.raises(InputError, match=message):
        bench_file(tiny.base, replace(request_, base=path), silent)


@pytest.mark.fault(69)
def test_tokens_that_are_others_are_refused(tiny, made, request_, tmp_path):
    path = tmp_path / "other.ref"
    path.write_bytes(made.read_bytes())
    tokens = {t.name: t for t in read_gguf(made).tensors}["text.0.tokens"]
    with path.open("r+b") as file:
        file.seek(tokens.offset + 4 * 70)
        file.write(struct.pack("<i", -5))

    with pytest.raises(InputError, match=r"another tokenizer than .*\.gguf"):
        bench_file(tiny.base, replace(request_, base=path), silent)


@pytest.mark.slow
def test_a_base_whose_logits_cannot_be_recomputed_is_refused(
    toolchain, request_, tmp_path
):
    # Without the key llama.cpp caps the logits all the same.
    base = copied(
        family_base("Gemma 2", tmp_path, toolchain),
        tmp_path / "odd.gguf",
        without="gemma2.final_logit_softcapping",
    )

    with pytest.raises(InputError, match=r"nats off its .* allowed; compare in lock"):
        make_reference(base, tmp_path / "odd.ref", request_, silent)

    assert not list(tmp_path.glob("*.ref"))


def test_a_base_that_does_not_load_says_why(tiny, request_, tmp_path):
    extra = {"of.no.use": np.zeros(32, np.float32)}
    base = copied(tiny.base, tmp_path / "odd.gguf", tensors=extra)

    with pytest.raises(ChildError, match="wrong number of tensors"):
        make_reference(base, tmp_path / "odd.ref", request_, silent)


# The command line


def test_a_reference_is_made_once_and_used(tiny, words, tmp_path, capsys):
    out, result = tmp_path / "base.ref", tmp_path / "r.json"
    argv = ["reference", str(tiny.base), "-o", str(out), "--text", f"words={words}"]
    argv += ["--ctx", "64", "--chunks", "3"]

    assert main([*argv, "--json"]) == 0
    record = Reference.model_validate_json(capsys.readouterr().out)
    assert record == read_reference(out).record
    assert record.texts[0].n_windows == 3
    before = out.read_bytes()

    assert main(argv) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}\n"
    assert "was there already, still valid" in " ".join(printed.err.split())
    assert main([*argv, "--chunks", "2"]) == 2
    assert "made from other inputs; use --force" in capsys.readouterr().err
    assert main([*argv, "--force", "-q"]) == 0
    assert out.read_bytes() == before

    bench = ["bench", str(tiny.base), "--base", str(out), "--tasks", "kld", "-q"]
    bench += ["--text", f"words={words}", "--ctx", "64", "--chunks", "3"]
    assert main([*bench, "-o", str(result)]) == 0
    assert "base.ref" in capsys.readouterr().out
    assert main([*bench, "--ctx", "32", "-o", str(tmp_path / "other.json")]) == 3
    err = capsys.readouterr().err
    assert "its context has 64 tokens, 32 are asked" in err
    assert len(err.splitlines()) == 1
