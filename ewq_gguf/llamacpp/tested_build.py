"""Building llama.cpp until the build passes its self-test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ewq_gguf import store
from ewq_gguf.errors import ChildError, ToolError
from ewq_gguf.libraries import default_build, pointer_path
from ewq_gguf.llamacpp import source as source_tree
from ewq_gguf.llamacpp.build import (
    STAGE,
    Recipe,
    build_tree,
    is_built,
    read_record,
    recipe_for,
    repairs_here,
)
from ewq_gguf.llamacpp.compilers import check_build_tools
from ewq_gguf.llamacpp.repairs import Repair
from ewq_gguf.llamacpp.self_test import (
    check_testable,
    keep_self_test,
    read_self_test,
    run_self_test,
)
from ewq_gguf.llamacpp.toolchain import Toolchain, _our_toolchain


def build_toolchain(
    backend: str = "cpu",
    *,
    jobs: int | None = None,
    on_line: Callable[[str], None] | None = None,
) -> Toolchain:
    """Build llama.cpp at the pinned commit, or take the build that is there.

    A build counts when it has passed its self-test. One that does not is built again
    with the suspected cause taken away. It becomes the one that `find_toolchain` and
    the bindings use.

    Args:
        backend: cpu, cuda, metal or vulkan.
        jobs: compilers at once; None for one per CPU.
        on_line: called with each line printed; ours start with `toolchain: `,
            Ninja's with `[done/all]`.

    Raises:
        ToolError: a compiler or a tool is missing, the submodule is at another
            commit, or no build passes the self-test.
        ChildError: CMake or a compiler failed.
        NetworkError: the source cannot be fetched.
        LockedError: another process is building.
        ResourceError: disk or memory ran out.
    """
    recipe = recipe_for(backend)
    tell = on_line or _silent
    folder = recipe.folder
    source = source_tree.find_source()
    record = read_record(folder) if is_built(recipe) and source is not None else None
    verdict = None if record is None else read_self_test(record, backend)
    if verdict is None or not verdict.is_ok:
        check_testable()
        with store.locked(store.cache_dir("toolchain"), stage=STAGE):
            if not is_built(recipe):
                check_build_tools(backend)
            source = source_tree.obtain_source(lambda text: tell(f"{STAGE}: {text}"))
            _build_until_it_computes(source, recipe, jobs, tell)
    if default_build() != folder:
        _point_to(folder)
    return _our_toolchain(folder, read_record(folder) or {})


def _build_until_it_computes(
    source: Path, recipe: Recipe, jobs: int | None, tell: Callable[[str], None]
) -> None:
    """Build and test, with one suspected cause more taken away after each failure.

    Raises:
        ToolError: no build passes its self-test.
        ChildError: the usual build does not compile.
    """
    folder, backend = recipe.folder, recipe.backend
    repairs = repairs_here()
    failure = "it was not tested"
    for repair in repairs[_first_to_try(recipe, repairs) :]:
        record = read_record(folder) if is_built(recipe) else None
        if record is None or record.get("repair", "none") != repair.name:
            more = f", {repair.what}" if repair.what else ""
            tell(f"{STAGE}: building llama.cpp ({backend}) in {folder}{more}")
            try:
                record = build_tree(source, recipe, repair, jobs=jobs, on_line=tell)
            except ChildError as error:
                if repair == repairs[0]:
                    raise
                # The compiler may not know an option; the next repair has others.
                failure = error.problem
                continue
        verdict = run_self_test(folder / "bin", backend)
        keep_self_test(folder, record, verdict)
        tell(f"{STAGE}: self-test {verdict}")
        if verdict.is_ok:
            if repair != repairs[0]:
                tell(
                    f"{STAGE}: llama.cpp computes here only when it is built "
                    f"{repair.what}; what it costs: {repair.cost}"
                )
            return
        failure = str(verdict.problem)
        if verdict.failed_device not in {None, "CPU"}:
            remedy = "update the driver, or run `ewq setup --backend cpu`"
            raise ToolError(STAGE, verdict.failed_device, failure, remedy)
    raise ToolError(
        STAGE,
        "llama.cpp",
        f"no build of it passes the self-test on this machine; the last: {failure}",
        "tell us your CPU and compiler, or name a llama.cpp of your own with "
        "--llama-cpp",
    )


def _first_to_try(recipe: Recipe, repairs: Sequence[Repair]) -> int:
    """The repair that is built already, or the first: where all have failed, again."""
    record = (read_record(recipe.folder) if is_built(recipe) else None) or {}
    names = [repair.name for repair in repairs]
    built = str(record.get("repair", "none"))
    if built not in names:
        return 0
    verdict = read_self_test(record, recipe.backend)
    has_failed = verdict is not None and not verdict.is_ok
    return 0 if has_failed and built == names[-1] else names.index(built)


def _silent(_line: str) -> None:
    pass


def _point_to(folder: Path) -> None:
    """Make a build the default; other processes see the old pointer or the new."""
    text = f'{{"build": "{folder.name}"}}\n'
    store.write_text(pointer_path(), text, stage=STAGE, force=True)
