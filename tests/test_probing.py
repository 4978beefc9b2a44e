"""Bases that are moved a little, and what that costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ewq_gguf.bench.job import MemoryUse
from ewq_gguf.bench.probing import probe
from ewq_gguf.bench.reference_run import make_reference
from ewq_gguf.bench.runner import CPU_SETUP, Request, bench_file
from ewq_gguf.errors import ResourceError
from ewq_gguf.llamacpp.quantize import quantize
from ewq_gguf.pipeline import rounding
from ewq_gguf.pipeline.options import SILENT, Options
from ewq_gguf.pipeline.probing import Prober
from ewq_gguf.pipeline.rounding import measured_rounding
from ewq_gguf.plan.assemble import assemble
from ewq_gguf.plan.optimal import quantizable
from ewq_gguf.plan.subject import Subject
from ewq_gguf.records import UniformPolicy
from ewq_gguf.records.probe import Probe, ProbePart
from tests.gguf_files import Tiny, make_cache

pytest_plugins = ["tests.toolchain_fixtures"]
pytestmark = [pytest.mark.llamacpp, pytest.mark.usefixtures("own_cache")]


def silent(_share: float, _use: MemoryUse) -> None:
    pass


@pytest.fixture
def request_(tiny: Tiny, tmp_path: Path) -> Request:
    text = tmp_path / "words.txt"
    text.write_text("the river runs past an old stone house " * 60)
    asked = Request(
        tasks=("perplexity",),
        texts=(("words", text),),
        setup=CPU_SETUP.model_copy(update={"n_threads": 1}),
        n_ctx=64,
        n_chunks=3,
    )
    make_reference(tiny.base, tmp_path / "base.ref", asked, silent)
    return replace(asked, reference=tmp_path / "base.ref")


def test_what_moves_nothing_costs_nothing_and_fewer_bits_cost_more(
    tiny: Tiny, toolchain, request_
):
    names = [t.name for t in tiny.layout.tensors if "ffn_up" in t.name]
    probes = [
        Probe(name=kind, tensors=tuple(names), ggml_type=kind)
        for kind in ("BF16", "Q8_0", "Q4_0")
    ]

    found = probe(
        tiny.base,
        probes,
        request_,
        lib_dir=toolchain.lib_dir,
        imatrix=None,
        on_progress=silent,
    )

    assert found["BF16"].kld_nats == (0.0, 0.0, 0.0)
    assert 0 < found["Q8_0"].kld_mean_nats < found["Q4_0"].kld_mean_nats


def test_what_is_known_is_not_measured_again_and_a_probe_leaves_no_trace(
    tiny: Tiny, toolchain, request_
):
    def run(*names: str) -> tuple[dict[str, ProbePart], list[float]]:
        shares: list[float] = []
        probes = [
            Probe(name=name, tensors=(f"{name}.weight",), ggml_type="Q4_0")
            for name in names
        ]
        found = probe(
            tiny.base,
            probes,
            request_,
            lib_dir=toolchain.lib_dir,
            imatrix=None,
            on_progress=lambda share, _use: shares.append(share),
        )
        return found, shares

    first, second = "blk.0.attn_q", "blk.1.ffn_down"
    alone, _ = run(second)
    both, shares = run(first, second)

    assert both[second] == alone[second]
    assert max(shares) == 1.0
    assert run(first, second) == (both, [])


def subject_of(tiny: Tiny) -> Subject:
    layout = tiny.layout
    return Subject.of_tensors(tiny.checkpoint.identity, layout.tensors, layout, "auto")


def test_rounding_is_what_a_file_loses_beyond_its_values(
    tiny: Tiny, toolchain, request_, tmp_path, monkeypatch
):
    own = tmp_path / "cache"  # other tests count the journals of theirs
    own.mkdir()
    monkeypatch.setenv("EWQ_CACHE", str(make_cache(own, toolchain)))
    request_ = replace(request_, tasks=("perplexity", "kld"), base=tiny.base)
    prober = Prober(tiny.base, request_, toolchain.lib_dir, Options(), SILENT)
    subject = subject_of(tiny)
    ups = [t.name for t in tiny.layout.tensors if "ffn_up" in t.name]
    tried = {name: ["BF16", "Q8_0", "Q4_0", "Q4_K"] for name in ups}

    assert measured_rounding(prober, toolchain, subject, tried, 0.0) == {}
    found = measured_rounding(prober, toolchain, subject, tried, 600.0)

    assert found.keys() == set(ups)
    for one in found.values():
        assert one.keys() == {"Q8_0", "Q4_0", "Q4_K"}  # 16 bits are not rounded
        assert one["Q8_0"] == one["Q4_0"]
    # All of the role: one file of llama-quantize beside one probe.
    raw = {tensor.name: "BF16" for tensor in quantizable(subject)}
    types = raw | dict.fromkeys(ups, "Q8_0")
    plan = assemble(subject, UniformPolicy(ggml_type="Q8_0"), types)
    quantize(plan, tiny.base, tmp_path / "q8.gguf", toolchain, n_threads=1, load=False)
    result = bench_file(tmp_path / "q8.gguf", request_, silent)
    ((_, moved),) = prober.with_noise([(tuple(ups), "Q8_0")]).items()
    assert result.texts[0].kld is not None
    beyond = result.texts[0].kld.kld_mean_nats - moved
    assert sum(one["Q8_0"] for one in found.values()) == pytest.approx(
        max(beyond, 0.0), rel=0.5
    )


def test_without_room_for_its_files_rounding_is_not_measured(
    tiny: Tiny, toolchain, request_, monkeypatch
):
    def full(*_args, **_options):
        raise ResourceError("quantize", "study.gguf", "needs 1 GB, 0 are free", "")

    monkeypatch.setattr(rounding, "measure_plans", full)
    prober = Prober(tiny.base, request_, toolchain.lib_dir, Options(), SILENT)
    subject = subject_of(tiny)
    tried = {t.name: ["Q8_0"] for t in tiny.layout.tensors if "ffn_up" in t.name}

    assert measured_rounding(prober, toolchain, subject, tried, 600.0) == {}
