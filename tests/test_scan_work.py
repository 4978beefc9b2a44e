"""How a scan goes about its work: parts, resuming, streaming, FP8, showing."""

import json
from math import log
from pathlib import Path

import numpy as np
import pytest

from ewq_gguf import api
from ewq_gguf.api import Options
from ewq_gguf.checkpoint.mapping import Region
from ewq_gguf.checkpoint.reader import RangeReader
from ewq_gguf.checkpoint.regions import parts_of
from ewq_gguf.checkpoint.scan import Work, merge_scans, scan_checkpoint
from ewq_gguf.checkpoint.source import Opening, open_checkpoint
from ewq_gguf.cli import main
from ewq_gguf.entropy.codes import code_values
from ewq_gguf.errors import EwqError, InputError, UsageError
from ewq_gguf.llamacpp.convertible import check_is_local
from ewq_gguf.records import EwqPolicy, Scan, TensorScan, load_record, read_journal
from tests.checkpoints import write_llama, write_raw, write_shard
from tests.range_server import Faults, serve


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "tiny", n_layers=3, n_shards=2)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EWQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# Parts.


@pytest.mark.parametrize("count", [1, 2, 3, 40])
def test_merged_parts_are_the_scan_in_one_go(tiny: Path, count: int):
    checkpoint = open_checkpoint(str(tiny))
    parts = [
        scan_checkpoint(checkpoint, work=Work(part=(i, count)))
        for i in range(1, count + 1)
    ]
    assert merge_scans(parts[::-1]) == scan_checkpoint(checkpoint)


def test_parts_have_about_the_same_bytes(tiny: Path):
    checkpoint = open_checkpoint(str(tiny))
    sizes = [
        sum(
            t.n_weights
            for t in scan_checkpoint(checkpoint, work=Work(part=(i, 3))).tensors
        )
        for i in (1, 2, 3)
    ]
    assert max(sizes) < 1.1 * min(sizes)


@pytest.mark.parametrize("given", [(1,), (1, 1), (1, 2, 2), ()])
def test_missing_or_repeated_parts_are_refused(tiny: Path, given: tuple[int, ...]):
    checkpoint = open_checkpoint(str(tiny))
    parts = [scan_checkpoint(checkpoint, work=Work(part=(i, 2))) for i in given]
    with pytest.raises(InputError, match=r"needed is each of 1/2, 2/2|some parts"):
        merge_scans(parts or [scan_checkpoint(checkpoint)])


def test_parts_go_through_the_command_line(tiny, tmp_path, cache, capsys):
    out = [
        str(tmp_path / name) for name in ("1.json", "2.json", "all.json", "one.json")
    ]
    assert main(["scan", str(tiny), "--part", "1/2", "-q", "-o", out[0]]) == 0
    assert main(["scan", str(tiny), "--part", "2/2", "-q", "-o", out[1]]) == 0
    assert main(["scan", "merge", out[1], out[0], "-o", out[2]]) == 0
    assert main(["scan", str(tiny), "-q", "-o", out[3]]) == 0
    assert Path(out[2]).read_bytes() == Path(out[3]).read_bytes()
    assert main(["scan", str(tiny), "--part", "3/2"]) == 2
    assert "3/2 is not a part such as 2/8" in capsys.readouterr().err


# Resuming.


def test_a_scan_that_was_stopped_measures_no_tensor_twice(tiny, cache):
    checkpoint = open_checkpoint(str(tiny))
    whole = scan_checkpoint(checkpoint)

    class Stopped(Exception):
        pass

    seen: list[str] = []

    def write_and_stop(entry: TensorScan) -> None:
        file.write(entry.model_dump_json() + "\n")
        seen.append(entry.name)
        if len(seen) == 10:
            raise Stopped

    journal = cache / "journal"
    journal.parent.mkdir(parents=True)
    with pytest.raises(Stopped), journal.open("w") as file:
        scan_checkpoint(checkpoint, work=Work(on_tensor=write_and_stop))
    with journal.open("a") as file:
        file.write('{"name": "half a li')  # what a kill leaves
    known = read_journal(journal, TensorScan)
    assert sorted(known) == sorted(seen)
    again: list[str] = []
    work = Work(known=known, on_tensor=lambda t: again.append(t.name))
    assert scan_checkpoint(checkpoint, work=work) == whole
    assert not set(again) & set(seen)


def test_a_kept_scan_is_taken_until_a_file_changes(tiny, cache, monkeypatch):
    first = api.scan(api.Run(str(tiny)))
    assert list((cache / "scans").glob("*.journal")) == []
    with monkeypatch.context() as patch:
        patch.setattr("ewq_gguf.checkpoint.scan.scan_checkpoint", None)
        assert api.scan(api.Run(str(tiny))) == first
    shard = next(tiny.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-2:] = b"\x00\x3f"
    shard.write_bytes(data)
    assert api.scan(api.Run(str(tiny))).weights_sha256 != (first.weights_sha256)


@pytest.mark.fault(21)
def test_a_shard_rewritten_while_it_is_scanned_is_an_error(tiny):
    shard = next(tiny.glob("*.safetensors"))
    data = shard.read_bytes()

    def rewrite(n_bytes: int) -> None:
        shard.write_bytes(data)

    with pytest.raises(InputError, match="changed since they were opened"):
        scan_checkpoint(open_checkpoint(str(tiny)), work=Work(on_bytes=rewrite))


# Streaming.


def test_a_streamed_scan_is_the_local_one_and_stores_no_weight(tiny, cache):
    local = scan_checkpoint(open_checkpoint(str(tiny)))
    faults = Faults(statuses=[503], drops=2, drop_after=1000, retry_after="0")
    with serve(tiny.parent, faults) as url:
        checkpoint = open_checkpoint(f"{url}/tiny")
        streamed = scan_checkpoint(checkpoint, work=Work(n_threads=2))
    assert streamed == local
    assert list(cache.rglob("*.safetensors")) == []


def test_a_streamed_checkpoint_is_not_converted(tiny, cache):
    with serve(tiny.parent, Faults()) as url:
        checkpoint = open_checkpoint(f"{url}/tiny")
    with pytest.raises(InputError, match="its weights are not on this machine"):
        check_is_local(checkpoint)


def test_a_local_model_is_not_streamed(tiny):
    with pytest.raises(UsageError, match="is on this machine"):
        open_checkpoint(str(tiny), Opening(is_streamed=True))


# Boxes and FP8 codes.


def region_of(folder: Path, box) -> Region:
    checkpoint = open_checkpoint(str(folder))
    ((shard, tensor),) = checkpoint.tensors
    return Region(shard, tensor, box)


@pytest.mark.parametrize(
    "box",
    [
        ((0, 4, 1), (0, 6, 1), (0, 5, 1)),
        ((1, 4, 2), (2, 3, 1), (0, 5, 1)),
        ((0, 1, 1), (1, 6, 3), (1, 5, 2)),
        ((3, 4, 1), (5, 6, 1), (4, 5, 1)),
    ],
)
@pytest.mark.parametrize("buffer_bytes", [64, 1 << 20])
def test_a_box_is_what_numpy_slices(tmp_path, box, buffer_bytes):
    write_llama(tmp_path, n_layers=1)
    values = np.arange(120, dtype=np.float32).reshape(4, 6, 5)
    write_shard(tmp_path / "model.safetensors", {"x": ("F32", values)})
    region = region_of(tmp_path, box)
    with RangeReader() as reader:
        reader.open(region.shard)
        pieces = [
            piece.copy()
            for part in parts_of(region, reader)
            for piece in part.pieces(reader, np.empty(buffer_bytes, np.uint8))
        ]
    wanted = values[tuple(slice(*part) for part in box)].ravel()
    np.testing.assert_array_equal(np.concatenate(pieces), wanted)
    assert region.n_weights == wanted.size


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_fp8_codes_are_torchs(dtype):
    import torch

    kind = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[dtype]
    codes = torch.arange(256, dtype=torch.uint8)
    wanted = codes.view(kind).to(torch.float32).numpy()
    np.testing.assert_array_equal(code_values(dtype), wanted)


def test_64_bit_weights_are_measured_in_their_own_precision(tmp_path):
    write_llama(tmp_path, n_layers=1)
    values = np.array([0.0, 1e-12, log(3)])
    embedding = "model.embed_tokens.weight"
    write_raw(
        tmp_path / "model.safetensors", {embedding: ("F64", [1, 3], values.tobytes())}
    )
    (entry,) = scan_checkpoint(open_checkpoint(str(tmp_path))).tensors
    assert (entry.min, entry.max) == (0.0, log(3))
    assert entry.std == pytest.approx(values.std(), rel=1e-14)


# Statistics.


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_statistics_are_their_definitions(tmp_path, dtype):
    write_llama(tmp_path, n_layers=1)
    rng = np.random.default_rng(2)
    values = rng.standard_normal((40, 100)).astype(np.float32)
    values[0, :8], values[1, :5] = 40.0, 0.0
    embedding = "model.embed_tokens.weight"
    write_shard(tmp_path / "model.safetensors", {embedding: (dtype, values)})
    raw = (tmp_path / "model.safetensors").read_bytes()[-values.size * 2 :]
    if dtype == "BF16":
        codes = np.frombuffer(raw, np.uint16)
        exact = (codes.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        exponents = (codes >> 7) & 255
    elif dtype == "F16":
        codes = np.frombuffer(raw, np.uint16)
        exact = codes.view(np.float16).astype(np.float64)
        exponents = (codes >> 10) & 31
    else:
        exact = values.ravel().astype(np.float64)
        codes, exponents = None, (values.ravel().view(np.uint32) >> 23) & 255
    (entry,) = scan_checkpoint(open_checkpoint(str(tmp_path))).tensors
    z = (exact - exact.mean()) / exact.std()

    def entropy(items):
        q = np.unique(items, return_counts=True)[1] / items.size
        return -(q * np.log2(q)).sum()

    assert entry.excess_kurtosis == pytest.approx((z**4).mean() - 3, rel=1e-10)
    assert entry.outlier_share == (abs(z) > 6).mean() == 8 / 4000
    assert entry.zero_share == 5 / 4000
    assert entry.exponent_entropy_bits == pytest.approx(entropy(exponents), rel=1e-12)
    if codes is None:
        assert (entry.code_entropy_bits, entry.n_distinct) == (None, None)
    else:
        assert entry.code_entropy_bits == pytest.approx(entropy(codes), rel=1e-12)
        assert entry.n_distinct == len(set(codes.tolist()))


# Showing.


def test_show_and_diff_fit_80_columns_and_say_what_changed(
    tiny, tmp_path, cache, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    other = write_llama(tmp_path / "other" / "tiny", n_layers=3, seed=1)
    one, two = str(tmp_path / "1.json"), str(tmp_path / "2.json")
    assert main(["scan", str(tiny), "-q", "-o", one]) == 0
    assert main(["scan", str(other), "-q", "-o", two]) == 0
    capsys.readouterr()
    assert main(["scan", "show", one]) == 0
    shown = capsys.readouterr().out
    assert "133,568 in 30 tensors" in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert main(["scan", "diff", one, one]) == 0
    assert "0 tensors" in capsys.readouterr().out
    assert main(["scan", "diff", one, two]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    assert main(["scan", "diff", one, two, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    first, second = (load_record(Scan, Path(p), "t").tensors for p in (one, two))
    for a, b in zip(first, second, strict=True):
        assert values[a.name]["same_weights"] is False
        assert values[a.name]["std_difference"] == b.std - a.std


def test_options_reach_the_scan(tiny, cache):
    shard = next(tiny.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-2:] = b"\xc0\x7f"
    shard.write_bytes(data)
    with pytest.raises(EwqError, match="NaN"):
        api.scan(api.Run(str(tiny), Options(n_threads=2)))
    found = api.scan(api.Run(str(tiny), Options(allow_nonfinite=True)))
    assert sum(tensor.n_nonfinite for tensor in found.tensors) == 1


# The whole way, for what the converter changes or never gets.


def test_a_part_of_a_scan_is_not_planned(tiny):
    part = scan_checkpoint(open_checkpoint(str(tiny)), work=Work(part=(1, 2)))
    with pytest.raises(InputError, match="is part 1/2 only; join the parts first"):
        api.plan(api.Run(part), EwqPolicy())
