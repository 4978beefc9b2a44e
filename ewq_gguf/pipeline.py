"""The main path as a handful of functions: what `ewq gguf` and a library user call.

    checkpoint -> Scan -> Plan -> base GGUF -> mixed GGUF -> Verification

Scans, layouts and base files are kept in the cache by what they depend on, so a second
run does only what changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ewq_gguf import store
from ewq_gguf._version import __version__
from ewq_gguf.checkpoint.cluster import scan_on_cluster
from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.checkpoint.scan import Work, scan_checkpoint
from ewq_gguf.checkpoint.source import Opening, open_checkpoint
from ewq_gguf.errors import (
    ChildError,
    InputError,
    ToolError,
    UsageError,
    VerificationError,
)
from ewq_gguf.ggml_types import tensor_bytes
from ewq_gguf.llamacpp.convert import (
    base_type,
    check_is_local,
    convert,
    converter_architectures,
)
from ewq_gguf.llamacpp.layout import cached_layout, layout_of
from ewq_gguf.llamacpp.quantize import quantize
from ewq_gguf.llamacpp.toolchain import LLAMA_CPP_COMMIT, Toolchain, find_toolchain
from ewq_gguf.llamacpp.verify import can_load, verify_file
from ewq_gguf.plan.ask import Ask
from ewq_gguf.plan.build import make_plan
from ewq_gguf.plan.check import check_sound
from ewq_gguf.plan.naming import nearest_preset, plan_name
from ewq_gguf.plan.policy import check_policy
from ewq_gguf.plan.sizes import base_info_bytes, header_bytes, padded
from ewq_gguf.process import N_CPUS
from ewq_gguf.records import (
    EwqPolicy,
    Layout,
    Measures,
    Plan,
    Policy,
    RulePolicy,
    Scan,
    TensorScan,
    Verification,
    load_cached,
    read_journal,
)
from ewq_gguf.tensor_names import ARCHITECTURES


class Progress(Protocol):
    """Who is told how far long work is."""

    def note(self, text: str) -> None:
        """Say something once."""

    def stage(
        self, name: str, total_bytes: int | None = None
    ) -> AbstractContextManager[Callable[[float], None]]:
        """Begin a stage; the function it gives is told the share done, 0 to 1."""


class Silent:
    """Progress that nobody sees."""

    def note(self, text: str) -> None:
        """Say nothing."""

    @contextmanager
    def stage(
        self, name: str, total_bytes: int | None = None
    ) -> Iterator[Callable[[float], None]]:
        """Show nothing."""
        yield lambda share: None


SILENT = Silent()


@dataclass(frozen=True)
class Options:
    """What holds for a whole run.

    Attributes:
        n_threads: for reading, counting and quantising.
        llama_cpp: the user's own llama.cpp, or None.
        allow_nonfinite: count NaN and infinite weights instead of refusing them.
        force: replace outputs made from other inputs.
        load: load the finished file and let it answer.
        is_streamed: leave the weights on their server; only scans and plans can.
        scheduler: the Dask scheduler whose workers scan, or None for this machine.
    """

    n_threads: int = N_CPUS
    llama_cpp: Path | None = None
    allow_nonfinite: bool = False
    force: bool = False
    load: bool = True
    is_streamed: bool = False
    scheduler: str | None = None


@dataclass(frozen=True)
class Made:
    """What `make_gguf` made.

    Attributes:
        path: of the GGUF.
        plan: it was made from.
        plan_path: where the plan was written; None where it was given.
        verification: of the file.
        preset_bytes: sizes of the standard presets, by name, and of the base type.
        is_reused: whether the file was there already, valid and of the same plan.
    """

    path: Path
    plan: Plan
    plan_path: Path | None
    verification: Verification
    preset_bytes: dict[str, int]
    is_reused: bool


def open_model(
    model: str, *, options: Options | None = None, progress: Progress = SILENT
) -> Checkpoint:
    """Find a model; one that neither the names nor the converter know is refused."""
    options = options or Options()
    architectures = frozenset(ARCHITECTURES)
    with suppress(ToolError):
        toolchain = find_toolchain(options.llama_cpp)
        architectures |= converter_architectures(toolchain)
    opening = Opening(architectures, options.is_streamed, progress.note)
    return open_checkpoint(model, opening)


def scan(
    checkpoint: Checkpoint,
    measures: Measures | None = None,
    *,
    part: tuple[int, int] | None = None,
    options: Options | None = None,
    progress: Progress = SILENT,
) -> Scan:
    """Measure a checkpoint, or take the cached scan of the same unchanged files.

    Each tensor's numbers are kept as soon as they are known, so a scan that was
    killed goes on where it was.

    Args:
        checkpoint: opened by `open_model`.
        measures: parameters of the measures; the paper's by default.
        part: (index from 1, count): only that part, for `merge_scans`.
        options: for the whole run.
        progress: who is told.
    """
    options, measures = options or Options(), measures or Measures()
    layout, maker = None, ""
    if not checkpoint.is_mapped_by_name:
        toolchain = find_toolchain(options.llama_cpp)
        layout, maker = layout_for(checkpoint, toolchain, progress), toolchain.key
    key = store.sha256_text(
        f"{__version__} {checkpoint.signature} {measures.model_dump_json()} "
        f"{options.allow_nonfinite} {part} {maker}"
    )
    path = store.cache_dir("scans") / f"{key[:32]}.json"
    with store.locked(path, stage="scan", wait=True):
        if (kept := load_cached(Scan, path, "scan")) is not None:
            return kept
        journal = path.with_suffix(".journal")
        known = read_journal(journal, TensorScan)
        if known:
            progress.note(f"{len(known)} tensors were measured before")
        sizes = {t.name: t.end - t.begin for _, t in checkpoint.tensors}
        total = sum(sizes.values()) // (part[1] if part else 1)
        done = sum(sizes[name] for entry in known.values() for name in entry.hf_names)
        with (
            journal.open("a", encoding="utf-8") as file,
            progress.stage("scan", total) as share,
        ):

            def on_bytes(n_bytes: int) -> None:
                nonlocal done
                done += n_bytes
                share(min(done / total, 1.0))

            def on_tensor(entry: TensorScan) -> None:
                file.write(entry.model_dump_json() + "\n")
                file.flush()

            work = Work(
                n_threads=options.n_threads,
                allow_nonfinite=options.allow_nonfinite,
                part=part,
                known=known,
                on_bytes=on_bytes,
                on_tensor=on_tensor,
            )
            result = (
                scan_on_cluster(options.scheduler, checkpoint, measures, layout, work)
                if options.scheduler
                else scan_checkpoint(checkpoint, measures, layout=layout, work=work)
            )
        store.write_text(path, result.to_json(), stage="scan", force=True)
        journal.unlink(missing_ok=True)
    return result


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
        layout = cached_layout(source.model.fingerprint, LLAMA_CPP_COMMIT)
        return make_plan(source, policy, layout, raw_type=raw_type, budget=budget)
    try:
        layout = layout_for(source, find_toolchain(options.llama_cpp), progress)
    except (ToolError, ChildError, InputError) as error:
        progress.note(f"{error}; the file's size is an estimate without its header")
        layout = None
    measured = scan(source, policy_measures(policy), options=options, progress=progress)
    if layout is not None:
        check_layout(measured, layout)
    return make_plan(measured, policy, layout, raw_type=raw_type, budget=budget)


def policy_measures(policy: Policy) -> Measures:
    """The measures a policy decides by."""
    if isinstance(policy, EwqPolicy):
        return Measures(epsilon=policy.epsilon, n_bins=policy.n_bins)
    return Measures()


def plan_file(plan: Plan) -> Path:
    """Where a plan is written by default: `plans/NAME.POLICY.json`."""
    return Path("plans") / f"{plan_name(plan)}.json"


def base_file(
    checkpoint: Checkpoint,
    toolchain: Toolchain,
    *,
    progress: Progress = SILENT,
) -> Path:
    """The base GGUF of a checkpoint in the cache, made on first use; or itself."""
    if checkpoint.identity.is_gguf:
        checkpoint.check_unchanged("quantize")
        return checkpoint.shards[0].path
    outtype = base_type(checkpoint)
    key = store.sha256_text(f"{checkpoint.signature} {outtype} {toolchain.key}")
    name = f"{checkpoint.identity.name}-{outtype}-{key[:16]}.gguf"
    path = store.cache_dir("base") / name
    with store.locked(path, stage="convert", wait=True):
        if not _is_sound(path):
            with progress.stage("convert") as share:
                convert(checkpoint, toolchain, path, outtype=outtype, on_progress=share)
    return path


def make_gguf(
    model: str,
    out: Path | None = None,
    policy: RulePolicy | Plan | None = None,
    *,
    raw_type: str = "auto",
    budget: Ask | None = None,
    options: Options | None = None,
    progress: Progress = SILENT,
) -> Made:
    """Everything: scan, plan, convert, quantise, verify; reusing what is there.

    Args:
        model: a folder, a .safetensors or .gguf file, a Hub id, or `demo`.
        out: of the GGUF; None for `NAME-EWQ-<nearest preset>.gguf` here.
        policy: how to plan, or a finished plan; None for the paper's.
        raw_type: what `raw` means: `F16`, `BF16` or `auto`.
        budget: what the file may take.
        options: for the whole run.
        progress: who is told.

    Raises:
        EwqError: of the stage that failed, with what to do.
    """
    options = options or Options()
    policy = policy or EwqPolicy()
    if out is not None:
        store.check_writable(out, "gguf")
    if isinstance(policy, Plan):
        check_sound(policy)
    else:
        check_policy(policy, has_budget=budget is not None)
    toolchain = find_toolchain(options.llama_cpp)
    checkpoint = open_model(model, options=options, progress=progress)
    check_is_local(checkpoint)
    inputs = [shard.path for shard in checkpoint.shards]
    if out is not None:
        store.check_distinct(out, inputs, "gguf")
    layout = layout_for(checkpoint, toolchain, progress)
    plan_path = None
    measures = policy_measures(policy.policy if isinstance(policy, Plan) else policy)
    measured = scan(checkpoint, measures, options=options, progress=progress)
    if isinstance(policy, Plan):
        made_plan = policy
        check_plan(made_plan, measured, force=options.force)
    else:
        check_layout(measured, layout)
        made_plan = make_plan(
            measured, policy, layout, raw_type=raw_type, budget=budget
        )
        plan_path = plan_file(made_plan)
    presets = {**layout.preset_bytes, base_type(checkpoint): layout_bytes(layout)}
    out = out or Path(
        f"{made_plan.model.name}-EWQ-"
        f"{nearest_preset(made_plan.totals.file_size_bytes, presets)}.gguf"
    )
    store.check_distinct(out, inputs, "gguf")
    with store.locked(out, stage="gguf"):
        reused = _existing(made_plan, out, options)
        if plan_path is not None:
            store.write_text(
                plan_path, made_plan.to_json(), stage="plan", force=options.force
            )
        if reused is None:
            base = base_file(checkpoint, toolchain, progress=progress)
            with progress.stage("quantize") as share:
                verification = quantize(
                    made_plan,
                    base,
                    out,
                    toolchain,
                    n_threads=options.n_threads,
                    load=options.load,
                    on_progress=share,
                )
            _keep(made_plan, verification)
    return Made(
        path=out,
        plan=made_plan,
        plan_path=plan_path,
        verification=reused or verification,
        preset_bytes=presets,
        is_reused=reused is not None,
    )


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


def layout_bytes(layout: Layout) -> int:
    """Size of the base GGUF."""
    infos = ((tensor.name, tensor.shape) for tensor in layout.tensors)
    return header_bytes(layout.kv_bytes, infos, base_info_bytes) + sum(
        padded(tensor_bytes(tensor.ggml_type, tensor.shape))
        for tensor in layout.tensors
    )


def layout_for(
    checkpoint: Checkpoint, toolchain: Toolchain, progress: Progress
) -> Layout:
    """The cached layout of a checkpoint, or the converter is asked for it now."""
    known = cached_layout(checkpoint.identity.fingerprint, toolchain.key)
    if known is not None:
        return known
    with progress.stage("ask llama.cpp for the file's header"):
        return layout_of(checkpoint, toolchain)


def _existing(plan: Plan, out: Path, options: Options) -> Verification | None:
    """The verification of a file that is there and still what this plan says."""
    if not out.exists():
        return None
    try:
        if read_gguf(out).kv.get("ewq.plan.sha256") == plan.sha256:
            known = load_cached(Verification, _verification_path(plan), "verify")
            is_damaged = known and known.file_sha256 != store.sha256_file(out)
            must_load = options.load and can_load()
            if known and not is_damaged and (known.answer or not must_load):
                return known
            if not is_damaged:
                return _keep(plan, verify_file(plan, out, load=options.load))
    except (VerificationError, InputError):
        pass  # damaged or not a GGUF: treated as somebody else's file
    if options.force:
        return None
    raise UsageError(
        "gguf",
        out,
        "exists and was made from another plan, or is damaged",
        "use --force to replace it, or another -o",
    )


def _is_sound(base: Path) -> bool:
    """Whether a cached base GGUF is there and whole."""
    try:
        read_gguf(base)
    except (VerificationError, InputError):
        return False
    return True


def _keep(plan: Plan, verification: Verification) -> Verification:
    """Remember what was verified, for the next run."""
    path = _verification_path(plan)
    store.write_text(path, verification.to_json(), stage="verify", force=True)
    return verification


def _verification_path(plan: Plan) -> Path:
    return store.cache_dir("verifications") / f"{plan.sha256}.json"
