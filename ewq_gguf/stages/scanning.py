"""From a model to its scan, kept in the cache."""

from __future__ import annotations

from collections.abc import Callable

from ewq_gguf import store
from ewq_gguf._version import __version__
from ewq_gguf.errors import VerificationError
from ewq_gguf.plan.lattice import lattices_of
from ewq_gguf.records import (
    EwqPolicy,
    Layout,
    Measures,
    Policy,
    Scan,
    TensorScan,
    load_cached,
    open_journal,
    read_journal,
)
from ewq_gguf.stages.choosing import same_tensors
from ewq_gguf.stages.run import Run


def policy_measures(policy: Policy) -> Measures:
    """The measures a policy decides by."""
    if isinstance(policy, EwqPolicy):
        return Measures(epsilon=policy.epsilon, n_bins=policy.n_bins)
    return Measures()


def scan(
    run: Run, measures: Measures | None = None, *, part: tuple[int, int] | None = None
) -> Scan:
    """Measure a checkpoint, or take the cached scan of the same unchanged files.

    Each tensor's numbers are kept as soon as they are known, so a scan that was
    killed goes on where it was.

    Args:
        run: the model and the options.
        measures: parameters of the measures; the paper's by default.
        part: (index from 1, count): only that part, for `merge_scans`.

    Raises:
        EwqError: the model cannot be read, or holds NaN or infinity.
    """
    checkpoint, measures = run.checkpoint, measures or Measures()
    layout = None if checkpoint.is_mapped_by_name else run.layout
    key = store.cache_key(
        *(__version__, same_tensors(checkpoint).signature, measures.model_dump_json()),
        *(run.options.allow_nonfinite, part, run.toolchain.key if layout else ""),
    )
    path = store.cache_dir("scans") / f"{key[:32]}.json"
    with store.locked(path, stage="scan", wait=True):
        if (cached := load_cached(Scan, path, "scan")) is not None:
            return cached.model_copy(update={"model": checkpoint.identity})
        journal = path.with_suffix(".journal")
        measured = read_journal(journal, TensorScan)
        if measured:
            run.progress.note(f"{len(measured)} tensors were measured before")
        with open_journal(journal) as keep:
            result = _scanned(run, measures, layout, part, measured, keep)
        store.write_text(path, result.to_json(), stage="scan", force=True)
        journal.unlink(missing_ok=True)
    return result


def _scanned(
    run: Run,
    measures: Measures,
    layout: Layout | None,
    part: tuple[int, int] | None,
    measured: dict[str, TensorScan],
    keep: Callable[[TensorScan], None],
) -> Scan:
    """The scan, from what was measured before and what is measured now."""
    from ewq_gguf.checkpoint.scan import Work, scan_checkpoint  # numba: not for plans

    checkpoint, options = run.checkpoint, run.options
    sizes = {t.name: t.end - t.begin for _, t in checkpoint.tensors}
    total = sum(sizes.values()) // (part[1] if part else 1)
    done = sum(sizes[name] for entry in measured.values() for name in entry.hf_names)
    with run.progress.stage("scan", total) as share:

        def on_bytes(n_bytes: int) -> None:
            nonlocal done
            done += n_bytes
            share(min(done / total, 1.0))

        work = Work(
            n_threads=options.n_threads,
            allow_nonfinite=options.allow_nonfinite,
            part=part,
            known=measured,
            on_bytes=on_bytes,
            on_tensor=keep,
        )
        if options.scheduler:
            from ewq_gguf.checkpoint.dask_scan import scan_on_cluster

            return scan_on_cluster(
                options.scheduler, checkpoint, measures, layout, work
            )
        return scan_checkpoint(checkpoint, measures, layout=layout, work=work)


def find_lattices(run: Run) -> dict[str, tuple[str, ...]]:
    """Types that hold tensors exactly, where nothing else is measured of them.

    Nothing is known of weights that stay on their server.
    """
    if run.given_scan is not None:
        return lattices_of(run.given_scan)
    checkpoint = run.checkpoint
    if any(shard.remote for shard in checkpoint.shards):
        return {}
    from ewq_gguf.checkpoint import exact_types  # numba: not for other plans

    layout = None if checkpoint.is_mapped_by_name else run.layout
    with run.progress.stage("look for what is quantised already"):
        return exact_types.find_lattices(
            checkpoint, layout, n_threads=run.options.n_threads
        )


def check_layout(scan: Scan, layout: Layout) -> None:
    """The names, shapes and sources predicted from the headers are the converter's.

    The converter may add tensors that it computes (`rope_freqs`), nothing else.

    Raises:
        VerificationError: they are not; a plan would miss its tensors.
    """
    written = {
        tensor.name: (tensor.shape, {source.hf_name for source in tensor.sources})
        for tensor in layout.tensors
    }
    for tensor in scan.tensors:
        shape, sources = written.get(tensor.name, (None, set()))
        if shape != tensor.shape or not sources.issuperset(tensor.hf_names):
            raise VerificationError(
                "plan",
                tensor.name,
                f"predicted as {tensor.shape} of {', '.join(tensor.hf_names)}, the "
                f"converter writes {shape} of {sorted(sources)}",
                "report this checkpoint's config.json",
            )
