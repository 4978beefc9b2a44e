"""Tensors with the values of a type, rounded activations, and the loss by each."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ewq_gguf.bench import children, reference_run, runner
from ewq_gguf.bench.job import MemoryUse
from ewq_gguf.bench.reference_run import make_reference
from ewq_gguf.bench.runner import CPU_SETUP, Request, bench_file
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.errors import ResourceError
from ewq_gguf.llamacpp.quantize import quantize
from ewq_gguf.optimal import type_prober
from ewq_gguf.optimal.activation_rounding import RoundingMeasurer
from ewq_gguf.optimal.candidate_types import quantizable
from ewq_gguf.optimal.file_measurer import FileMeasurer
from ewq_gguf.optimal.settings import SearchSettings
from ewq_gguf.optimal.type_prober import TypeProber, open_prober
from ewq_gguf.plan.assemble import assemble
from ewq_gguf.plan.model_tensors import ModelTensors
from ewq_gguf.records import UniformPolicy
from ewq_gguf.records.probe import BROKEN_NATS, TypeProbe, TypeProbePart
from ewq_gguf.stages import candidate_files
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


def prober_of(base: Path, request: Request, toolchain, folder: Path) -> TypeProber:
    lib_dir = toolchain.lib_dir
    return TypeProber(base, request, lib_dir, folder, Options(), SILENT)


def test_what_moves_nothing_costs_nothing_and_fewer_bits_cost_more(
    tiny: Tiny, toolchain, request_, tmp_path
):
    names = [t.name for t in tiny.layout.tensors if "ffn_up" in t.name]
    probes = [
        TypeProbe(name=ggml_type, tensors=tuple(names), ggml_type=ggml_type)
        for ggml_type in ("BF16", "Q8_0", "Q4_0")
    ]

    prober = prober_of(tiny.base, request_, toolchain, tmp_path)
    found = prober.run_probes(probes, silent)

    assert found["BF16"].kld_nats == (0.0, 0.0, 0.0)
    assert 0 < found["Q8_0"].kld_mean_nats < found["Q4_0"].kld_mean_nats


def test_what_is_known_is_not_measured_again_and_a_probe_leaves_no_trace(
    tiny: Tiny, toolchain, request_, tmp_path
):
    prober = prober_of(tiny.base, request_, toolchain, tmp_path)

    def run(*names: str) -> tuple[dict[str, TypeProbePart], list[float]]:
        shares: list[float] = []
        probes = [
            TypeProbe(name=name, tensors=(f"{name}.weight",), ggml_type="Q4_0")
            for name in names
        ]
        return prober.run_probes(probes, lambda share, _: shares.append(share)), shares

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
        TypeProbe(name=one, tensors=(one,), ggml_type="Q4_0")
        for one in (name, "blk.1.attn_q.weight")
    ]

    request = replace(request_, reference=None)
    found = prober_of(base, request, toolchain, tmp_path).run_probes(probes, silent)

    assert found[name].n_tokens == ()
    assert found[name].kld_mean_nats == BROKEN_NATS
    assert 0 <= found["blk.1.attn_q.weight"].kld_mean_nats < BROKEN_NATS


def test_the_base_is_copied_once_for_all_probes_of_a_search(
    tiny: Tiny, toolchain, request_, tmp_path, monkeypatch
):
    copies: list[tuple[Path, bool]] = []

    def run_job(job, on_progress):
        path = Path(job.probing.copy_path)
        copies.append((path, path.exists()))
        children.run_job(job, on_progress)

    monkeypatch.setattr(type_prober, "run_job", run_job)
    request = replace(request_, n_ctx=32, base=tiny.base)  # of no other test
    with open_prober(
        request, toolchain.lib_dir, options=Options(), progress=SILENT
    ) as prober:
        for name in ("blk.0.attn_k", "blk.1.attn_k"):
            prober([((f"{name}.weight",), "Q4_0")])
            assert copies[-1][0].read_bytes() == tiny.base.read_bytes()

    (first, existed), (second, still_existed) = copies
    assert first == second
    assert not existed
    assert still_existed
    assert not first.exists()  # nothing stays on the disk


def test_a_copy_of_the_base_stays_only_where_the_disk_has_space_for_files_beside_it(
    tiny: Tiny, toolchain, request_, tmp_path, monkeypatch
):
    size = tiny.base.stat().st_size
    usage = shutil.disk_usage(tmp_path)._replace(free=size)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    prober = prober_of(tiny.base, replace(request_, n_ctx=48), toolchain, tmp_path)

    prober([(("blk.0.attn_v.weight",), "Q4_0")])
    assert (tmp_path / "copy.gguf").exists()
    usage = usage._replace(free=size - 1)
    prober([(("blk.1.attn_v.weight",), "Q4_0")])
    assert not (tmp_path / "copy.gguf").exists()


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
    prober = prober_of(tiny.base, request_, toolchain, tmp_path)
    subject = replace(subject_of(tiny), raw_type=raw_type)
    ups = [t.name for t in tiny.layout.tensors if "ffn_up" in t.name]
    tried = {name: [raw_type, "Q8_0", "Q4_0", "NVFP4", "Q4_K"] for name in ups}

    measurer = RoundingMeasurer(prober, toolchain, subject, tried)
    assert measurer.measure(0.0) == {}
    found = measurer.measure(600.0)

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

    ((_, moved),) = prober.costs_with_noise([(tuple(ups), "Q8_0")]).items()
    beyond = loss(raw | dict.fromkeys(ups, "Q8_0")) - moved - loss(raw)
    assert sum(one["Q8_0"] for one in found.values()) == pytest.approx(
        max(beyond, 0.0), rel=0.5
    )


def test_rounding_that_turns_out_slow_is_given_up(
    tiny: Tiny, toolchain, request_, tmp_path, monkeypatch
):
    prober = prober_of(tiny.base, request_, toolchain, tmp_path)
    subject = subject_of(tiny)
    tried = {tensor.name: ["Q8_0"] for tensor in quantizable(subject)}
    now = 0.0
    measured: list[object] = []

    class Measurer(RoundingMeasurer):
        def costs_of(self, cells):
            nonlocal now
            now += 100.0 * len(cells) if measured else 0.0  # the first is in the cache
            measured.extend(cells)
            return dict.fromkeys(cells, 0.01)

    monkeypatch.setattr(time, "monotonic", lambda: now)
    measurer = Measurer(prober, toolchain, subject, tried)

    assert measurer.measure(200.0) == {}
    assert len(measured) == 2
    measured.clear()
    assert measurer.measure(1e4).keys() == set(tried)


def test_without_space_for_its_files_rounding_is_not_measured(
    tiny: Tiny, toolchain, request_, tmp_path
):
    class Measurer(RoundingMeasurer):
        def costs_of(self, cells):
            raise ResourceError("quantize", "study.gguf", "needs 1 GB, 0 are free", "")

    prober = prober_of(tiny.base, request_, toolchain, tmp_path)
    tried = {t.name: ["Q8_0"] for t in tiny.layout.tensors if "ffn_up" in t.name}

    assert Measurer(prober, toolchain, subject_of(tiny), tried).measure(600.0) == {}


def test_a_files_time_is_its_own_and_not_that_of_the_bases_reference(
    tiny: Tiny, toolchain, request_, monkeypatch
):
    clock, late = time.monotonic, 0.0
    slow_first = [50.0, 0.0, 0.0]
    make_once = reference_run.cached_reference

    def cached_reference(*args):
        nonlocal late
        late += 1000.0
        return make_once(*args)

    def bench_file(*args):
        nonlocal late
        late += slow_first.pop(0)
        return runner.bench_file(*args)

    monkeypatch.setattr(candidate_files, "cached_reference", cached_reference)
    monkeypatch.setattr(candidate_files, "bench_file", bench_file)
    monkeypatch.setattr(time, "monotonic", lambda: clock() + late)
    request = replace(
        request_, tasks=("perplexity", "kld"), base=tiny.base, reference=None, n_ctx=40
    )
    settings = SearchSettings(n_search_windows=1, n_final_windows=4)
    measurer = FileMeasurer(request, request, toolchain, Options(), SILENT, settings)

    def measure(ggml_type: str) -> float:
        (result,) = measurer.on_search_text([tiny.plan(ggml_type)])
        assert result is not None
        return measurer.expected_seconds(1, 0)

    assert measurer.expected_seconds(1, 1) == 0.0
    assert 50.0 < measure("Q8_0") < 100.0
    # One slow file does not decide for all that follow; a known one takes no time.
    measure("Q4_0")
    assert measure("Q5_0") < 25.0
    assert measurer.expected_seconds(1, 1) == 5 * measurer.expected_seconds(1, 0)
    assert measure("Q5_0") == measurer.expected_seconds(1, 0)
    assert len(measurer.seconds) == 3
