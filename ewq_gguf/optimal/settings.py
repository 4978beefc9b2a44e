"""Tuning constants of policy `optimal`, in one place; tests make a search smaller.

Times are shares of the effort that the user allows. Costs are mean KL divergences from
the base, in nats per token. Where no source is named, the value was chosen on the
built-in model and was not varied.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SearchSettings:
    """Constants of the search.

    Attributes:
        n_search_documents: documents that the model writes for the text that probes and
            all candidates are measured on.
        n_final_documents: documents of the text that the finalists are compared on.
        n_probe_windows: windows of the search text that a probe is measured on.
        n_search_windows: windows of the search text that a candidate is measured on.
        n_final_windows: windows of the final text that a finalist is measured on.
        device_memory_factor: memory that a model takes while it is measured, in
            sizes of its file: the weights, buffers, and a short cache.

        min_bits_share: share of the file's mean bits per weight, below which a type is
            left out: a tensor would get it by mistake only, and types of few bits take
            the longest to try.
        max_sampled_weights: weights of the model's sampled rows at most, of which the
            error table is made.
        min_row_share: share of the rows that are sampled at least, of a large model.
        latency_noise: relative standard deviation of a measured time.
        latency_type_std: the same of a type's time per weight around the one that its
            bits predict.
        latency_constant_std: the same of the time that no type changes, as a share of a
            token's whole time.

        probe_time_share: share of the effort that all probes may take.
        slope_time_share: share of the probes' time for the tensors' slopes; the rest is
            for the types that the solver selects.
        rounding_time_share: share of the effort for files that show what rounding
            activations costs.

        probe_type: type that every tensor is probed in first. Every float matrix whose
            rows are whole blocks of 32 can have it, and its error is that of the four
            bits that files are mostly wanted at.
        fine_type: type whose error is about a hundredth of that; a tensor in it
            shows what any change of the weights costs, however small.
        own_cost_share: share of a probe's cost that is the tensors' own at least, after
            the cost of any change is subtracted.
        slope_min_share: share of the whole cost, below which a group of tensors is not
            halved.
        slope_max_halved: groups that are halved before the clock is read again.
        doubt_ratio: factor by which a type's error, relative to the probe type's, may
            differ with and without the importance matrix; beyond it the tensor needs a
            probe in that type (docs/research-log.md, `python -m benchmarks.probes`).
        unprobed_cost_share: share of the estimated cost that a type is assumed to have
            before it is probed: the least that probes found on the built-in model.
        type_min_share: share of the selection's cost, below which a role in a type is
            not probed.
        type_max_probes: probes before the clock is read again.

        rounding_min_share: share of the whole rounding cost, below which a group of
            tensors is not halved.
        rounding_max_halved: groups that are halved before the clock is read again, of
            each length of the activations' blocks.

        prior_std: standard deviation of each of the four parts of a cost multiplier
            (common, by role, by type, by both). Together 0.4: probes are that far off
            now and then.
        noise: relative standard deviation of a file's divergence around the sum of its
            tensors' costs.
        min_multiplier: least cost multiplier: no error improves a model.
        floor_preset: preset whose weights are nearly exact; what its file costs beyond
            them is the floor that every quantised file pays.

        n_proposed: selections of a round: the cheapest one, and others drawn from the
            posterior.
        n_rounds: rounds of proposals at most.
        min_gain: relative gain of a round, below which it is the last one.
        n_finalists: proposed files that are compared on the final text.
        n_std_excluded: a baseline that is predicted to be worse than the best by as
            many standard deviations is not measured.
        n_always_measured: baselines that are measured whatever is predicted, the most
            promising ones.
        n_speed_rounds: further rounds where no file was fast enough.
        speed_margin: factor on the time of a token in such a round, beyond the
            ratio that the files were too slow by.
        speed_tolerance: a baseline that is predicted to be slower by more, relative to
            the speed asked for, is not measured.
    """

    # Texts, windows and devices.
    n_search_documents: int = 32
    n_final_documents: int = 64
    n_probe_windows: int = 4
    n_search_windows: int = 8
    n_final_windows: int = 32
    device_memory_factor: float = 1.2
    # Types, their errors and their speeds.
    min_bits_share: float = 0.45
    max_sampled_weights: int = 40_000_000
    min_row_share: float = 0.02
    latency_noise: float = 0.02
    latency_type_std: float = 0.5
    latency_constant_std: float = 0.3
    # Time.
    probe_time_share: float = 0.5
    slope_time_share: float = 0.6
    rounding_time_share: float = 0.2
    # Probes of the weights' errors.
    probe_type: str = "Q4_0"
    fine_type: str = "Q8_0"
    own_cost_share: float = 0.2
    slope_min_share: float = 0.004
    slope_max_halved: int = 12
    doubt_ratio: float = 2.0
    unprobed_cost_share: float = 0.25
    type_min_share: float = 0.01
    type_max_probes: int = 24
    # Rounding of activations.
    rounding_min_share: float = 0.04
    rounding_max_halved: int = 2
    # The predictor.
    prior_std: float = 0.2
    noise: float = 0.05
    min_multiplier: float = 0.1
    floor_preset: str = "Q8_0"
    # The selection among candidates.
    n_proposed: int = 4
    n_rounds: int = 6
    min_gain: float = 0.01
    n_finalists: int = 3
    n_std_excluded: float = 3.0
    n_always_measured: int = 3
    n_speed_rounds: int = 3
    speed_margin: float = 0.98
    speed_tolerance: float = 0.1


#: Settings of a search that is given no others.
DEFAULT = SearchSettings()
