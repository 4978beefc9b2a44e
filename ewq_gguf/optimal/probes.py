"""What a unit of each tensor's error costs: roles probed, then halves of the costly."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ewq_gguf.bench.reference_run import cached_reference
from ewq_gguf.bench.runner import Request
from ewq_gguf.optimal.prober import probe
from ewq_gguf.optimal.sensitivity import Group, halves, next_groups, roles_of, slopes
from ewq_gguf.records.probe import Probe
from ewq_gguf.stages.options import Options, Progress

#: Every float matrix whose rows are whole blocks of 32 can be this; its error is that
#: of the four bits around which files are wanted.
PROBE_TYPE = "Q4_0"
#: Its error is a hundredth of that.
_FINE_TYPE = "Q8_0"
#: Share of a probe's cost that is its own at least.
_LEAST_OWN = 0.2
#: Windows that a probe is measured on.
N_WINDOWS = 4
#: A group that costs less of the whole is not looked into.
_LEAST_SHARE = 0.004
#: Groups that are halved before the clock is looked at again.
_MAX_HALVED = 12


@dataclass
class Prober:
    """Moves tensors of a base to what a type holds, and measures what that costs.

    Attributes:
        base: the base GGUF.
        request: the text, how models are loaded, and the base's reference; without one
            the base runs along.
        lib_dir: holds ggml's quantisers.
        options: for the whole run; its matrix weighs columns.
        progress: who is told.
        n_probes: that were asked for.
        noise_nats: that any move costs, however small: the base's own 16-bit rounding
            falls otherwise. It is taken off what is found.
    """

    base: Path
    request: Request
    lib_dir: Path
    options: Options
    progress: Progress
    n_probes: int = 0
    noise_nats: float = 0.0

    @classmethod
    def of(
        cls,
        request: Request,
        lib_dir: Path,
        *,
        options: Options,
        progress: Progress,
    ) -> Prober:
        """With the base's reference, made on first use, where it can have one."""
        base = request.base
        assert base is not None
        request = replace(request, tasks=("kld",), n_chunks=N_WINDOWS)
        reference = cached_reference(
            base, request, lambda: progress.measure(f"reference {base.name}")
        )
        request = replace(request, reference=reference)
        return cls(base, request, lib_dir, options, progress)

    def __call__(
        self, wanted: Iterable[tuple[Group, str]]
    ) -> dict[tuple[Group, str], float]:
        """Nats that each group of tensors costs in a type, all others as in the base.

        Raises:
            EwqError: as of `bench.probing.probe`.
        """
        found = self.with_noise(wanted)
        return {key: self.without_noise(cost) for key, cost in found.items()}

    def with_noise(
        self, wanted: Iterable[tuple[Group, str]]
    ) -> dict[tuple[Group, str], float]:
        """The same with what any move costs."""
        probes = {
            (group, ggml_type): Probe(
                name=f"{ggml_type} {' '.join(group)}",
                tensors=group,
                ggml_type=ggml_type,
            )
            for group, ggml_type in wanted
        }
        if not probes:
            return {}
        self.n_probes += len(probes)
        with self.progress.measure(f"{len(probes)} probes") as tell:
            found = probe(
                self.base,
                list(probes.values()),
                self.request,
                lib_dir=self.lib_dir,
                imatrix=self.options.imatrix,
                on_progress=tell,
            )
        return {key: found[one.name].kld_mean_nats for key, one in probes.items()}

    def without_noise(self, cost_nats: float) -> float:
        """A probe's own cost; never nothing, so that no type is ever free."""
        return max(cost_nats - self.noise_nats, _LEAST_OWN * cost_nats)


def probe_slopes(
    prober: Prober, errors: Mapping[str, float], deadline: float
) -> dict[str, float]:
    """Nats per unit of each tensor's error.

    Args:
        prober: of the model.
        errors: of each tensor that matters, in the probes' type.
        deadline: of `time.monotonic`; the roles are probed whatever it is.

    Raises:
        EwqError: as of `bench.probing.probe`.
    """

    def costs(groups: Iterable[Group]) -> dict[Group, float]:
        found = prober((group, PROBE_TYPE) for group in groups)
        return {group: cost for (group, _), cost in found.items()}

    if not errors:
        return {}
    leaves = costs(roles_of(errors))
    # What is never computed with costs nothing at all, and tells nothing.
    used = [group for group, cost in leaves.items() if cost > 0]
    if used:
        cheapest = min(used, key=lambda group: leaves[group])
        nearly_nothing = (cheapest[len(cheapest) // 2],)
        (prober.noise_nats,) = prober([(nearly_nothing, _FINE_TYPE)]).values()
    leaves = {group: prober.without_noise(cost) for group, cost in leaves.items()}
    while time.monotonic() < deadline:
        large = next_groups(leaves, _LEAST_SHARE)[:_MAX_HALVED]
        if not large:
            break
        parts = costs(half for group in large for half in halves(group))
        for group in large:
            del leaves[group]
        leaves |= parts
    return slopes(leaves, errors)
