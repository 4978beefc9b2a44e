"""Every family the converter takes: predicted, scanned, quantised, as it really is.

One tiny random checkpoint per family goes through the real converter and the real
llama-quantize. docs/architectures.md has a table that is made from the list that
is tested here.
"""

import os
from dataclasses import dataclass
from math import isclose
from pathlib import Path

import numpy as np
import pytest

from ewq_gguf.api import check_layout, layout_bytes
from ewq_gguf.checkpoint.completeness import check_complete
from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.checkpoint.leftovers import check_names
from ewq_gguf.checkpoint.mapping import map_tensors
from ewq_gguf.checkpoint.scan import scan_checkpoint
from ewq_gguf.checkpoint.source import Opening, open_checkpoint
from ewq_gguf.entropy.codes import N_CODES, CodeCounts, summarise_codes
from ewq_gguf.llamacpp.convert import BaseHeader
from ewq_gguf.llamacpp.converter import converter_architectures
from ewq_gguf.llamacpp.layout import layout_from
from ewq_gguf.llamacpp.loading import tensor_refusals
from ewq_gguf.llamacpp.quantize import quantize
from ewq_gguf.llamacpp.staging import left_out_env, read_sources, stage_checkpoint
from ewq_gguf.llamacpp.toolchain import find_toolchain
from ewq_gguf.plan.build import make_plan
from ewq_gguf.process import python_argv, run
from ewq_gguf.records import EwqPolicy, Layout, Scan
from ewq_gguf.tensor_names import ARCHITECTURES
from tests.families import FAMILIES, write_family

pytestmark = [pytest.mark.llamacpp, pytest.mark.slow]

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
TAKEN = [label for label, family in FAMILIES.items() if not family.refused]
#: The converter rounds these weights itself, so a GGUF's values are not the source's.
ROUNDED = {"BitNet"}
#: llama.cpp takes sizes for granted that these small checkpoints do not have.
ODD_SIZES = {"OLMoE", "Phi-2", "ERNIE 4.5 MoE", "dots1", "MiniCPM3"}


@dataclass(frozen=True)
class Case:
    """One family's checkpoint and everything made of it."""

    checkpoint: Checkpoint
    layout: Layout
    scan: Scan
    base: Path


@pytest.fixture(scope="session")
def converted(tmp_path_factory) -> dict[str, tuple[Checkpoint, Path]]:
    """Every family's checkpoint, converted by one child per core."""
    toolchain = find_toolchain()
    opening = Opening(frozenset(ARCHITECTURES) | converter_architectures(toolchain))
    found, staged = {}, []
    for i, label in enumerate(TAKEN):
        folder = tmp_path_factory.mktemp(f"family{i}")
        checkpoint = open_checkpoint(
            str(write_family(folder / "source" / "tiny", label)), opening
        )
        check_names(checkpoint)
        check_complete(checkpoint)
        left_out_env(checkpoint, folder)
        staged.append(stage_checkpoint(checkpoint, folder))
        found[label] = (checkpoint, folder)
    root = Path(__file__).parent.parent
    env = toolchain.converter_env()
    env["PYTHONPATH"] += f":{root}"
    run(
        python_argv("tests.family_child", toolchain.converter, *staged),
        stage="test",
        log_path=tmp_path_factory.mktemp("log") / "families.log",
        env={**env, "HF_HUB_OFFLINE": "1"},
    )
    return found


@pytest.fixture(params=TAKEN)
def case(request, converted) -> tuple[str, Case]:
    checkpoint, folder = converted[request.param]
    error = folder / "error.txt"
    assert not error.exists(), error.read_text()
    header = BaseHeader(
        folder / "header.gguf",
        read_gguf(folder / "header.gguf", header_only=True),
        read_sources(checkpoint, folder / "sources.json"),
    )
    layout = layout_from(header, {}, converter_commit="", model_fingerprint="")
    scan = scan_checkpoint(checkpoint, layout=layout)
    return request.param, Case(checkpoint, layout, scan, folder / "base.gguf")


def test_header_scan_and_file_of_a_family_are_what_was_predicted(case, tmp_path):
    label, made = case
    check_the_header_is_the_real_files(made)
    check_every_weight_is_counted_once(made)
    check_the_scan_measures_what_the_file_holds(made, label)
    if made.checkpoint.is_mapped_by_name:
        by_name, dropped = map_tensors(made.checkpoint)
        by_layout, also_dropped = map_tensors(made.checkpoint, made.layout)
        assert (by_name, dropped) == (by_layout, also_dropped)
    check_layout(made.scan, made.layout)
    plan = make_plan(made.scan, EwqPolicy(measure="histogram"), made.layout)
    verification = quantize(
        plan, made.base, tmp_path / "o.gguf", find_toolchain(), n_threads=2, load=False
    )
    assert verification.found_size_bytes == plan.totals.file_size_bytes
    assert len({layer.ggml_type for layer in plan.layers}) > 1


def test_llama_cpp_misses_no_tensor_of_any_family(converted):
    refusals = tensor_refusals(
        [folder / "base.gguf" for _, folder in converted.values()]
    )
    refused = {
        label: why for label, why in zip(converted, refusals, strict=True) if why
    }
    assert refused.keys() == ODD_SIZES
    assert all("has wrong shape" in why for why in refused.values())


def check_the_header_is_the_real_files(made: Case):
    real = read_gguf(made.base)
    assert [(t.name, t.shape, t.ggml_type) for t in real.tensors] == [
        (t.name, t.shape, t.ggml_type) for t in made.layout.tensors
    ]
    assert (real.kv_bytes, real.file_bytes) == (
        made.layout.kv_bytes,
        layout_bytes(made.layout),
    )


def check_every_weight_is_counted_once(made: Case):
    """Each checkpoint tensor is used whole, or dropped; regions do not overlap."""
    used: dict[str, int] = {}
    for tensor in map_tensors(made.checkpoint, made.layout)[0]:
        for region in tensor.regions:
            name = region.tensor.name
            used[name] = used.get(name, 0) + region.n_weights
    whole = {
        tensor.name: tensor.n_weights
        for _, tensor in made.checkpoint.tensors
        if tensor.name not in made.scan.dropped
    }
    assert used == whole


def check_the_scan_measures_what_the_file_holds(made: Case, label: str):
    """The converter moves weights; where it does not change them, counts agree."""
    entries = {tensor.name: tensor for tensor in made.scan.tensors}
    data = np.memmap(made.base, np.uint8, "r")
    checked = 0
    for tensor in read_gguf(made.base).tensors:
        if tensor.ggml_type != "BF16" or label in ROUNDED:
            continue
        raw = data[tensor.offset : tensor.offset + tensor.size_bytes].view(np.uint16)
        counts = np.bincount(raw, minlength=N_CODES).astype(np.int64)
        found = summarise_codes(CodeCounts.of(counts), "BF16", epsilon=0.01, n_bins=256)
        entry = entries[tensor.name]
        assert entry.n_weights == raw.size
        assert entry.histogram_entropy_bits == found.histogram_entropy_bits
        assert isclose(entry.softmax_entropy_nats, found.softmax_entropy_nats)
        checked += 1
    assert checked or label in ROUNDED


def architectures_page() -> str:
    """The page with its table of families as it should be."""
    rows = [
        f"| {label} | `{family.architecture}` | "
        f"{'names' if family.architecture in ARCHITECTURES else 'converter'} | "
        f"{family.refused or family.notes} |"
        for label, family in FAMILIES.items()
    ]
    table = "\n".join(
        [
            f"{len(TAKEN)} of {len(FAMILIES)} families are tested to the byte; "
            "the pinned tools themselves refuse the rest.",
            "",
            "| family | architecture | mapped by | notes |",
            "|---|---|---|---|",
            *rows,
        ]
    )
    before, _, rest = PAGE.read_text().partition("<!-- families -->\n")
    after = rest.partition("<!-- /families -->")[2]
    return f"{before}<!-- families -->\n{table}\n<!-- /families -->{after}"


def test_the_page_of_architectures_is_the_list_that_is_tested():
    if os.environ.get("EWQ_UPDATE_DOCS"):
        PAGE.write_text(architectures_page())
    assert PAGE.read_text() == architectures_page()


def test_families_that_are_mapped_by_name_are_tested():
    tested = {FAMILIES[label].architecture for label in TAKEN}
    assert set(ARCHITECTURES) <= tested
