"""A comparison's folder: files, plans and results that stay and are used again.

Below the folder, `files` has the GGUF files, `plans` their plans, `results` a result of
each, `turns` each turn of the speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ewq_gguf import store
from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.bench.files import identify
from ewq_gguf.bench.reference_run import cached_reference
from ewq_gguf.bench.runner import Request, bench_file, is_result_of
from ewq_gguf.bench.tasks.speed import combined
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.errors import InputError, VerificationError
from ewq_gguf.experiments.engine import ExperimentFile
from ewq_gguf.libraries import LLAMA_CPP_COMMIT
from ewq_gguf.pipeline.making import planned_file
from ewq_gguf.records import Plan, Result, load_cached
from ewq_gguf.stages.run import Run


@dataclass(frozen=True)
class BuiltFile:
    """A file that is there.

    Attributes:
        name: its name in the experiment.
        path: path of the GGUF.
        request: its measurement.
        result_path: path of its result.
    """

    name: str
    path: Path
    request: Request
    result_path: Path


@dataclass(frozen=True)
class KeptFiles:
    """Files and measurements in a folder.

    Attributes:
        run: the model and the options.
        request: the measurement of every file.
        folder: the folder.
    """

    run: Run
    request: Request
    folder: Path

    def check(self, files: Sequence[ExperimentFile]) -> None:
        """Refuse what is there of another plan or request, and a disk too small.

        Raises:
            UsageError: naming the first that would have to be replaced.
            ResourceError: the files do not fit.
        """
        needed = sum(
            file.plan.totals.file_size_bytes
            for file in files
            if file.plan is not None and not self._path("files", file).exists()
        )
        folder = store.ensure_dir(self.folder / "files", STAGE)
        store.check_free(folder, needed, STAGE)
        for file in [] if self.run.options.force else files:
            others = []
            path = self._path("results", file)
            if path.exists() and not _is_asked(path, _request(file, self.request)):
                others.append(path)
            if file.plan is not None:
                path, text = self._path("plans", file), file.plan.to_json()
                if path.exists() and path.read_bytes() != text.encode():
                    others.append(path)
                path = self._path("files", file)
                if path.exists() and not _is_of_plan(path, file.plan):
                    others.append(path)
            if others:
                raise store.already_exists(others[0], STAGE)

    def measure(
        self, files: Sequence[ExperimentFile], request: Request
    ) -> list[Result]:
        """Everything that is asked for; what is there and still valid is used again.

        A file is measured as soon as it is made: a missing device is said before all
        files are made. Speeds are measured in turns: one repeat of each file, then the
        next of each; another set of files is timed anew, all of it.
        """
        base, progress = request.base, self.run.progress
        assert base is not None
        if "kld" in request.tasks:
            # The base's part, so that it runs once and not per file.
            reference = cached_reference(
                base, request, lambda: progress.measure(f"reference {base.name}")
            )
            request = replace(request, reference=reference)
        built = []
        for file in files:
            built.append(self._build(file, request, base))
            self._measure(built[-1])
        if "speed" not in request.tasks:
            return [self._result(file, []) for file in built]
        turns = self._turns(built)
        return [self._result(file, turns[file.name]) for file in built]

    def remove(self, files: Sequence[ExperimentFile]) -> None:
        """Remove the GGUF files; a later run makes them again."""
        for file in files:
            if file.plan is not None:
                self._path("files", file).unlink()

    def _path(self, kind: str, file: ExperimentFile) -> Path:
        suffix = "gguf" if kind == "files" else "json"
        return self.folder / kind / f"{file.name}.{suffix}"

    def _build(self, file: ExperimentFile, request: Request, base: Path) -> BuiltFile:
        path = base
        if file.plan is not None:
            path = self._path("files", file)
            text, force = file.plan.to_json(), self.run.options.force
            plan_path = self._path("plans", file)
            store.write_text(plan_path, text, stage="plan", force=force)
            planned_file(self.run, file.plan, path, base=base)
        result_path = self._path("results", file)
        return BuiltFile(file.name, path, _request(file, request), result_path)

    def _measure(self, file: BuiltFile) -> None:
        """Everything but the speed, where it was not measured."""
        request = _untimed(file.request)
        if self._measured(file) is not None:
            self.run.progress.note(f"{file.result_path} was there already, still valid")
        elif request.tasks:
            with self.run.progress.measure(f"bench {file.name}") as tell:
                result = bench_file(file.path, request, tell)
            _write(file.result_path, result)

    def _measured(self, file: BuiltFile) -> Result | None:
        """A valid result that is there, with speed or without it.

        Raises:
            UsageError: another one is there.
        """
        if not file.result_path.exists():
            return None
        result = load_cached(Result, file.result_path, STAGE)
        if result is not None and any(
            request.tasks and is_result_of(result, file.path, request)
            for request in (file.request, _untimed(file.request))
        ):
            return result
        if self.run.options.force:
            return None
        raise store.already_exists(file.result_path, STAGE)

    def _turns(self, files: Sequence[BuiltFile]) -> dict[str, list[Result]]:
        """Speeds by file; they are kept by all files that took part, and how."""
        request = files[0].request
        hashes = [identify(file.path).sha256 for file in files]
        parameters = _turn(request).parameters().model_dump_json()
        key = store.cache_key(hashes, parameters, LLAMA_CPP_COMMIT)[:16]
        turns: dict[str, list[Result]] = {file.name: [] for file in files}
        for turn in range(request.n_repeats):
            # Back and forth, so that what drifts with time meets all alike.
            for file in files if turn % 2 == 0 else reversed(files):
                path = self.folder / "turns" / key / f"{turn + 1}-{file.name}.json"
                result = load_cached(Result, path, STAGE)
                once = _turn(file.request)
                if result is None or not is_result_of(result, file.path, once):
                    label = f"speed {file.name}, {turn + 1} of {request.n_repeats}"
                    with self.run.progress.measure(label) as tell:
                        result = bench_file(file.path, once, tell)
                    _write(path, result)
                turns[file.name].append(result)
        return turns

    def _result(self, file: BuiltFile, turns: Sequence[Result]) -> Result:
        """All of a file's numbers as one result, as the request has it."""
        result = self._measured(file) or turns[0]
        if not turns:
            return result
        speed = combined([turn.speed for turn in turns if turn.speed])
        result = result.model_copy(
            update={
                "parameters": file.request.parameters(),
                "speed": speed,
                "prompt_tps": speed.prompt_tps,
                "generation_tps": speed.generation_tps,
                "ttft_seconds": speed.ttft_seconds,
            }
        )
        _write(file.result_path, result)
        return result


def _request(file: ExperimentFile, request: Request) -> Request:
    """The base is not compared with itself: that divergence is 0, by definition."""
    if file.plan is not None:
        return request
    tasks = ("perplexity" if task == "kld" else task for task in request.tasks)
    distinct = tuple(dict.fromkeys(tasks))
    return replace(request, tasks=distinct, base=None, reference=None)


def _untimed(request: Request) -> Request:
    return replace(request, tasks=tuple(t for t in request.tasks if t != "speed"))


def _turn(request: Request) -> Request:
    """One repeat of the speed test."""
    return replace(request, tasks=("speed",), n_repeats=1)


def _is_asked(path: Path, request: Request) -> bool:
    """Whether a result has the parameters of a request, with speed or without it."""
    result = load_cached(Result, path, STAGE)
    requests = [r for r in (request, _untimed(request)) if r.tasks]
    return result is not None and any(
        result.parameters == each.parameters() for each in requests
    )


def _is_of_plan(path: Path, plan: Plan) -> bool:
    """Whether a GGUF file says that it was made from a plan."""
    try:
        return read_gguf(path).kv.get("ewq.plan.sha256") == plan.sha256
    except (VerificationError, InputError):
        return False


def _write(path: Path, result: Result) -> None:
    store.write_text(path, result.to_json(), stage=STAGE, force=True)
