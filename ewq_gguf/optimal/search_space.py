"""Everything that a file may be: types by tensor, its size, and the user's bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ewq_gguf.errors import UsageError
from ewq_gguf.ggml_types import tensor_bytes
from ewq_gguf.optimal.allocation import solve_allocation
from ewq_gguf.optimal.candidate_types import (
    CandidateTypes,
    candidate_types,
    candidate_types_within,
    fixed_bytes,
    keeps_bounds,
    min_file_bytes,
    quantizable,
)
from ewq_gguf.optimal.latency import LatencyTarget
from ewq_gguf.optimal.settings import SearchSettings
from ewq_gguf.plan.assemble import assemble
from ewq_gguf.plan.model_tensors import ModelTensors
from ewq_gguf.plan.size_target import SizeLimit, SizeTarget
from ewq_gguf.plan.sizes import padded
from ewq_gguf.records import Budget, OptimalPolicy, Plan
from ewq_gguf.tensor_names import nearest_name, role

#: Words of a message about a size that no file has.
_REACH, _OTHER = "these types reach", "other --types, --floor or --ceiling"


@dataclass(frozen=True)
class SearchSpace:
    """The files among which the best one is searched for.

    Attributes:
        model: model that is planned.
        policy: parameters of the policy.
        limit: bytes of the whole file; the smallest types keep it.
        types: types that each quantisable tensor may have.
        latency_target: time that a token may take; None for any.
    """

    model: ModelTensors
    policy: OptimalPolicy
    limit: SizeLimit
    types: CandidateTypes
    latency_target: LatencyTarget | None = None

    @classmethod
    def of(
        cls,
        model: ModelTensors,
        policy: OptimalPolicy,
        target: SizeTarget,
        settings: SearchSettings,
        *,
        has_entries: bool = False,
    ) -> SearchSpace:
        """The space of a size that the user asks for.

        Args:
            model: model that is planned.
            policy: parameters of the policy.
            target: size as it was asked for.
            settings: constants of the search.
            has_entries: whether an importance matrix with every entry will be there.

        Raises:
            InputError: the types do not reach the size.
            UsageError: a bound names a role that the model does not have.
        """
        types = candidate_types(model, policy, has_entries=has_entries)
        _check_roles(policy, types)
        most = fixed_bytes(model) + sum(
            padded(tensor_bytes(model.raw_type, tensor.shape))
            for tensor in quantizable(model)
        )
        limit = target.limit(most, model.tensors)
        limit.check_reached(min_file_bytes(model, types), most, _REACH, _OTHER)
        limit = replace(limit, n_bytes=min(limit.n_bytes, most))
        # A file that has to be fast may have to be far smaller.
        if not policy.min_tps and not has_entries:
            types = candidate_types_within(model, policy, limit.n_bytes, settings)
        return cls(model, policy, limit, types)

    def solve(self, costs: Mapping[str, Mapping[str, float]]) -> dict[str, str] | None:
        """The types that cost least within the limits; None where none keep them.

        Args:
            costs: nats by tensor and type; other types are left out.
        """
        allowed = {
            name: {ggml_type: costs[name][ggml_type] for ggml_type in types}
            for name, types in self.types.items()
        }
        return solve_allocation(
            self.model, allowed, self.limit.n_bytes, self.latency_target
        )

    def plan(self, types: Mapping[str, str], *, has_imatrix: bool = True) -> Plan:
        """The plan of a file with these types, by quantisable tensor.

        Args:
            types: type by tensor.
            has_imatrix: whether it is made with the importance matrix.
        """
        limit = self.limit
        budget = Budget(
            asked=limit.asked,
            limit_bytes=limit.n_bytes,
            n_ctx=limit.n_ctx,
            context_bytes=limit.context_bytes,
        )
        model = self.model
        if not has_imatrix:
            model = replace(model, importance=None)
        return assemble(model, self.policy, types, budget=budget)

    def allows(self, plan: Plan) -> bool:
        """Whether a baseline's file is small enough, and has no excluded type."""
        return plan.totals.file_size_bytes <= self.limit.n_bytes and keeps_bounds(
            self.policy, quantizable_types(plan), self.model.raw_type
        )

    def is_too_slow(self, plan: Plan, tolerance: float = 0.0) -> bool:
        """Whether a file is predicted to be slower than the user asks for.

        Args:
            plan: plan of the file.
            tolerance: relative excess of a token's time that is not held against it.
        """
        target, min_tps = self.latency_target, self.policy.min_tps
        if target is None or not min_tps:
            return False
        seconds = target.latency.seconds(quantizable_types(plan), target.weights)
        return seconds > (1 + tolerance) / min_tps


def quantizable_types(plan: Plan) -> dict[str, str]:
    """Types of the quantisable tensors as they are in the file."""
    return {t.name: t.written_type for t in plan.tensors if t.is_quantizable}


def _check_roles(policy: OptimalPolicy, types: Mapping[str, object]) -> None:
    """Refuse bounds of roles that the model does not have.

    Raises:
        UsageError: with the role's name.
    """
    roles = {role(name) for name in types}
    for option, bounds in (("--floor", policy.floors), ("--ceiling", policy.ceilings)):
        for unknown in bounds.keys() - roles - {"*"}:
            raise UsageError(
                "plan",
                option,
                f"there is no role {unknown!r} that is quantised",
                f"did you mean {nearest_name(unknown, roles)}?",
            )
