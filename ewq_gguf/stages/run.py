"""One run of a command: a model, its options, and everything read of it so far."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ewq_gguf.checkpoint.completeness import check_complete
from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.leftovers import check_names
from ewq_gguf.checkpoint.lora.merge import open_merged
from ewq_gguf.checkpoint.other_tensors import note_on_buffers
from ewq_gguf.checkpoint.source import Opening
from ewq_gguf.errors import InputError, ToolError
from ewq_gguf.llamacpp.converter import converter_architectures
from ewq_gguf.llamacpp.imatrix import read_imatrix
from ewq_gguf.llamacpp.layout import cached_layout, layout_of
from ewq_gguf.llamacpp.toolchain import Toolchain, find_toolchain, toolchain_key
from ewq_gguf.plan.importance import Importance
from ewq_gguf.records import Layout, ModelIdentity, Scan
from ewq_gguf.stages.choosing import naming_the_nearest, say_fit, with_choices
from ewq_gguf.stages.options import SILENT, Options, Progress
from ewq_gguf.tensor_names import ARCHITECTURES

#: Options that decide which model is opened; the others leave it as it is.
_OPENING = {"llama_cpp", "adapters", "is_streamed", "chat_template", "pre", "mtp"}


@dataclass(eq=False)
class Run:
    """A model, the options of the run, and everything read of it so far.

    Nothing is looked for before it is needed, and nothing twice.

    Attributes:
        model: a folder, a .safetensors or .gguf file, a Hub id, a URL, or `demo`; or
            a checkpoint that is open already, or the scan of one.
        options: settings of the whole run.
        progress: receiver of notes and of each stage's share done.
        reads_weights: if not, weights on the Hub stay there.
    """

    model: str | Checkpoint | Scan
    options: Options = Options()
    progress: Progress = SILENT
    reads_weights: bool = True

    def with_options(self, **changes: Any) -> Run:
        """The same run with other options; what they do not change stays read."""
        other = replace(self, options=replace(self.options, **changes))
        if not _OPENING & changes.keys():
            names = {"toolchain", "toolchain_key", "checkpoint", "unchecked_layout"}
            if "imatrix" not in changes:
                names.add("importance")
            vars(other).update({k: v for k, v in vars(self).items() if k in names})
        return other

    @cached_property
    def toolchain(self) -> Toolchain:
        """The llama.cpp that is used.

        Raises:
            ToolError: there is none, or it fails its self-test.
        """
        return find_toolchain(self.options.llama_cpp)

    @cached_property
    def toolchain_key(self) -> str:
        """The key of the llama.cpp that is used; ours need not be built.

        Raises:
            ToolError: the user's own cannot be used.
        """
        return toolchain_key(self.options.llama_cpp)

    @property
    def given_scan(self) -> Scan | None:
        """The scan that stands for the model; None where the model itself is there."""
        return self.model if isinstance(self.model, Scan) else None

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The model, opened; with adapters merged and the user's choices.

        Raises:
            EwqError: there is no such model, or it is not supported.
        """
        assert not isinstance(self.model, Scan)
        return open_named(self) if isinstance(self.model, str) else self.model

    @property
    def identity(self) -> ModelIdentity:
        """Names and hashes of the model."""
        return self.given_scan.model if self.given_scan else self.checkpoint.identity

    @property
    def layout(self) -> Layout:
        """The converter's layout of the model, from the cache where it is known.

        Raises:
            InputError: the model cannot be converted, or lacks a tensor that llama.cpp
                needs.
            ToolError, ChildError: as of `layout_of`.
        """
        layout = self.unchecked_layout
        self.check_loadable()
        return layout

    @cached_property
    def unchecked_layout(self) -> Layout:
        """The same, whether llama.cpp would load the file or not."""
        checkpoint, toolchain = self.checkpoint, self.toolchain
        layout = cached_layout(checkpoint.identity.fingerprint, toolchain.key)
        if layout is not None:
            return layout
        with naming_the_nearest(checkpoint, toolchain, self.progress):
            with self.progress.stage("ask llama.cpp for the file's header"):
                layout = layout_of(checkpoint, toolchain)
        for warning in layout.warnings:
            self.progress.note(f"llama.cpp's converter: {warning}")
        say_fit(checkpoint, toolchain, self.progress)
        return layout

    def check_loadable(self) -> None:
        """Refuse a model whose file llama.cpp would not load, before it is made.

        Raises:
            InputError: a tensor that llama.cpp needs is missing or of a wrong shape.
        """
        if refusal := self.unchecked_layout.refusal:
            raise InputError(
                "scan",
                self.checkpoint.folder,
                f"llama.cpp would not load a GGUF of it: {refusal}",
                "download it again, or merge or save the model again",
            )

    @property
    def known_layout(self) -> Layout | None:
        """The layout where one was made before; the converter is not asked."""
        if "unchecked_layout" in vars(self):
            return self.unchecked_layout
        try:
            key = self.toolchain_key
        except ToolError:
            return None
        return cached_layout(self.identity.fingerprint, key)

    @cached_property
    def importance(self) -> Importance | None:
        """The importance matrix, None without one.

        Raises:
            InputError: the file is none, or llama-quantize could not use it.
        """
        path = self.options.imatrix
        return None if path is None else read_imatrix(path)


def open_named(run: Run) -> Checkpoint:
    """Find the model of a run by its name; an unknown architecture is refused."""
    options, progress = run.options, run.progress
    assert isinstance(run.model, str)
    architectures = frozenset(ARCHITECTURES)
    with suppress(ToolError):
        architectures |= converter_architectures(run.toolchain)
    opening = Opening(
        architectures, options.is_streamed, run.reads_weights, progress.note
    )
    with ExitStack() as stack:
        share: Callable[[float], None] | None = None

        def on_bytes(done: int, total: int) -> None:
            nonlocal share
            if share is None:
                share = stack.enter_context(progress.stage("merge", total))
            share(done / total)

        checkpoint = open_merged(run.model, options.adapters, opening, on_bytes, _check)
    if (note := note_on_buffers(checkpoint)) is not None:
        progress.note(note)
    return with_choices(checkpoint, options, progress, lambda: run.toolchain)


def _check(checkpoint: Checkpoint) -> None:
    """Refuse half a checkpoint, and tensors that are no weights of it."""
    check_names(checkpoint)
    check_complete(checkpoint)
