"""The toolchain: source, build, repair, a user's own llama.cpp, and the bindings."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import CliRunner

from ewq_gguf import libraries, store
from ewq_gguf.cli.toolchain import BuildProgress, toolchain
from ewq_gguf.errors import ChildError, EwqError, LockedError, NetworkError, ToolError
from ewq_gguf.llamacpp import build, compilers, source, tested_build
from ewq_gguf.llamacpp import toolchain as toolchains
from ewq_gguf.llamacpp.hardware import hardware_key
from ewq_gguf.llamacpp.self_test import SelfTest
from ewq_gguf.llamacpp.tested_build import build_toolchain
from ewq_gguf.llamacpp.toolchain import (
    LLAMA_CPP_BUILD,
    LLAMA_CPP_COMMIT,
    Toolchain,
    find_toolchain,
)
from ewq_gguf.process import run

ROOT = Path(__file__).resolve().parents[1]
OTHER_COMMIT = "1" * 40

FAKE_CMAKE = """\
cmake_minimum_required(VERSION 3.14)
project(fake C CXX)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
add_library(llama SHARED main.c)
add_subdirectory(ggml)
target_link_libraries(llama PRIVATE ggml-cpu)
foreach(tool llama-quantize llama-imatrix llama-perplexity llama-bench
        llama-gguf-split llama-mtmd-cli ggml-rpc-server)
    add_executable(${tool} main.c)
    add_dependencies(${tool} llama)
    target_compile_definitions(${tool} PRIVATE
        BUILD="${LLAMA_BUILD_NUMBER}" COMMIT="${LLAMA_BUILD_COMMIT}")
endforeach()
"""
FAKE_MAIN = """\
#include <stdio.h>
#ifndef BUILD
#define BUILD ""
#define COMMIT ""
#endif
int main(void) { puts("version: 0 (build " BUILD ", commit " COMMIT ")"); return 0; }
"""
FAKE_GGML = """\
add_library(ggml-cpu STATIC ggml-cpu/quants.c ggml-cpu/amx/mmq.cpp)
set_target_properties(ggml-cpu PROPERTIES POSITION_INDEPENDENT_CODE ON)
"""
HELP = (
    "--imatrix f\n--tensor-type t\n--tensor-type-file f\n--override-kv k\n--dry-run\n"
)


PASSED = SelfTest(True, None, hardware_key("cpu"), devices=("CPU",), n_evaluations=2)
FAILED = replace(PASSED, is_ok=False, problem="ended by SIGILL", failed_device="CPU")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, and no llama.cpp named by the environment."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("EWQ_CACHE", str(folder))
    monkeypatch.delenv("EWQ_LLAMA_CPP", raising=False)
    monkeypatch.delenv(libraries.LIBRARY_VARIABLE, raising=False)
    return folder


@pytest.fixture
def git(tmp_path, monkeypatch):
    """A function that runs git, with none of the user's settings."""
    for name, value in {
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "protocol.file.allow",
        "GIT_CONFIG_VALUE_0": "always",
        "GIT_AUTHOR_NAME": "A",
        "GIT_AUTHOR_EMAIL": "a@example.org",
        "GIT_COMMITTER_NAME": "A",
        "GIT_COMMITTER_EMAIL": "a@example.org",
    }.items():
        monkeypatch.setenv(name, value)

    def run_git(folder: Path, *args: str | Path) -> str:
        argv = ["git", "-C", str(folder), *map(str, args)]
        return run(argv, stage="test", log_path=tmp_path / "git.log").strip()

    return run_git


@pytest.fixture
def fake_source(tmp_path, monkeypatch, cache):
    """A small CMake project in llama.cpp's place, whose builds pass every test."""
    tree = write_tree(tmp_path / "tree")
    use_source(monkeypatch, tree)
    for module in (tested_build, toolchains):
        monkeypatch.setattr(module, "run_self_test", lambda lib_dir, backend: PASSED)
    return tree


@pytest.fixture(scope="module")
def real():
    """The toolchain that `make setup` built."""
    return find_toolchain()


def use_source(monkeypatch, tree: Path) -> None:
    monkeypatch.setattr(source, "find_source", lambda: tree)
    monkeypatch.setattr(source, "obtain_source", lambda note: tree)


def write_tree(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "CMakeLists.txt").write_text(FAKE_CMAKE)
    (folder / "main.c").write_text(FAKE_MAIN)
    (folder / "ggml/ggml-cpu/amx").mkdir(parents=True)
    (folder / "ggml/CMakeLists.txt").write_text(FAKE_GGML)
    (folder / "ggml/ggml-cpu/quants.c").write_text("int quants;\n")
    (folder / "ggml/ggml-cpu/amx/mmq.cpp").write_text("int mmq;\n")
    (folder / source.CONVERTER_NAME).write_text("")
    (folder / "gguf-py").mkdir()
    return folder


def write_sdist(folder: Path, commit: str, extra: list[tarfile.TarInfo]) -> Path:
    """An archive laid out as llama-cpp-python's."""
    top = f"llama_cpp_python-{source.BINDINGS_VERSION}"
    files = {
        f"{top}/.git/modules/vendor/llama.cpp/HEAD": f"{commit}\n",
        f"{top}/vendor/llama.cpp/CMakeLists.txt": FAKE_CMAKE,
        f"{top}/vendor/llama.cpp/{source.CONVERTER_NAME}": "",
        f"{top}/vendor/llama.cpp/.git": "gitdir: ../../.git/modules/vendor/llama.cpp",
        f"{top}/llama_cpp/__init__.py": "",
    }
    archive = folder / f"{top}.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
        for member in extra:
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    return archive


def member(name: str, *, size: int = 0, link: str = "") -> tarfile.TarInfo:
    top = f"llama_cpp_python-{source.BINDINGS_VERSION}/vendor/llama.cpp"
    info = tarfile.TarInfo(f"{top}/{name}")
    info.size = size
    if link:
        info.type, info.linkname = tarfile.SYMTYPE, link
    return info


def write_own(folder: Path, help_text: str = HELP) -> Path:
    """A user's llama.cpp: a llama-quantize whose help ends with 1, as the real one."""
    folder.mkdir(parents=True)
    path = folder / "llama-quantize"
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{help_text}END\nexit 1\n")
    path.chmod(0o755)
    return folder


# --- The source ----------------------------------------------------------------------


def test_sdist_of_the_pinned_commit_becomes_a_tree_without_its_git_file(tmp_path):
    archive = write_sdist(tmp_path, LLAMA_CPP_COMMIT, [])
    source.extract_sdist(archive, tmp_path / "out" / "tree")
    names = sorted(path.name for path in (tmp_path / "out" / "tree").iterdir())
    assert names == ["CMakeLists.txt", source.CONVERTER_NAME]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tree"]


def test_sdist_with_another_commit_is_refused_and_leaves_nothing(tmp_path):
    archive = write_sdist(tmp_path, OTHER_COMMIT, [])
    with pytest.raises(ToolError, match=f"{OTHER_COMMIT}, {LLAMA_CPP_COMMIT} is need"):
        source.extract_sdist(archive, tmp_path / "out" / "tree")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    "hostile",
    [
        pytest.param(member("../../../../../stolen", size=3), id="climbs"),
        pytest.param(member("link", link="/etc/passwd"), id="absolute link"),
        pytest.param(member("link", link="../../../../../x"), id="climbing link"),
    ],
)
def test_sdist_member_that_leaves_its_folder_is_refused(tmp_path, hostile):
    archive = write_sdist(tmp_path, LLAMA_CPP_COMMIT, [hostile])
    with pytest.raises(ToolError, match="cannot be extracted"):
        source.extract_sdist(archive, tmp_path / "a" / "b" / "tree")
    assert not list(tmp_path.rglob("stolen"))
    assert not (tmp_path / "a" / "b" / "tree").exists()


def test_sdist_cut_short_is_removed_so_that_the_next_run_fetches_it_again(tmp_path):
    archive = write_sdist(tmp_path, LLAMA_CPP_COMMIT, [])
    archive.write_bytes(archive.read_bytes()[:200])
    with pytest.raises(ToolError, match="run `ewq toolchain build` again"):
        source.extract_sdist(archive, tmp_path / "tree")
    assert not archive.exists()


def test_sdist_that_pip_cannot_fetch_is_a_network_error(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(NetworkError, match="cannot be fetched") as caught:
        source.download_sdist(lambda text: None)
    assert caught.value.exit_code == 7
    assert not list((cache / "downloads").glob("*.tar.gz"))


def test_extracted_source_in_the_cache_is_used_again(cache, tmp_path):
    cached = source.cached_source()
    write_tree(cached)
    assert source.find_source(tmp_path) == cached
    assert source.obtain_source(pytest.fail, tmp_path) == cached


@pytest.mark.parametrize("pack", [False, True], ids=["loose ref", "packed ref"])
def test_head_commit_is_what_git_says(tmp_path, git, pack):
    write_repository(tmp_path / "repo", git)
    if pack:
        git(tmp_path / "repo", "pack-refs", "--all")
    expected = git(tmp_path / "repo", "rev-parse", "HEAD")
    assert source.head_commit(tmp_path / "repo") == expected


def test_submodule_at_another_commit_is_refused_naming_both(cache, tmp_path, git):
    checkout = tmp_path / "checkout"
    submodule = write_repository(checkout / source.SUBMODULE, git)
    found = git(submodule, "rev-parse", "HEAD")
    with pytest.raises(ToolError, match=f"{found}, {LLAMA_CPP_COMMIT}") as caught:
        source.obtain_source(lambda text: None, checkout)
    assert caught.value.remedy == "run `git submodule update --init vendor/llama.cpp`"
    assert source.find_source(checkout) is None


def test_submodule_is_fetched_where_its_repository_answers(
    cache, tmp_path, git, monkeypatch
):
    origin = write_repository(tmp_path / "origin", git)
    commit = git(origin, "rev-parse", "HEAD")
    monkeypatch.setattr(source, "LLAMA_CPP_COMMIT", commit)
    checkout = write_checkout(tmp_path / "checkout", git, origin.as_uri(), commit)
    notes: list[str] = []
    tree = source.obtain_source(notes.append, checkout)
    assert tree == checkout / source.SUBMODULE
    assert (tree / "CMakeLists.txt").is_file()
    assert notes == [f"fetching vendor/llama.cpp from {origin.as_uri()}"]


def test_submodule_that_cannot_be_reached_is_passed_over(cache, tmp_path, git):
    url = (tmp_path / "nowhere").as_uri()
    checkout = write_checkout(tmp_path / "checkout", git, url, OTHER_COMMIT)
    notes: list[str] = []
    assert not source.fetch_submodule(checkout, notes.append)
    assert notes[0].startswith("vendor/llama.cpp cannot be fetched (")


def test_folder_that_is_no_checkout_fetches_no_submodule(tmp_path):
    assert not source.fetch_submodule(tmp_path, pytest.fail)


def write_repository(folder: Path, git) -> Path:
    write_tree(folder)
    git(folder, "init", "--quiet", "--initial-branch=main")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "tree")
    return folder


def write_checkout(folder: Path, git, url: str, commit: str) -> Path:
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch=main")
    name = source.SUBMODULE
    (folder / ".gitmodules").write_text(
        f'[submodule "{name}"]\n\tpath = {name}\n\turl = {url}\n'
    )
    git(folder, "update-index", "--add", "--cacheinfo", f"160000,{commit},{name}")
    return folder


# --- Building ------------------------------------------------------------------------


def test_build_is_recorded_pointed_to_and_found(fake_source, cache):
    lines: list[str] = []
    built = build_toolchain(on_line=lines.append)
    assert find_toolchain() == built
    assert built.bin_dir.parent.parent == cache / "toolchain"
    assert built.tool("llama-quantize").is_file()
    record = json.loads((built.bin_dir.parent / "build.json").read_text())
    assert record["commit"] == LLAMA_CPP_COMMIT
    assert record["machine"] == libraries.machine_key()
    assert any(line.startswith("[1/") for line in lines)


def test_finished_build_is_used_at_once(fake_source, monkeypatch):
    first = build_toolchain()
    monkeypatch.setenv("PATH", "")  # Neither compiler nor CMake could be started.
    assert build_toolchain(on_line=pytest.fail) == first


def test_interrupted_build_is_no_build_and_the_next_run_completes_it(fake_source):
    def interrupt(line: str) -> None:
        if line.startswith("[4/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_toolchain(on_line=interrupt)
    with pytest.raises(ToolError, match="is not built; run `ewq setup`"):
        find_toolchain()
    assert build_toolchain() == find_toolchain()


def test_broken_cmake_cache_is_wiped_and_built_afresh(fake_source):
    folder = build.recipe_for("cpu").folder
    folder.mkdir(parents=True)
    (folder / "CMakeCache.txt").write_text(
        "CMAKE_HOME_DIRECTORY:INTERNAL=/elsewhere\nCMAKE_GENERATOR:INTERNAL=Other\n"
    )
    lines: list[str] = []
    built = build_toolchain(on_line=lines.append)
    assert built.bin_dir.parent == folder
    assert "toolchain: the earlier build is broken; starting afresh" in lines


def test_binaries_that_vanished_are_named_and_come_back(fake_source):
    built = build_toolchain()
    built.tool("llama-imatrix").unlink()
    with pytest.raises(ToolError, match="llama-imatrix vanished .*; run `ewq setup"):
        find_toolchain()
    build_toolchain()
    assert find_toolchain().tool("llama-imatrix").is_file()


def test_source_of_another_commit_is_refused(fake_source):
    text = FAKE_MAIN.replace('commit " COMMIT "', f'commit {OTHER_COMMIT[:9]}"  "')
    (fake_source / "main.c").write_text(text)
    with pytest.raises(ToolError, match="built for another commit") as caught:
        build_toolchain()
    assert caught.value.exit_code == 4
    assert "ewq toolchain build" in caught.value.remedy
    with pytest.raises(ToolError, match="is not built"):
        find_toolchain()
    # And the next run, with the right source, repairs it.
    (fake_source / "main.c").write_text(FAKE_MAIN)
    assert build_toolchain() == find_toolchain()


def test_compiler_error_keeps_its_log(fake_source):
    (fake_source / "main.c").write_text("int main(void) { return nothing; }\n")
    with pytest.raises(ChildError, match="build.log") as caught:
        build_toolchain()
    assert any("nothing" in line for line in caught.value.log_tail)


def test_record_of_another_commit_is_refused(fake_source):
    folder = write_finished_build()
    record = json.loads((folder / "build.json").read_text())
    (folder / "build.json").write_text(json.dumps({**record, "commit": OTHER_COMMIT}))
    with pytest.raises(ToolError, match=f"another commit .{OTHER_COMMIT}"):
        find_toolchain()


def test_missing_compiler_is_an_error_before_cmake_starts(
    fake_source, tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ToolError, match="C compiler: none of cc") as caught:
        build_toolchain()
    line = "xcode-select --install" if sys.platform == "darwin" else "apt install build"
    assert line in caught.value.remedy
    assert not build.recipe_for("cpu").folder.exists()


@pytest.mark.parametrize(("backend", "tool"), [("cuda", "nvcc"), ("vulkan", "glslc")])
def test_backend_without_its_compiler_is_an_error(
    fake_source, tmp_path, monkeypatch, backend, tool
):
    monkeypatch.setattr(compilers, "_USUAL_NVCC", str(tmp_path / "nvcc"))
    for name in ("cc", "c++"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for variable in ("CC", "CXX", "CUDACXX"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ToolError, match=f"{tool}: is not in PATH.*--backend cpu"):
        build_toolchain(backend)


def test_cmake_that_is_nowhere_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolError, match="run `pip install cmake ninja`"):
        build.wheel_program("no_such_program")


def test_unknown_backend_is_an_error(cache):
    with pytest.raises(ToolError, match="choose one of cpu, cuda, metal, vulkan"):
        build_toolchain("tpu")


def test_second_builder_is_told_who_builds(fake_source):
    with (
        store.locked(store.cache_dir("toolchain"), stage="test"),
        pytest.raises(LockedError, match=f"pid {os.getpid()}"),
    ):
        build_toolchain()


def test_builds_differ_by_flags_and_by_machine(cache, monkeypatch):
    cpu, cuda = build.recipe_for("cpu"), build.recipe_for("cuda")
    assert cpu.folder != cuda.folder
    here = cpu.folder
    monkeypatch.setattr(build, "machine_key", lambda: "x86_64-00000000")
    assert cpu.folder != here


# --- Builds that do not compute ------------------------------------------------------

CPU_FEATURES = "sse2 avx2 avx512f amx_tile amx_int8"


def flags_of(folder: Path, source_name: str) -> str:
    """The compiler's flags for a source, as Ninja has them."""
    text = (folder / "build.ninja").read_text()
    _, _, rest = text.partition(f"{source_name}.o:")
    return next(line for line in rest.splitlines() if "FLAGS = " in line)


@pytest.fixture
def needs(fake_source, monkeypatch):
    """A function: builds compute only with this flag in the CPU backend's objects."""
    monkeypatch.setattr(build, "cpu_features", lambda: CPU_FEATURES)
    monkeypatch.setattr(build, "has_short_tile_read", lambda compiler, ask: False)

    def set_needed(
        flag: str, source_name: str = "quants.c", failure: SelfTest = FAILED
    ) -> None:
        def run_self_test(lib_dir: Path, backend: str) -> SelfTest:
            if flag in flags_of(lib_dir.parent, source_name):
                return PASSED
            return failure

        monkeypatch.setattr(tested_build, "run_self_test", run_self_test)

    return set_needed


@pytest.mark.parametrize(
    ("flag", "source_name", "repair", "said"),
    [
        ("-fno-tree-dse", "mmq.cpp", "amx-tile-configuration", "GCC drops stores"),
        ("-mno-amx-int8", "quants.c", "no-amx", "without AMX; what it costs: prompts"),
        ("-mno-avx512f", "mmq.cpp", "no-avx512", "without AVX-512 and AMX; what it"),
    ],
)
def test_a_build_that_fails_is_built_again_with_the_least_taken_away(
    needs, flag, source_name, repair, said
):
    needs(flag, source_name)
    lines: list[str] = []
    built = build_toolchain(on_line=lines.append)
    assert built.repair == repair
    assert built.self_test == PASSED
    ours = [line for line in lines if line.startswith("toolchain: ")]
    assert ours[1] == "toolchain: self-test failed: ended by SIGILL"
    assert said in ours[-1]
    assert find_toolchain() == built


def test_only_objects_that_a_repair_touches_are_compiled_again(needs):
    needs("-fno-tree-dse", "mmq.cpp")
    lines: list[str] = []
    folder = build_toolchain(on_line=lines.append).bin_dir.parent
    again = lines[lines.index("toolchain: self-test failed: ended by SIGILL") :]
    compiled = [line for line in again if "Building C" in line]
    assert len(compiled) == 1
    assert "mmq.cpp.o" in compiled[0]
    assert "-fno-tree-dse" not in flags_of(folder, "quants.c")


def test_tools_that_crash_when_they_start_are_a_failed_self_test(needs, fake_source):
    """A hypervisor may show instructions that the CPU backend uses at once."""
    crashing = FAKE_MAIN.replace("{ puts", "{ __builtin_trap(); puts")
    (fake_source / "main.c").write_text(crashing)
    needs("-mno-avx512f")
    lines: list[str] = []
    assert build_toolchain(on_line=lines.append).repair == "no-avx512"
    assert "toolchain: the earlier build is broken; starting afresh" not in lines


def test_a_known_cause_is_taken_away_before_the_first_build(needs, monkeypatch):
    monkeypatch.setattr(build, "has_short_tile_read", lambda compiler, ask: True)
    needs("-fno-dse", "mmq.cpp")
    lines: list[str] = []
    assert build_toolchain(on_line=lines.append).repair == "amx-tile-configuration"
    assert sum("self-test" in line for line in lines) == 1


def test_a_machine_where_no_build_computes_is_told_and_tried_again(needs):
    needs("-no-such-flag")
    with pytest.raises(
        ToolError, match="no build of it passes .*ended by SIG"
    ) as caught:
        build_toolchain()
    assert caught.value.exit_code == 4
    record = read_only_record(build.recipe_for("cpu").folder)
    assert record["repair"] == "portable"
    assert "-DGGML_AVX2=OFF" in build.repairs_here()[-1].flags
    # Nobody else uses it; after an update of the compiler, the usual one may do.
    needs("FLAGS = ")
    assert build_toolchain().repair == "none"


def read_only_record(folder: Path) -> dict[str, Any]:
    record = json.loads((folder / "build.json").read_text())
    return cast("dict[str, Any]", record)


def test_a_build_whose_gpu_fails_is_not_built_again(needs):
    failure = replace(FAILED, failed_device="CUDA0")
    needs("-no-such-flag", failure=failure)
    lines: list[str] = []
    with pytest.raises(ToolError, match="CUDA0: ended by SIGILL") as caught:
        build_toolchain(on_line=lines.append)
    assert "run `ewq setup --backend cpu`" in caught.value.remedy
    assert sum("building llama.cpp" in line for line in lines) == 1


def test_a_wrong_flag_of_the_users_is_reported_with_the_compilers_words(
    fake_source, monkeypatch
):
    monkeypatch.setenv("CFLAGS", "-mno-such-thing")
    with pytest.raises(ChildError) as caught:
        build_toolchain()
    assert any("mno-such-thing" in line for line in caught.value.log_tail)


def test_the_users_flags_make_a_build_of_their_own(cache, monkeypatch):
    usual = build.recipe_for("cpu").folder
    for variable in ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS"):
        monkeypatch.setenv(variable, "-O1")
        assert build.recipe_for("cpu").folder != usual
        monkeypatch.delenv(variable)
    assert build.recipe_for("cpu").folder == usual


def test_on_other_hardware_the_build_is_tested_once_more(fake_source, monkeypatch):
    folder = build_toolchain().bin_dir.parent
    record = read_only_record(folder)
    record["self_test"]["hardware"] = "another GPU; another driver"
    (folder / "build.json").write_text(json.dumps(record))
    tested = []

    def run_self_test(lib_dir: Path, backend: str) -> SelfTest:
        tested.append(backend)
        return FAILED

    monkeypatch.setattr(toolchains, "run_self_test", run_self_test)
    for _ in range(2):
        with pytest.raises(ToolError, match="fails its self-test on this machine"):
            find_toolchain()
    assert tested == ["cpu"]  # The verdict is kept.
    monkeypatch.setattr(tested_build, "run_self_test", lambda lib_dir, backend: PASSED)
    assert build_toolchain().self_test == PASSED


@pytest.mark.llamacpp
@pytest.mark.slow
def test_repairs_reach_the_real_trees_cpu_backend_and_nothing_else(real, tmp_path):
    from ewq_gguf.llamacpp.repairs import CMAKE_HOOK, repairs_for

    repairs = {r.name: r for r in repairs_for(CPU_FEATURES, lambda: False)}
    (tmp_path / "repair.cmake").write_text(CMAKE_HOOK)
    seen = {}
    for name in ("none", "amx-tile-configuration", "no-avx512", "portable"):
        argv = [
            build.wheel_program("cmake"),
            "-S",
            real.source_dir,
            "-B",
            tmp_path / "b",
        ]
        argv += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={build.wheel_program('ninja')}"]
        argv += [*real.flags, *repairs[name].cmake_flags()]
        argv += [f"-DCMAKE_PROJECT_TOP_LEVEL_INCLUDES={tmp_path / 'repair.cmake'}"]
        run(argv, stage="test", log_path=tmp_path / "cmake.log")
        seen[name] = {
            source_name: flags_of(tmp_path / "b", source_name)
            for source_name in ("amx/mmq.cpp", "ggml-cpu/quants.c", "llama-vocab.cpp")
        }
    usual = seen["none"]
    assert seen["amx-tile-configuration"]["amx/mmq.cpp"] != usual["amx/mmq.cpp"]
    assert "-fno-dse" in seen["amx-tile-configuration"]["amx/mmq.cpp"]
    assert (
        seen["amx-tile-configuration"]["ggml-cpu/quants.c"]
        == usual["ggml-cpu/quants.c"]
    )
    assert "-mno-avx512f" in seen["no-avx512"]["ggml-cpu/quants.c"]
    assert "-march=native" not in seen["portable"]["ggml-cpu/quants.c"]
    assert "-mavx" not in seen["portable"]["ggml-cpu/quants.c"]
    assert len({flags["llama-vocab.cpp"] for flags in seen.values()}) == 1


# --- The pointer and the bindings ----------------------------------------------------


def write_finished_build() -> Path:
    """A build folder that looks finished, and its pointer."""
    recipe = build.recipe_for("cpu")
    for name in build.missing_files(recipe.folder):
        path = recipe.folder / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    record: dict[str, object] = {"commit": LLAMA_CPP_COMMIT, "backend": "cpu"}
    record["flags"] = recipe.flags
    record["self_test"] = PASSED.to_record()
    (recipe.folder / "build.json").write_text(json.dumps(record))
    pointer = libraries.pointer_path()
    pointer.write_text(json.dumps({"build": recipe.folder.name}))
    return recipe.folder


def test_bindings_are_pointed_to_a_finished_build(cache, monkeypatch):
    folder = write_finished_build()
    libraries.use_toolchain_libraries()
    assert os.environ[libraries.LIBRARY_VARIABLE] == str(folder / "bin")
    monkeypatch.delenv(libraries.LIBRARY_VARIABLE)


def test_bindings_are_left_where_the_user_points_them(cache, monkeypatch):
    write_finished_build()
    monkeypatch.setenv(libraries.LIBRARY_VARIABLE, "mine")
    libraries.use_toolchain_libraries()
    assert os.environ[libraries.LIBRARY_VARIABLE] == "mine"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("[1]", id="a list"),
        pytest.param('{"build": 3}', id="a number"),
        pytest.param('{"build": "../../elsewhere"}', id="a path"),
        pytest.param('{"build": ".."}', id="the parent"),
        pytest.param('{"build": "gone"}', id="a folder that is gone"),
        pytest.param("\udcff", id="not UTF-8"),
    ],
)
def test_pointer_that_names_no_build_is_no_build(cache, text):
    pointer = libraries.pointer_path()
    pointer.parent.mkdir(parents=True)
    pointer.write_bytes(text.encode("utf-8", "surrogateescape"))
    libraries.use_toolchain_libraries()
    assert libraries.LIBRARY_VARIABLE not in os.environ
    with pytest.raises(ToolError, match="is not built"):
        find_toolchain()


def test_another_kind_of_cpu_has_a_default_of_its_own(cache, tmp_path, monkeypatch):
    write_finished_build()
    cpu_info = tmp_path / "cpuinfo"
    cpu_info.write_text("processor\t: 0\nflags\t\t: sse2 avx\n\nflags\t: other\n")
    monkeypatch.setattr(libraries, "_CPU_INFO", cpu_info)
    assert libraries.default_build() is None
    key = libraries.machine_key()
    cpu_info.write_text("flags : avx sse2\n")
    assert libraries.machine_key() == key


def test_moved_cache_still_names_its_build(cache, tmp_path, monkeypatch):
    write_finished_build()
    moved = cache.rename(tmp_path / "moved")
    monkeypatch.setenv("EWQ_CACHE", str(moved))
    assert find_toolchain().bin_dir.parent.parent == moved / "toolchain"


# --- A user's own llama.cpp ----------------------------------------------------------


@pytest.mark.parametrize("place", ["build/bin", "bin", "."])
def test_own_llama_cpp_is_found_in_checkout_prefix_and_folder(cache, tmp_path, place):
    write_own(tmp_path / "own" / place)
    found = find_toolchain(tmp_path / "own")
    assert (found.backend, found.lib_dir, found.commit) == ("user", None, "unknown")
    assert found.tool("llama-quantize").parent == tmp_path / "own" / place
    with pytest.raises(ToolError, match="leave --llama-cpp and EWQ_LLAMA_CPP away"):
        found.tool("llama-bench")


def test_own_llama_cpp_is_taken_from_the_environment(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("EWQ_LLAMA_CPP", str(write_own(tmp_path / "own")))
    assert find_toolchain().bin_dir == tmp_path / "own"


@pytest.mark.parametrize(
    "option", ["--tensor-type-file", "--dry-run", "--override-kv", "--imatrix"]
)
def test_own_llama_quantize_without_an_option_is_refused(cache, tmp_path, option):
    own = write_own(
        tmp_path / "own", HELP.replace(f"{option} ", "").replace(option, "")
    )
    with pytest.raises(ToolError, match=f"too old: it has no {option}; update") as err:
        find_toolchain(own)
    assert str(LLAMA_CPP_BUILD) in err.value.remedy


def test_own_llama_quantize_that_cannot_run_is_refused(cache, tmp_path):
    own = write_own(tmp_path / "own")
    path = own / "llama-quantize"
    path.write_text("#!/bin/sh\necho libggml.so: cannot open >&2\nexit 127\n")
    with pytest.raises(ToolError, match="cannot run .libggml.so: cannot open"):
        find_toolchain(own)


def test_folder_without_llama_quantize_is_refused(cache, tmp_path):
    with pytest.raises(ToolError, match="holds no llama-quantize"):
        find_toolchain(tmp_path)


@pytest.mark.parametrize(
    ("printed", "commit"),
    [
        ("version: 0.5.0-dev (build 11312, commit 0c1e57098)", "0c1e57098"),
        ("version: 4321 (abcdef12)", "abcdef12"),
        ("something else", "unknown"),
    ],
)
def test_own_llama_cpp_says_its_commit(cache, tmp_path, printed, commit):
    own = write_own(tmp_path / "own")
    (own / "llama-perplexity").write_text(f"#!/bin/sh\necho '{printed}' >&2\n")
    (own / "llama-perplexity").chmod(0o755)
    assert find_toolchain(own).commit == commit


def test_own_converter_comes_with_its_own_gguf_py_first(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "before")
    own = write_tree(tmp_path / "own")
    write_own(own / "build" / "bin")
    found = find_toolchain(own)
    assert found.converter == own / source.CONVERTER_NAME
    paths = found.converter_env()["PYTHONPATH"].split(os.pathsep)
    assert paths == [str(own / "gguf-py"), str(own), "before"]


def test_own_binaries_without_converter_use_ours(fake_source, tmp_path):
    own = write_own(tmp_path / "own")
    assert find_toolchain(own).source_dir == fake_source


def test_missing_converter_is_an_error_with_a_remedy(tmp_path):
    ours = Toolchain("c", tmp_path, tmp_path, tmp_path, "cpu", ())
    with pytest.raises(ToolError, match="run `ewq setup`"):
        _ = ours.converter


# --- The command ---------------------------------------------------------------------


INFO_KEYS = ["backend", "bin_dir", "commit", "flags", "lib_dir"]
INFO_KEYS += ["repair", "self_test", "source_dir"]


def test_info_prints_json_with_its_documented_keys(fake_source):
    write_finished_build()
    result = CliRunner().invoke(toolchain, ["info", "--json"])
    facts = json.loads(result.stdout)
    assert sorted(facts) == INFO_KEYS
    assert facts["commit"] == LLAMA_CPP_COMMIT
    assert "-DGGML_RPC=ON" in facts["flags"]


def test_info_prints_an_aligned_table(fake_source, tmp_path):
    own = write_own(tmp_path / "own")
    result = CliRunner().invoke(toolchain, ["info", "--llama-cpp", str(own)])
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows[1] == ["backend", "user"]
    assert rows[4:6] == [["lib_dir", "none"], ["flags", "none"]]
    assert rows[6:] == [["repair", "none"], ["self_test", "not", "run"]]


def test_info_without_a_build_is_our_error(cache):
    result = CliRunner().invoke(toolchain, ["info"])
    assert isinstance(result.exception, EwqError)
    assert str(result.exception) == (
        "toolchain: llama.cpp: is not built; run `ewq setup` (or `make setup`)"
    )


def test_build_prints_only_the_folder_on_stdout(fake_source):
    folder = write_finished_build()
    result = CliRunner().invoke(toolchain, ["build"])
    assert result.stdout == f"{folder}\n"
    assert result.stderr == ""


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_without_a_terminal_is_a_line_every_tenth(quiet, capsys):
    with BuildProgress(quiet=quiet) as progress:
        for step in range(1, 201):
            progress.take(f"[{step}/200] Building CXX object {step}.o")
            progress.take("warning: something")
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == (0 if quiet else 11)
    if not quiet:
        assert lines[-1] == "toolchain: 100 % (200 of 200 steps)"


# --- The real one --------------------------------------------------------------------


@pytest.mark.llamacpp
def test_built_tools_name_the_pinned_commit_and_have_our_options(real):
    as_users = find_toolchain(real.bin_dir)
    assert LLAMA_CPP_COMMIT.startswith(as_users.commit)
    assert len(as_users.commit) == 9
    for name in build.TOOLS:
        assert real.tool(name).is_file()
    assert (real.source_dir / "conversion").is_dir()


@pytest.mark.llamacpp
def test_binaries_run_from_another_folder(real, tmp_path):
    shutil.copytree(real.bin_dir, tmp_path / "bin", symlinks=True)
    assert find_toolchain(tmp_path).commit == LLAMA_CPP_COMMIT[:9]


@pytest.mark.llamacpp
def test_llama_cpp_after_our_import_uses_the_toolchains_library(
    real, tmp_path, monkeypatch
):
    monkeypatch.delenv(libraries.LIBRARY_VARIABLE, raising=False)
    code = (
        "import ewq_gguf, llama_cpp\n"
        "print(llama_cpp.llama_cpp._lib._name)\n"
        "print(llama_cpp.__version__)\n"
        "llama_cpp.llama_backend_init()\n"
        "print(llama_cpp.llama_max_devices() > 0)\n"
    )
    text = run(
        [sys.executable, "-c", code],
        stage="test",
        log_path=tmp_path / "child.log",
        env={"PYTHONPATH": str(ROOT)},
    )
    library, version, works = text.splitlines()[:3]
    assert Path(library).parent == real.lib_dir
    assert version == source.BINDINGS_VERSION
    assert works == "True"


def test_gitmodules_names_the_submodule_that_is_looked_for(tmp_path, git):
    def setting(key):
        name = f"submodule.{source.SUBMODULE}.{key}"
        return git(tmp_path, "config", "--file", ROOT / ".gitmodules", "--get", name)

    assert setting("path") == source.SUBMODULE
    assert setting("url") == "https://github.com/ggml-org/llama.cpp"


def test_constraints_pin_the_bindings_of_the_pinned_commit():
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"llama-cpp-python=={source.BINDINGS_VERSION}" in pins
