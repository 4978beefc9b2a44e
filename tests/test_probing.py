"""Bases that are moved a little, and what that costs."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ewq_gguf.bench.job import MemoryUse
from ewq_gguf.bench.reference_run import make_reference
from ewq_gguf.bench.runner import CPU_SETUP, Request, bench_file
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.errors import ResourceError
from ewq_gguf.llamacpp.quantize import quantize
from ewq_gguf.optimal import activation_rounding as rounding
from ewq_gguf.optimal.activation_rounding import measured_rounding
from ewq_gguf.optimal.candidate_types import quantizable
from ewq_gguf.optimal.prober import probe
from ewq_gguf.optimal.probes import Prober
from ewq_gguf.plan.assemble import assemble
from ewq_gguf.plan.model_tensors import ModelTensors
from ewq_gguf.records import UniformPolicy
from ewq_gguf.records.probe import BROKEN_NATS, Probe, ProbePart
from ewq_gguf.stages.options import SILENT, Options
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
        Probe(name=ggml_type, tensors=tuple(names), ggml_type=ggml_type)
        for ggml_type in ("BF16", "Q8_0", "Q4_0")
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


def test_a_probe_that_breaks_the_model_is_told_and_the_others_go_on(
    tiny: Tiny, toolchain, request_, tmp_path
):
    # Q4_0's scales are F16: weights of millions become infinities and NaN.
    base = tmp_path / "large.gguf"
    shutil.copyfile(tiny.base, base)
    name = "blk.0.ffn_up.weight"
    (up,) = [tensor for tensor in read_gguf(base).tensors if tensor.name == name]
    values = np.memmap(base, "<u2", "r+", up.offset, shape=up.shape)
    large = (values.astype(np.uint32) << 16).view(np.float32) * 2.0**26
    values[:] = large.view(np.uint32) >> 16
    values.flush()
    probes = [
        Probe(name=one, tensors=(one,), ggml_type="Q4_0")
        for one in (name, "blk.1.attn_q.weight")
    ]

    found = probe(
        base,
        probes,
        replace(request_, reference=None),
        lib_dir=toolchain.lib_dir,
        imatrix=None,
        on_progress=silent,
    )

    assert found[name].n_tokens == ()
    assert found[name].kld_mean_nats == BROKEN_NATS
    assert 0 <= found["blk.1.attn_q.weight"].kld_mean_nats < BROKEN_NATS


def subject_of(tiny: Tiny) -> ModelTensors:
    layout = tiny.layout
    return ModelTensors.of_tensors(
        tiny.checkpoint.identity, layout.tensors, layout, "auto"
    )


@pytest.mark.parametrize("raw_type", ["BF16", "F16"])
def test_rounding_is_what_a_file_loses_beyond_its_values(
    tiny: Tiny, toolchain, request_, tmp_path, monkeypatch, raw_type
):
    own = tmp_path / "cache"  # other tests count the journals of theirs
    own.mkdir()
    monkeypatch.setenv("EWQ_CACHE", str(make_cache(own, toolchain)))
    request_ = replace(request_, tasks=("perplexity", "kld"), base=tiny.base)
    prober = Prober(tiny.base, request_, toolchain.lib_dir, Options(), SILENT)
    subject = replace(subject_of(tiny), raw_type=raw_type)
    ups = [t.name for t in tiny.layout.tensors if "ffn_up" in t.name]
    tried = {name: [raw_type, "Q8_0", "Q4_0", "NVFP4", "Q4_K"] for name in ups}

    assert measured_rounding(prober, toolchain, subject, tried, 0.0) == {}
    found = measured_rounding(prober, toolchain, subject, tried, 600.0)

    assert found.keys() == set(ups)
    for one in found.values():
        assert one.keys() == {"Q8_0", "Q4_0", "NVFP4", "Q4_K"}  # 16 bits are not
        # NVFP4 has blocks of 64, its input is rounded as that of types of 32.
        assert one["Q8_0"] == one["Q4_0"] == one["NVFP4"]
    # All of the role: one file of llama-quantize beside one probe. What other 16 bits
    # than the base's cost all the other tensors is no role's.
    raw = {tensor.name: raw_type for tensor in quantizable(subject)}

    def loss(types: dict[str, str]) -> float:
        plan = assemble(subject, UniformPolicy(ggml_type="Q8_0"), types)
        out = tmp_path / f"{len([*tmp_path.glob('*.gguf')])}.gguf"
        quantize(plan, tiny.base, out, toolchain, n_threads=1, load=False)
        kld = bench_file(out, request_, silent).texts[0].kld
        assert kld is not None
        return kld.kld_mean_nats

    ((_, moved),) = prober.with_noise([(tuple(ups), "Q8_0")]).items()
    beyond = loss(raw | dict.fromkeys(ups, "Q8_0")) - moved - loss(raw)
    assert sum(one["Q8_0"] for one in found.values()) == pytest.approx(
        max(beyond, 0.0), rel=0.5
    )


def test_rounding_that_turns_out_slow_is_given_up(
    tiny: Tiny, toolchain, request_, monkeypatch
):
    prober = Prober(tiny.base, request_, toolchain.lib_dir, Options(), SILENT)
    subject = subject_of(tiny)
    tried = {tensor.name: ["Q8_0"] for tensor in quantizable(subject)}
    now = 0.0
    asked: list[object] = []

    def costs(_prober, _toolchain, _subject, cells):
        nonlocal now
        now += 100.0 * len(cells) if asked else 0.0  # the first is in the cache
        asked.extend(cells)
        return dict.fromkeys(cells, 0.01)

    monkeypatch.setattr(rounding, "_costs", costs)
    monkeypatch.setattr(time, "monotonic", lambda: now)

    assert measured_rounding(prober, toolchain, subject, tried, 200.0) == {}
    assert len(asked) == 2
    asked.clear()
    found = measured_rounding(prober, toolchain, subject, tried, 1e4)
    assert found.keys() == set(tried)


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
