"""Studies as people read them: in 80 columns, and no more said than was found."""

from __future__ import annotations

from itertools import pairwise

import pytest
from rich.console import Console

from ewq_gguf.bench.runner import CPU_SETUP
from ewq_gguf.bench.statistics import kld_difference
from ewq_gguf.experiments.controls import correlations, kld_mean, rank_among
from ewq_gguf.experiments.frontier_view import named
from ewq_gguf.experiments.study_record import (
    Control,
    Controls,
    FactorFile,
    FactorSweep,
    Frontier,
    FrontierFile,
    LayerProbe,
    RoleProbe,
    Sensitivity,
    Study,
)
from ewq_gguf.experiments.study_sentences import (
    controls_sentences,
    sensitivity_sentences,
)
from ewq_gguf.experiments.study_view import study_view
from ewq_gguf.records import BenchedFile, BenchParameters, BenchText, Engine
from tests.scans import MODEL
from tests.studies import study_file

WINDOWS = [0.9, 1.1, 1.0, 1.05, 0.95] * 4


def shown(findings) -> list[str]:
    study = Study(
        ewq_version="1",
        model=MODEL,
        base=BenchedFile(name="base.gguf", size_bytes=1, sha256="b" * 64),
        parameters=BenchParameters(
            tasks=("perplexity", "kld"), setup=CPU_SETUP,
            texts=(BenchText(name="wikitext", sha256="c" * 64),), n_ctx=512, n_chunks=8,
            is_lines=False, n_prompt=512, n_generated=128, n_repeats=5,
        ),
        engine=Engine(
            name="llama.cpp", version="1", commit="d" * 40, system="", devices={},
            n_layers_offloaded=0,
        ),
        findings=findings,
    )  # fmt: skip
    assert Study.model_validate_json(study.to_json()) == study
    console = Console(width=80, force_terminal=False)
    with console.capture() as capture:
        console.print(study_view(study))
    return [line.rstrip() for line in capture.get().splitlines()]


def scaled(label, by, **more):
    return study_file(label, [by * x for x in WINDOWS], **more)


def controls_of(plan, others) -> Controls:
    found = [
        Control(
            order=o,
            seed=seed,
            file=file,
            difference=kld_difference(file.quality, plan.quality),
        )
        for o, seed, file in others
    ]
    random = [kld_mean(one.file) for one in found if one.order == "random"]
    rank = rank_among(kld_mean(plan), random)
    p = rank / (len(random) + 1)
    return Controls(plan=plan, controls=tuple(found), rank=rank, p=p)


def sensitivity_of(klds, entropies) -> Sensitivity:
    layers = tuple(
        LayerProbe(
            layer_idx=idx,
            statistics={
                "softmax_entropy_nats": entropy,
                "histogram_entropy_bits": 5.0,
                "std": 0.1 * (idx % 3),
            },
            file=scaled(f"layer {idx}", value),
        )
        for idx, (value, entropy) in enumerate(zip(klds, entropies, strict=True))
    )
    return Sensitivity(
        ggml_type="Q4_0",
        epsilon=0.01,
        n_bins=256,
        floor=scaled("nothing", 0.0),
        rounding=scaled("layers", 0.004),
        layers=layers,
        roles=(
            RoleProbe(
                role="ffn_down", n_tensors=30, n_weights=26_542_080,
                file=scaled("ffn_down", 0.02),
            ),
        ),
        correlations=correlations([one.statistics for one in layers], klds),
    )  # fmt: skip


def test_sensitivity_in_80_columns():
    n = 30
    lines = shown(sensitivity_of([0.001 * (i + 1) for i in range(n)], range_of(n)))

    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("hand-made: wikitext, 200 tokens scored in 20 windows")
    rows = [line for line in lines if "±0.00012" in line]
    assert len(rows) == n + 1
    assert rows[0].split() == ["0", "0.00100", "±0.00012", "-1.68", "-", "-1.22", "█"]
    bars = [line.count("█") for line in rows[:-1]]
    assert all(low <= high for low, high in pairwise(bars))
    assert bars[-1] == 24
    assert any(line.split()[:2] == ["histogram_entropy_bits", "·"] for line in lines)


def range_of(n):
    return [4.6 + 0.01 * i for i in range(n)]


@pytest.mark.parametrize(
    ("direction", "said"),
    [
        pytest.param(1, "higher entropy, more harm, as EWQ assumes", id="with"),
        pytest.param(-1, "points the wrong way on these 12 layers", id="against"),
        pytest.param(0, "cannot be told from 0", id="neither"),
    ],
)  # fmt: skip
def test_entropys_sentence_says_what_the_interval_allows(direction, said):
    klds = [0.001 * (i + 1) for i in range(12)]
    entropies = [5 + direction * i for i in range(12)]
    if not direction:
        entropies = [float(x) for x in (6, 1, 11, 4, 9, 2, 12, 3, 8, 5, 10, 7)]

    assert said in " ".join(sensitivity_sentences(sensitivity_of(klds, entropies)))


def test_a_floor_that_is_not_0_is_told():
    found = sensitivity_of([0.001, 0.002, 0.003], range_of(3))
    wrong = found.model_copy(update={"floor": scaled("nothing", 1e-9)})

    assert "as it must be" in sensitivity_sentences(found)[0]
    assert "which should be 0" in sensitivity_sentences(wrong)[0]


def test_controls_in_80_columns():
    plan = scaled("ewq", 0.010)
    random = [("random", i, scaled(f"random {i}", 0.008 + 0.001 * i)) for i in range(5)]
    rules = [
        ("inverted", None, scaled("inverted", 0.02)),
        ("variance", None, plan.model_copy(update={"label": "variance"})),
        ("first", None, study_file("first", [0.01, 0.02, 0.0, 0.013, 0.007] * 4)),
        ("last", None, scaled("last", 0.0099, size=1001)),
    ]

    lines = shown(controls_of(plan, [*random, *rules]))

    assert max(map(len, lines)) <= 80
    assert "layers of each file: 1 BF16 · 1 Q8_0 · 1 Q4_K" in lines
    text = " ".join(" ".join(lines).split())
    assert "The files are not of one size: 1,000 to 1,001 bytes." in text
    assert "Among 6 plans" in text
    assert "the plan is number 4 by KLD" in text
    assert "with probability 0.67" in text
    assert "Worse than the plan: random 3, random 4, inverted." in text
    assert "Better than the plan: random 0, random 1, last." in text
    assert "Not to be told from the plan: first." in text
    assert "The plan itself under another name: random 2, variance." in text
    rows = [line.split() for line in lines if "±0.00012" in line]
    assert [row[0] for row in rows[-3:]] == ["random", "random", "inverted"]
    assert rows[-1][-1] == "1,000"
    assert "are not shown to be a better choice than chance's" in text


def test_few_windows_and_few_permutations_are_said():
    plan = study_file("ewq", [0.01] * 8)
    one = study_file("random 0", [0.02] * 8)
    many = [("random", i, study_file(f"random {i}", [0.02] * 8)) for i in range(19)]

    few = " ".join(controls_sentences(controls_of(plan, [("random", 0, one)])))
    enough = " ".join(controls_sentences(controls_of(plan, many)))

    assert "with 1 random ones it cannot be less than 0.50" in few
    assert "are not shown to be a better choice than chance's" in few
    assert "With 8 windows the intervals are too narrow" in few
    assert "with probability 0.05." in enough
    assert "are a better choice than chance's" in enough


def test_a_plan_worse_than_all_of_19_random_ones_is_not_called_better():
    plan = study_file("ewq", [0.03] * 8)
    many = [("random", i, study_file(f"random {i}", [0.02] * 8)) for i in range(19)]

    said = " ".join(controls_sentences(controls_of(plan, many)))

    assert "with probability 1.00." in said
    assert "are not shown to be a better choice than chance's" in said


def test_factors_that_plan_the_same_share_a_line():
    same = scaled("0.5", 0.02)
    other = study_file("1.0", [0.01] * 4, types=("BF16", "BF16", "Q4_K"))
    files = [(0.5, same), (0.6, same.model_copy(update={"label": "0.6"})), (1.0, other)]
    sweep = FactorSweep(files=tuple(FactorFile(factor=x, file=f) for x, f in files))

    lines = shown(sweep)

    assert max(map(len, lines)) <= 80
    assert lines[-2].startswith("0.5 - 0.6")
    assert lines[-1].split()[0] == "1"
    assert lines[-1].endswith("2 BF16 · 1 Q4_K")


def test_a_picture_names_what_no_smaller_preset_beats_and_every_best_file():
    def file(label, size, kld, source="preset"):
        return FrontierFile(
            source=source,
            budget="Q5_K_M" if source == "optimal" else None,
            limit_bytes=None,
            has_imatrix=True,
            file=study_file(label, [kld], size=size),
        )

    found = Frontier(
        files=(
            file("Q6_K", 300, 0.01),
            file("optimal Q5_K_M", 210, 0.02, "optimal"),
            file("ewq Q5_K_M", 205, 0.001, "ewq"),
            file("Q5_K_M", 200, 0.03),
            file("Q5_0", 200, 0.05),
            file("Q4_1", 190, 0.04),
        ),
        ratio=None,
    )

    names = [one.file.label for one in named(found)]

    assert names == ["Q4_1", "Q5_K_M", "optimal Q5_K_M", "Q6_K"]
