"""One spelling of policies: what is spelt is read as the same policy again."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ewq_gguf.errors import UsageError
from ewq_gguf.ggml_types import PLANNABLE
from ewq_gguf.plan.grammar import RULES, describe, form, label, parse, spell
from ewq_gguf.records import (
    ControlPolicy,
    EwqPolicy,
    FastEwqPolicy,
    GivenPolicy,
    ImportedPolicy,
    OptimalPolicy,
    Policy,
    PresetPolicy,
    ProbePolicy,
    RulePolicy,
    UniformPolicy,
)
from ewq_gguf.records.parameter import PolicyField, TypeParameter

EVERY = (*get_args(RulePolicy), *get_args(GivenPolicy))
TYPE = st.sampled_from((*PLANNABLE, "raw"))


def values(field: PolicyField) -> st.SearchStrategy[Any]:
    """What a field may hold, by its type and its bounds alone."""
    parameter = field.parameter
    if field.choices:
        return st.sampled_from(field.choices)
    if field.value_type is tuple:
        return st.lists(TYPE, min_size=2, max_size=12, unique=True).map(tuple)
    if field.value_type is dict:
        roles = st.sampled_from(("*", "attn_v", "ffn_down", "output"))
        return st.dictionaries(roles, TYPE)
    if field.value_type is str:
        text = st.text(st.characters(exclude_categories=["Cs"]))
        text = TYPE if isinstance(parameter, TypeParameter) else text
        return text.filter(bool) if field.is_required else text
    low = parameter.least if parameter.above is None else parameter.above
    numbers: st.SearchStrategy[Any] = st.floats(
        low,
        parameter.most,
        exclude_min=parameter.above is not None,
        allow_nan=False,
        allow_infinity=False,
    )
    if field.value_type is int:
        numbers = st.integers(int(low or 0), int(parameter.most or 2**63))
    return numbers if field.default is not None else st.none() | numbers


def any_policy(rule: type[Policy]) -> st.SearchStrategy[Policy]:
    fields = rule.parameters().items()
    return st.builds(rule, **{name: values(field) for name, field in fields})


@given(st.one_of(*map(any_policy, EVERY)), st.sampled_from((None, "6GiB", "4.5bpw")))
def test_what_is_spelt_is_read_as_the_same(policy, budget):
    assert parse(spell(policy, budget)) == (policy, budget)


@given(st.one_of(*map(any_policy, EVERY)))
def test_a_label_is_part_of_a_file_name(policy):
    text = label(policy)

    assert 0 < len(text) <= 60
    assert not set(text) & set("/\\:@%+= \n")


def test_every_parameter_is_spelt_by_the_grammar():
    for rule in EVERY:
        fields = set(rule.model_fields) - {"name"}
        assert set(rule.parameters()) == fields


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("ewq", EwqPolicy()),
        ("ewq:tensor:x0.8", EwqPolicy(granularity="tensor", factor=0.8)),
        ("ewq:histogram:bins512:q75", EwqPolicy(
            measure="histogram", n_bins=512, rule="q75")),
        ("ewq:eps0.02:Q3_K+Q6_K+raw", EwqPolicy(
            epsilon=0.02, ladder=("Q3_K", "Q6_K", "raw"))),
        ("fastewq:train:low1", FastEwqPolicy(variant="train", n_low=1)),
        ("uniform:IQ2_XS:embd=Q4_K:out=Q6_K", UniformPolicy(
            ggml_type="IQ2_XS", embedding_type="Q4_K", output_type="Q6_K")),
        ("Q4_K_M", PresetPolicy(preset="Q4_K_M")),
        ("optimal:effort5:tps20:types=Q8_0+Q4_K:floor=attn_v=Q5_0:floor=Q4_0",
         OptimalPolicy(effort_minutes=5, min_tps=20, types=("Q8_0", "Q4_K"),
                       floors={"attn_v": "Q5_0", "*": "Q4_0"})),
        ("probe:layer 3:Q5_0", ProbePolicy(part="layer 3", ggml_type="Q5_0")),
        (f"control:random:seed0:{'ab' * 32}", ControlPolicy(
            order="random", seed=0, plan_sha256="ab" * 32)),
        (f"imported:gguf:file=a%3Ab.gguf:{'ab' * 32}", ImportedPolicy(
            source="gguf", file_name="a:b.gguf", file_sha256="ab" * 32)),
    ],
)  # fmt: skip
def test_policies_as_they_are_spelt(text, policy):
    assert spell(policy) == text
    assert parse(text) == (policy, None)


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("preset:q4_k_m", PresetPolicy(preset="Q4_K_M")),
        ("q8_0", PresetPolicy(preset="Q8_0")),
        ("uniform:q8_0", UniformPolicy(ggml_type="Q8_0")),
        ("ewq:softmax:layer:x1", EwqPolicy()),
        ("ewq:embd=RAW:x1e-3", EwqPolicy(embedding_type="raw", factor=0.001)),
    ],
)
def test_other_spellings_are_read_too(text, policy):
    assert parse(text) == (policy, None)


def test_a_budget_follows_an_at_sign():
    assert parse("optimal@60%") == (OptimalPolicy(), "60%")
    assert parse("fastewq@4.5bpw") == (FastEwqPolicy(), "4.5bpw")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("best", "unknown policy 'best'; use ewq"),
        ("ewq@", "unknown policy 'ewq@'"),
        ("ewq:", "'' of 'ewq:' is no parameter of it; use ewq[:histogram]"),
        ("ewq:x", "is no parameter of it"),
        ("ewq:tensor3", "is no parameter of it"),
        ("ewq:low2", "is no parameter of it"),
        ("ewq:x1.2.3", "'x1.2.3' of 'ewq:x1.2.3' is not a number;"),
        ("ewq:x1e999", "is not a number from 0 up"),
        ("ewq:bins1", "is not a number from 2 to 65536"),
        ("optimal:tps0", "is not a number above 0"),
        ("ewq:x1:x2", "is a second value of one parameter"),
        ("ewq:tensor:layer", "is a second value of one parameter"),
        ("uniform", "policy 'uniform' lacks its ggml_type; use uniform:TYPE"),
        ("Q4_K_M:x1", "unknown policy"),
    ],
)
def test_what_is_no_policy_is_refused(text, words):
    with pytest.raises(UsageError) as error:
        parse(text, "--plans")

    assert words in str(error.value)
    assert "--plans" in str(error.value)


def test_a_policy_is_described_with_the_values_it_has():
    assert describe(EwqPolicy(granularity="tensor")) == (
        "ewq:tensor (measure softmax, bins 256, epsilon 0.01, rule mean, "
        "granularity tensor, factor 1, ladder Q4_K+Q8_0+raw)"
    )
    assert describe(PresetPolicy(preset="Q4_K_M")) == "Q4_K_M"
    assert describe(OptimalPolicy()) == "optimal (effort 20)"


def test_forms_name_what_can_be_given():
    assert form(FastEwqPolicy) == (
        "fastewq[:train][:lowN][:T+T+...][:embd=TYPE][:out=TYPE]"
    )
    assert list(RULES) == ["ewq", "fastewq", "uniform", "preset", "optimal"]
