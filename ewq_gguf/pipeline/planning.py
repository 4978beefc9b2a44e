"""From a checkpoint or a scan to a plan."""

from __future__ import annotations

from pathlib import Path

from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.errors import (
    ChildError,
    InputError,
    ToolError,
    VerificationError,
)
from ewq_gguf.llamacpp.layout import cached_layout
from ewq_gguf.llamacpp.toolchain import LLAMA_CPP_COMMIT, find_toolchain
from ewq_gguf.pipeline.options import SILENT, Options, Progress
from ewq_gguf.pipeline.scanning import layout, scan
from ewq_gguf.plan.ask import Ask
from ewq_gguf.plan.build import make_plan
from ewq_gguf.plan.naming import plan_name
from ewq_gguf.plan.policy import check_policy
from ewq_gguf.records import (
    EwqPolicy,
    Layout,
    Measures,
    Plan,
    Policy,
    RulePolicy,
    Scan,
)


def plan(
    source: Checkpoint | Scan,
    policy: RulePolicy,
    *,
    raw_type: str = "auto",
    budget: Ask | None = None,
    options: Options | None = None,
    progress: Progress = SILENT,
) -> Plan:
    """Plan a checkpoint, or a scan of one, and predict the file's bytes.

    With a checkpoint and a toolchain the prediction is exact. From a Scan alone it is,
    where this machine has laid the same checkpoint out before; else an estimate.
    """
    options = options or Options()
    check_policy(policy, has_budget=budget is not None)
    if isinstance(source, Scan):
        laid_out = cached_layout(source.model.fingerprint, LLAMA_CPP_COMMIT)
        return make_plan(source, policy, laid_out, raw_type=raw_type, budget=budget)
    try:
        laid_out = layout(source, find_toolchain(options.llama_cpp), progress)
    except (ToolError, ChildError, InputError) as error:
        progress.note(f"{error}; the file's size is an estimate without its header")
        laid_out = None
    measured = scan(source, policy_measures(policy), options=options, progress=progress)
    if laid_out is not None:
        check_layout(measured, laid_out)
    return make_plan(measured, policy, laid_out, raw_type=raw_type, budget=budget)


def policy_measures(policy: Policy) -> Measures:
    """The measures a policy decides by."""
    if isinstance(policy, EwqPolicy):
        return Measures(epsilon=policy.epsilon, n_bins=policy.n_bins)
    return Measures()


def plan_file(plan: Plan) -> Path:
    """Where a plan is written by default: `plans/NAME.POLICY.json`."""
    return Path("plans") / f"{plan_name(plan)}.json"


def check_plan(plan: Plan, scan: Scan, *, force: bool = False) -> None:
    """Refuse a plan that was made for another checkpoint, or for other weights of it.

    Raises:
        InputError: files, headers or weights differ.
    """
    planned = (plan.model.fingerprint, plan.weights_sha256)
    found = (scan.model.fingerprint, scan.weights_sha256)
    for what, a, b in zip(("checkpoint", "weights"), planned, found, strict=True):
        if a is not None and a != b and not force:
            raise InputError(
                "plan",
                plan.model.name,
                f"the plan is for {what} {a[:12]}, here are {b[:12]}",
                "plan again, or use --force if you know that they match",
            )


def check_layout(scan: Scan, layout: Layout) -> None:
    """The names, shapes and sources predicted from the headers are the converter's.

    The converter may add tensors that it computes (`rope_freqs`), nothing else.

    Raises:
        VerificationError: they are not; a plan would miss its tensors.
    """
    found = {
        tensor.name: (tensor.shape, {source.hf_name for source in tensor.sources})
        for tensor in layout.tensors
    }
    for tensor in scan.tensors:
        shape, sources = found.get(tensor.name, (None, set()))
        if shape != tensor.shape or not sources.issuperset(tensor.hf_names):
            raise VerificationError(
                "plan",
                tensor.name,
                f"predicted as {tensor.shape} of {', '.join(tensor.hf_names)}, the "
                f"converter writes {shape} of {sorted(sources)}",
                "report this checkpoint's config.json",
            )
