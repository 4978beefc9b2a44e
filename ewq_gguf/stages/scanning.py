"""From a model's name to its scan and its layout, both kept in the cache."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress

from ewq_gguf import store
from ewq_gguf._version import __version__
from ewq_gguf.checkpoint.buffers import note_on_buffers
from ewq_gguf.checkpoint.completeness import check_complete
from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.leftovers import check_names
from ewq_gguf.checkpoint.lora.merge import open_merged
from ewq_gguf.checkpoint.source import Opening
from ewq_gguf.errors import InputError, ToolError
from ewq_gguf.llamacpp.convert import (
    converter_architectures,
)
from ewq_gguf.llamacpp.layout import cached_layout, layout_of
from ewq_gguf.llamacpp.toolchain import Toolchain, find_toolchain
from ewq_gguf.plan.lattice import lattices_of
from ewq_gguf.records import (
    Layout,
    Measures,
    Scan,
    TensorScan,
    load_cached,
    open_journal,
    read_journal,
)
from ewq_gguf.stages.choosing import (
    naming_the_nearest,
    say_fit,
    with_choices,
)
from ewq_gguf.stages.options import SILENT, Options, Progress
from ewq_gguf.tensor_names import ARCHITECTURES


def open_model(
    model: str,
    *,
    reads_weights: bool = True,
    options: Options | None = None,
    progress: Progress = SILENT,
) -> Checkpoint:
    """Find a model, merge the adapters there are; an unknown architecture is refused.

    Args:
        model: a folder, a .safetensors or .gguf file, a Hub id, a URL, or `demo`.
        reads_weights: if not, those on the Hub stay there.
        options: for the whole run.
        progress: who is told.
    """
    options = options or Options()
    architectures = frozenset(ARCHITECTURES)
    with suppress(ToolError):
        toolchain = find_toolchain(options.llama_cpp)
        architectures |= converter_architectures(toolchain)
    opening = Opening(architectures, options.is_streamed, reads_weights, progress.note)
    with ExitStack() as stack:
        share: Callable[[float], None] | None = None

        def on_bytes(done: int, total: int) -> None:
            nonlocal share
            if share is None:
                share = stack.enter_context(progress.stage("merge", total))
            share(done / total)

        checkpoint = open_merged(model, options.adapters, opening, on_bytes, _check)
    if (note := note_on_buffers(checkpoint)) is not None:
        progress.note(note)
    return with_choices(checkpoint, options, progress)


def _check(checkpoint: Checkpoint) -> None:
    """Refuse half a checkpoint, and tensors that are no weights of it."""
    check_names(checkpoint)
    check_complete(checkpoint)


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
    from ewq_gguf.checkpoint.scan import Work, scan_checkpoint  # numba: not for plans

    options, measures = options or Options(), measures or Measures()
    laid_out, maker = None, ""
    if not checkpoint.is_mapped_by_name:
        toolchain = find_toolchain(options.llama_cpp)
        laid_out, maker = layout(checkpoint, toolchain, progress), toolchain.key
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
            open_journal(journal) as keep,
            progress.stage("scan", total) as share,
        ):

            def on_bytes(n_bytes: int) -> None:
                nonlocal done
                done += n_bytes
                share(min(done / total, 1.0))

            work = Work(
                n_threads=options.n_threads,
                allow_nonfinite=options.allow_nonfinite,
                part=part,
                known=known,
                on_bytes=on_bytes,
                on_tensor=keep,
            )
            if options.scheduler:
                from ewq_gguf.checkpoint.cluster import scan_on_cluster

                result = scan_on_cluster(
                    options.scheduler, checkpoint, measures, laid_out, work
                )
            else:
                result = scan_checkpoint(
                    checkpoint, measures, layout=laid_out, work=work
                )
        store.write_text(path, result.to_json(), stage="scan", force=True)
        journal.unlink(missing_ok=True)
    return result


def found_lattices(
    source: Checkpoint | Scan, options: Options, progress: Progress = SILENT
) -> dict[str, tuple[str, ...]]:
    """Types that hold tensors exactly, where nothing else is measured of them.

    Of weights that stay on their server nothing is known.
    """
    if isinstance(source, Scan):
        return lattices_of(source)
    if any(shard.remote for shard in source.shards):
        return {}
    from ewq_gguf.checkpoint.lattice import find_lattices  # numba: not for other plans

    laid_out = None
    if not source.is_mapped_by_name:
        laid_out = layout(source, find_toolchain(options.llama_cpp), progress)
    with progress.stage("look for what is quantised already"):
        return find_lattices(source, laid_out, n_threads=options.n_threads)


def layout(
    checkpoint: Checkpoint, toolchain: Toolchain, progress: Progress = SILENT
) -> Layout:
    """The converter's layout of a checkpoint, from the cache where it is known.

    Raises:
        InputError: the checkpoint cannot be converted, or lacks a tensor that llama.cpp
            needs.
        ToolError, ChildError: as of `layout_of`.
    """
    laid_out = ask_layout(checkpoint, toolchain, progress)
    check_loadable(checkpoint, laid_out)
    return laid_out


def ask_layout(
    checkpoint: Checkpoint, toolchain: Toolchain, progress: Progress = SILENT
) -> Layout:
    """The same, whether llama.cpp would load the file or not."""
    known = cached_layout(checkpoint.identity.fingerprint, toolchain.key)
    if known is not None:
        return known
    with naming_the_nearest(checkpoint, toolchain, progress):
        with progress.stage("ask llama.cpp for the file's header"):
            found = layout_of(checkpoint, toolchain)
    for warning in found.warnings:
        progress.note(f"llama.cpp's converter: {warning}")
    say_fit(checkpoint, toolchain, progress)
    return found


def check_loadable(checkpoint: Checkpoint, laid_out: Layout) -> None:
    """Refuse a checkpoint whose file llama.cpp would not load, before it is made.

    Raises:
        InputError: a tensor that llama.cpp needs is missing or of a wrong shape.
    """
    if laid_out.refusal:
        raise InputError(
            "scan",
            checkpoint.folder,
            f"llama.cpp would not load a GGUF of it: {laid_out.refusal}",
            "download it again, or merge or save the model again",
        )
