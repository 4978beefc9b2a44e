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
from ewq_gguf.records import Plan, Result, Speed, load_record
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
        folder: the folder.
        request: measurement of every file.
    """

    run: Run
    folder: Path
    request: Request

    def check(self, files: Sequence[ExperimentFile]) -> None:
        """Refuse what is there of another plan or request, and a disk too small.

        Raises:
            UsageError: naming the first that would have to be replaced.
            ResourceError: the files do not fit.
        """
        folder = store.ensure_dir(self.folder / "files", STAGE)
        needed = sum(
            file.plan.totals.file_size_bytes
            for file in files
            if file.plan is not None and not self._path(file).exists()
        )
        store.check_free(folder, needed, STAGE)
        if self.run.options.force:
            return
        for file in files:
            path, request = self._result_path(file), self._request(file, self.request)
            if path.exists() and not _is_asked(_load(path), request):
                raise store.already_exists(path, STAGE)
            if file.plan is None:
                continue
            path, text = self._plan_path(file), file.plan.to_json()
            if path.exists() and path.read_bytes() != text.encode():
                raise store.already_exists(path, STAGE)
            path = self._path(file)
            if path.exists() and not _is_of_plan(path, file.plan):
                raise store.already_exists(path, STAGE)

    def measure(
        self, files: Sequence[ExperimentFile], request: Request
    ) -> list[Result]:
        """Everything that is asked for; what is there and still valid is used again.

        A file is measured as soon as it is made: a missing device is said before all
        files are made. Speeds are measured in turns: one repeat of each file, then the
        next of each; another set of files is timed anew, all of it.
        """
        assert request.base is not None
        if "kld" in request.tasks:
            # The base's part, so that it runs once and not per file.
            base, progress = request.base, self.run.progress
            reference = cached_reference(
                base, request, lambda: progress.measure(f"reference {base.name}")
            )
            request = replace(request, reference=reference)
        built = []
        for file in files:
            built.append(self._build(file, request))
            self._measure(built[-1])
        if "speed" not in request.tasks:
            return [self._result(file, None) for file in built]
        turns = self._turns(built)
        return [self._result(file, turns[file.name]) for file in built]

    def remove(self, files: Sequence[ExperimentFile]) -> None:
        """Remove the GGUF files; a later run makes them again."""
        for file in files:
            if file.plan is not None:
                self._path(file).unlink()

    def _path(self, file: ExperimentFile) -> Path:
        return self.folder / "files" / f"{file.name}.gguf"

    def _plan_path(self, file: ExperimentFile) -> Path:
        return self.folder / "plans" / f"{file.name}.json"

    def _result_path(self, file: ExperimentFile) -> Path:
        return self.folder / "results" / f"{file.name}.json"

    def _request(self, file: ExperimentFile, request: Request) -> Request:
        """The base is not compared with itself: that divergence is 0, by definition."""
        if file.plan is not None:
            return request
        tasks = ("perplexity" if task == "kld" else task for task in request.tasks)
        return replace(
            request, tasks=tuple(dict.fromkeys(tasks)), base=None, reference=None
        )

    def _build(self, file: ExperimentFile, request: Request) -> BuiltFile:
        assert request.base is not None
        path = request.base
        if file.plan is not None:
            path = self._path(file)
            text, force = file.plan.to_json(), self.run.options.force
            store.write_text(self._plan_path(file), text, stage="plan", force=force)
            planned_file(self.run, file.plan, path, base=request.base)
        return BuiltFile(
            file.name, path, self._request(file, request), self._result_path(file)
        )

    def _measure(self, file: BuiltFile) -> None:
        """Everything but the speed, where it was not measured."""
        request = _untimed(file.request)
        if self._known(file) is not None:
            self.run.progress.note(f"{file.result_path} was there already, still valid")
        elif request.tasks:
            with self.run.progress.measure(f"bench {file.name}") as tell:
                result = bench_file(file.path, request, tell)
            _write(file.result_path, result)

    def _known(self, file: BuiltFile) -> Result | None:
        """A valid result that is there, with speed or without it.

        Raises:
            UsageError: another one is there.
        """
        if not file.result_path.exists():
            return None
        result = _load(file.result_path)
        if result is not None and any(
            is_result_of(result, file.path, request)
            for request in _with_speed_or_without(file.request)
        ):
            return result
        if self.run.options.force:
            return None
        raise store.already_exists(file.result_path, STAGE)

    def _turns(self, files: Sequence[BuiltFile]) -> dict[str, list[Result]]:
        """Speeds, by file; kept by all files that took part, and how."""
        request = files[0].request
        hashes = [identify(file.path).sha256 for file in files]
        asked = _turn(request).parameters().model_dump_json()
        key = store.cache_key(hashes, asked, LLAMA_CPP_COMMIT)[:16]
        turns: dict[str, list[Result]] = {file.name: [] for file in files}
        for turn in range(request.n_repeats):
            # Back and forth, so that what drifts with time meets all alike.
            for file in files if turn % 2 == 0 else reversed(files):
                path = self.folder / "turns" / key / f"{turn + 1}-{file.name}.json"
                result = _load(path) if path.exists() else None
                one_repeat = _turn(file.request)
                if result is None or not is_result_of(result, file.path, one_repeat):
                    label = f"speed {file.name}, {turn + 1} of {request.n_repeats}"
                    with self.run.progress.measure(label) as tell:
                        result = bench_file(file.path, one_repeat, tell)
                    _write(path, result)
                turns[file.name].append(result)
        return turns

    def _result(self, file: BuiltFile, turns: list[Result] | None) -> Result:
        """All of a file's numbers as one result, as the request has it."""
        result = self._known(file) or (turns[0] if turns else None)
        assert result is not None
        if turns is None:
            return result
        speed: Speed = combined([turn.speed for turn in turns if turn.speed])
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


def _untimed(request: Request) -> Request:
    return replace(request, tasks=tuple(t for t in request.tasks if t != "speed"))


def _turn(request: Request) -> Request:
    """One repeat of the speed test."""
    return replace(request, tasks=("speed",), n_repeats=1)


def _with_speed_or_without(request: Request) -> list[Request]:
    return [r for r in (request, _untimed(request)) if r.tasks]


def _is_asked(result: Result | None, request: Request) -> bool:
    """Whether a result has the parameters of a request, with speed or without it."""
    requests = _with_speed_or_without(request)
    return result is not None and result.parameters in [
        each.parameters() for each in requests
    ]


def _is_of_plan(path: Path, plan: Plan) -> bool:
    """Whether a GGUF file says that it was made from a plan."""
    try:
        return read_gguf(path).kv.get("ewq.plan.sha256") == plan.sha256
    except (VerificationError, InputError):
        return False


def _load(path: Path) -> Result | None:
    """A result; None where there is something else."""
    try:
        return load_record(Result, path, STAGE)
    except InputError:
        return None


def _write(path: Path, result: Result) -> None:
    store.write_text(path, result.to_json(), stage=STAGE, force=True)
