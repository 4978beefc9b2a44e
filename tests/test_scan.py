"""One pass over the weights, against slow float64 references and by hand."""

from __future__ import annotations

import json
from decimal import Decimal, localcontext
from itertools import product
from math import exp, fsum, isclose, log
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from ewq_gguf.checkpoint import regions as regions_module
from ewq_gguf.checkpoint import scan_jobs
from ewq_gguf.checkpoint.demo import demo_checkpoint
from ewq_gguf.checkpoint.reader import BUFFER_BYTES
from ewq_gguf.checkpoint.scan import Work, scan_checkpoint
from ewq_gguf.checkpoint.source import open_checkpoint
from ewq_gguf.entropy.codes import (
    N_CODES,
    CodeCounts,
    code_values,
    count_codes,
    summarise_codes,
)
from ewq_gguf.entropy.floats import (
    combine_first,
    first_pass,
    second_pass,
    summarise_floats,
)
from ewq_gguf.entropy.summary import (
    histogram_edges,
    histogram_index,
    histogram_scale,
)
from ewq_gguf.errors import InputError
from ewq_gguf.records import Measures, Scan
from tests.checkpoints import encode, write_llama, write_shards
from tests.references import (
    Floats,
    assert_agrees,
    decode,
    histogram_entropy,
    reference,
)

EMBEDDING = "model.embed_tokens.weight"


def scan_one(
    folder: Path, values: NDArray[np.float32], dtype: str, measures=None, **options
):
    """The scan of a checkpoint with one tensor."""
    write_checkpoint(folder, {EMBEDDING: (dtype, values)})
    return scan_checkpoint(open_checkpoint(str(folder)), measures, work=Work(**options))


def write_checkpoint(folder: Path, tensors, n_shards: int = 1, n_layers: int = 1):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps(
            {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": n_layers}
        )
    )
    write_shards(folder, tensors, n_shards)


def random_values(seed: int, *shape: int, scale: float = 0.05) -> NDArray[np.float32]:
    values = np.random.default_rng(seed).normal(scale=scale, size=shape)
    return values.astype(np.float32)


# The references.


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("n_bins", [2, 7, 256, 65536])
def test_the_histogram_takes_any_number_of_bins(tmp_path, dtype, n_bins):
    values = random_values(2, 1000)
    (entry,) = scan_one(tmp_path, values, dtype, Measures(n_bins=n_bins)).tensors
    assert_agrees(entry, reference(decode(encode(values, dtype), dtype), n_bins=n_bins))


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        pytest.param("F16", [60000, 60000, 59968, -60000, 1, 0], id="F16-60000"),
        pytest.param("F16", [-60000, -59968, -60000, -59968], id="F16-all-negative"),
        pytest.param("BF16", [1e30, 1e30, 1e30, -1e30, 5], id="BF16-1e30"),
        pytest.param("BF16", [-1e30, -1e30, -1e30], id="BF16-minus-1e30"),
        pytest.param("BF16", [3.3e38, -3.3e38, 0], id="BF16-largest"),
        pytest.param("F32", [1e30, 1e30, -1e30, 5], id="F32-1e30"),
        pytest.param("F32", [3.4e38, -3.4e38, 3.4e38], id="F32-largest"),
        pytest.param("F16", [599, 598.5, 597, -599], id="F16-below-the-shift"),
        pytest.param("F16", [600, 601, 602, -620], id="F16-above-the-shift"),
        pytest.param("BF16", [700, 704, 708, 712], id="BF16-beyond-exp"),
        pytest.param("F32", [1e-40, 1e-45, 0, -1e-42], id="F32-subnormal"),
        pytest.param("F16", [6e-8, 0, -6e-8], id="F16-subnormal"),
        pytest.param("BF16", [1e-40, 0, -1e-39], id="BF16-subnormal"),
    ],
)
@pytest.mark.parametrize("epsilon", [0.0, 0.01])
def test_extreme_weights_agree_with_60_digits(tmp_path, dtype, values, epsilon):
    array = np.array(values, np.float32)
    (entry,) = scan_one(tmp_path, array, dtype, Measures(epsilon=epsilon)).tensors
    exact = decode(encode(array, dtype), dtype)
    with localcontext(prec=60):
        weights = [Decimal(float(w)) for w in exact]
        exponentials = [(w - max(weights)).exp() for w in weights]
        p = [e / sum(exponentials) for e in exponentials if e]
        entropy = float(-sum(x * (x + Decimal(epsilon)).ln() for x in p))
    assert isclose(entry.softmax_entropy_nats, entropy, rel_tol=1e-12, abs_tol=1e-12)
    assert (entry.min, entry.max) == (exact.min(), exact.max())
    if entry.min < entry.max:  # numpy may refuse an empty range
        expected = histogram_entropy(exact, 256)
        assert isclose(entry.histogram_entropy_bits, expected, abs_tol=1e-15)


@given(
    data=npst.arrays(
        np.float32,
        st.integers(1, 60),
        elements=st.one_of(
            st.floats(width=32, allow_nan=False, allow_infinity=False),
            st.sampled_from([0.0, -0.0, 0.25, 0.5, 1.0, 2.0, -1.0]),
            st.integers(-8, 8).map(lambda i: i / 8),
        ),
    ),
    n_bins=st.sampled_from([2, 3, 8, 10, 256, 1000]),
)
@settings(max_examples=300, database=None, derandomize=True)
def test_the_histogram_is_numpys_bin_by_bin(data, n_bins):
    weights = data.astype(np.float64)
    assume(weights.min() < weights.max() or abs(weights[0]) < 1e6)  # else numpy refuses
    expected, edges = np.histogram(weights, n_bins)
    norms = combine_first([first_pass(data)])
    found = second_pass(data, norms, epsilon=0.0, n_bins=n_bins).bins
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(
        histogram_edges(weights.min(), weights.max(), n_bins), edges
    )


@given(
    codes=npst.arrays(np.uint16, st.integers(1, 60)),
    n_bins=st.sampled_from([2, 3, 8, 10, 256, 1000]),
    dtype=st.sampled_from(["BF16", "F16"]),
)
@settings(max_examples=300, database=None, derandomize=True)
def test_the_histogram_of_any_codes_is_numpys(codes, n_bins, dtype):
    weights = code_values(dtype)[codes]
    finite = weights[np.isfinite(weights)]
    table = np.zeros(N_CODES, np.uint32)
    count_codes(codes, table)
    found = summarise_codes(CodeCounts.of(table), dtype, epsilon=0.01, n_bins=n_bins)
    assert found.n_nonfinite == codes.size - finite.size
    if finite.size and finite.min() == finite.max():
        assert found.histogram_entropy_bits == 0
    elif finite.size:
        assert isclose(
            found.histogram_entropy_bits,
            histogram_entropy(finite, n_bins),
            rel_tol=1e-12,
            abs_tol=1e-12,
        )
        edges = histogram_edges(finite.min(), finite.max(), n_bins)
        index = [
            histogram_index(float(w), edges, histogram_scale(edges)) for w in finite
        ]
        expected, _ = np.histogram(finite, n_bins)
        np.testing.assert_array_equal(np.bincount(index, minlength=n_bins), expected)


def test_codes_are_the_values_of_their_formats():
    codes = np.arange(N_CODES, dtype="<u2").tobytes()
    for dtype in ("BF16", "F16"):
        with np.errstate(invalid="ignore"):
            expected = decode(codes, dtype)
        np.testing.assert_array_equal(code_values(dtype), expected)
    with pytest.raises(ValueError, match="F8 is not an 8- or 16-bit dtype"):
        code_values("F8")


# Special weights.


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        *product(("BF16", "F16", "F32"), (0.0, 0.25, -3.0, 65000.0)),
        *product(("BF16", "F32"), (1e16, -1e30)),
    ],
)
@pytest.mark.parametrize("epsilon", [0.0, 0.01])
@pytest.mark.fault(16)
def test_a_constant_matrix_has_most_softmax_and_no_histogram_entropy(
    tmp_path, dtype, value, epsilon
):
    values = np.full((6, 7), value, np.float32)
    value = float(decode(encode(values, dtype), dtype)[0])
    (entry,) = scan_one(tmp_path, values, dtype, Measures(epsilon=epsilon)).tensors
    assert isclose(entry.softmax_entropy_nats, -log(1 / 42 + epsilon), rel_tol=1e-12)
    assert entry.histogram_entropy_bits == 0
    assert (entry.mean, entry.std) == (value, 0)
    assert (entry.min, entry.max) == (value, value)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_single_weight_has_entropy_0(tmp_path, dtype):
    values = np.array([0.5], np.float32)
    (entry,) = scan_one(tmp_path, values, dtype, Measures(epsilon=0.0)).tensors
    assert entry.softmax_entropy_nats == 0
    assert entry.histogram_entropy_bits == 0


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.fault(15)
def test_a_nonfinite_weight_is_refused_by_name_and_first_index(tmp_path, dtype, bad):
    values = random_values(3, 10, 10)
    values[4, 2] = values[9, 9] = bad
    with pytest.raises(
        InputError,
        match=f"{EMBEDDING} holds 2 NaN or infinite weights, the first at index 42;"
        ".*--allow-nonfinite",
    ) as caught:
        scan_one(tmp_path, values, dtype)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_the_first_nonfinite_index_counts_beyond_the_first_buffer(tmp_path, dtype):
    n_buffer = BUFFER_BYTES // 2
    values = np.zeros(3 * n_buffer, np.float32)
    values[2 * n_buffer + 5 :: 7] = np.nan
    with pytest.raises(InputError, match=f"first at index {2 * n_buffer + 5};"):
        scan_one(tmp_path, values, dtype)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("epsilon", [0.0, 0.01])
@pytest.mark.fault(15)
def test_allowed_nonfinite_weights_are_counted_and_change_nothing(
    tmp_path, dtype, epsilon
):
    values = random_values(4, 500)
    values[[0, 7, 499]] = np.nan, np.inf, -np.inf
    measures = Measures(epsilon=epsilon)
    (entry,) = scan_one(tmp_path, values, dtype, measures, allow_nonfinite=True).tensors
    finite = values[np.isfinite(values)]
    assert_agrees(entry, reference(decode(encode(finite, dtype), dtype), epsilon))
    assert (entry.n_weights, entry.n_nonfinite) == (500, 3)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_tensor_of_nan_alone_poisons_nothing(tmp_path, dtype):
    values = np.full(9, np.nan, np.float32)
    (entry,) = scan_one(tmp_path, values, dtype, allow_nonfinite=True).tensors
    assert entry.n_nonfinite == 9
    assert entry.softmax_entropy_nats == entry.histogram_entropy_bits == 0
    assert entry.min == entry.max == entry.mean == entry.std == 0


# Threads, shards and parts cannot be seen.


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, dict[int, Path]]:
    """The same weights in one file and in three, by dtype."""
    root = tmp_path_factory.mktemp("models")
    return {
        dtype: {
            n: write_llama(
                root / dtype / str(n) / "tiny", n_layers=3, dtype=dtype, n_shards=n
            )
            for n in (1, 3)
        }
        for dtype in ("BF16", "F16", "F32")
    }


@pytest.fixture
def small_parts(monkeypatch):
    """A function that makes the scanner's parts and buffers small."""

    def shrink(part_bytes: int, buffer_bytes: int) -> None:
        monkeypatch.setattr(regions_module, "PART_BYTES", part_bytes)
        monkeypatch.setattr(scan_jobs, "BUFFER_BYTES", buffer_bytes)
        # Buffers are made once per thread: these threads have none yet.
        monkeypatch.setattr(scan_jobs, "_scratch", scan_jobs._Scratch())

    return shrink


def numbers(scan: Scan):
    """Everything but the identity of the files."""
    return (scan.measures, scan.tensors, scan.layers, scan.dropped)


def scan_folder(folder: Path, n_threads: int = 1, **options) -> Scan:
    checkpoint = open_checkpoint(str(folder))
    return scan_checkpoint(checkpoint, work=Work(n_threads, **options))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("parts", [None, (3000, 3000), (4096, 1000)])
def test_threads_and_shards_leave_every_bit(models, small_parts, dtype, parts):
    if parts:
        small_parts(*parts)
    expected = numbers(scan_folder(models[dtype][1]))
    for n_shards in (1, 3):
        for n_threads in (1, 2, 3):
            found = numbers(scan_folder(models[dtype][n_shards], n_threads))
            assert found == expected, (n_shards, n_threads)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("parts", [(2, 2), (1000, 64), (4096, 1 << 20)])
def test_parts_of_any_size_leave_every_bit_of_16_bit_weights(
    models, small_parts, dtype, parts
):
    folder = models[dtype][1] if parts != (2, 2) else None
    if folder is None:  # a part per weight: a small tensor is enough
        folder = models[dtype][1].parent / "small"
        write_checkpoint(folder, {EMBEDDING: (dtype, random_values(5, 9, 9))})
    expected = numbers(scan_folder(folder))
    small_parts(*parts)
    assert numbers(scan_folder(folder, 2)) == expected


@pytest.mark.parametrize("parts", [(4, 4), (1000, 64), (1 << 12, 1 << 20)])
def test_parts_of_32_bit_weights_keep_to_the_reference(tmp_path, small_parts, parts):
    small_parts(*parts)
    values = random_values(6, 40, 40)
    (entry,) = scan_one(tmp_path, values, "F32", n_threads=2).tensors
    assert_agrees(entry, reference(values.astype(np.float64).ravel()))


def test_nonfinite_weights_alone_in_a_part_are_only_counted(tmp_path, small_parts):
    small_parts(40, 40)
    values = random_values(7, 30)
    values[10:20] = np.nan  # the second of three parts
    (entry,) = scan_one(tmp_path, values, "F32", allow_nonfinite=True).tensors
    finite = np.delete(values, np.s_[10:20]).astype(np.float64)
    assert_agrees(entry, reference(finite))
    assert entry.n_nonfinite == 10


def test_every_byte_is_reported_once_over_all_passes(models):
    for dtype in ("BF16", "F32"):
        for n_threads in (1, 2):
            seen: list[int] = []
            scan = scan_folder(models[dtype][3], n_threads, on_bytes=seen.append)
            size = {"BF16": 2, "F32": 4}[dtype]
            weights = sum(tensor.n_weights for tensor in scan.tensors)
            assert sum(seen) == size * weights


def test_a_scan_reads_back_as_itself(models):
    scan = scan_folder(models["BF16"][1])
    assert Scan.model_validate_json(scan.to_json()) == scan


# Files that are not what they were.


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.fault(20)
def test_a_file_that_shrinks_while_it_is_read_is_an_error_not_a_signal(
    tmp_path, dtype, n_threads
):
    write_checkpoint(tmp_path, {EMBEDDING: (dtype, random_values(8, 1000))})
    checkpoint = open_checkpoint(str(tmp_path))
    path = tmp_path / "model.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 100)
    with pytest.raises(
        InputError,
        match=f"{path}: ends at byte {size - 100}, its header needs {size}: it changed",
    ):
        scan_checkpoint(checkpoint, work=Work(n_threads))


def test_a_file_that_shrinks_between_its_two_passes_is_an_error(tmp_path):
    write_checkpoint(tmp_path, {EMBEDDING: ("F32", random_values(9, 1000))})
    path = tmp_path / "model.safetensors"

    def truncate(n_bytes: int) -> None:
        with path.open("r+b") as file:
            file.truncate(200)

    with pytest.raises(InputError, match="it changed while it was read"):
        scan_checkpoint(open_checkpoint(str(tmp_path)), work=Work(on_bytes=truncate))


@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_file_that_vanishes_after_its_header_is_an_error(tmp_path, n_threads):
    write_checkpoint(tmp_path, {EMBEDDING: ("F32", random_values(9, 10))})
    checkpoint = open_checkpoint(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be read .No such file"):
        scan_checkpoint(checkpoint, work=Work(n_threads))


def test_a_file_truncated_on_disk_is_refused_by_its_header(tmp_path):
    write_checkpoint(tmp_path, {EMBEDDING: ("BF16", random_values(10, 100))})
    path = tmp_path / "model.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(
        InputError, match=f"has {size - 1} bytes, its header needs {size}: truncated"
    ):
        open_checkpoint(str(tmp_path))


def test_an_error_in_a_thread_ends_the_scan(models):
    """No thread is left behind and the first error is the one raised."""

    def fail(n_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan_folder(models["BF16"][1], 3, on_bytes=fail)


# Layers.


def test_a_layer_is_the_mean_of_its_matrices_weighted_by_size(tmp_path):
    """One layer, two matrices and a norm that does not count.

    q holds 4 equal weights: ln 4 nats, 0 bits. down holds 0 and ln 3, four times each:
    p = 1/16 and 3/16, and 1 bit.
    """
    layer = "model.layers.0."
    down = np.array([[0, log(3)] * 2] * 2, np.float32)
    write_checkpoint(
        tmp_path,
        {
            EMBEDDING: ("F32", random_values(11, 7, 3)),
            f"{layer}self_attn.q_proj.weight": ("F32", np.ones((2, 2), np.float32)),
            f"{layer}self_attn.q_proj.bias": ("F32", random_values(12, 2)),
            f"{layer}mlp.down_proj.weight": ("F32", down),
            f"{layer}input_layernorm.weight": ("F32", random_values(13, 50)),
        },
    )
    scan = scan_checkpoint(open_checkpoint(str(tmp_path)), Measures(epsilon=0.0))
    (found,) = scan.layers
    w = float(down[0, 1])
    p = [1 / (4 + 4 * exp(w)), exp(w) / (4 + 4 * exp(w))]
    entropy = -4 * sum(x * log(x) for x in p)
    assert (found.layer_idx, found.n_weights) == (0, 4 + 8)
    assert isclose(
        found.softmax_entropy_nats, (4 * log(4) + 8 * entropy) / 12, rel_tol=1e-14
    )
    assert isclose(found.histogram_entropy_bits, 8 / 12, rel_tol=1e-15)


def test_a_layer_without_a_matrix_is_left_out(tmp_path):
    write_checkpoint(
        tmp_path,
        {
            "model.layers.0.input_layernorm.weight": ("F32", random_values(1, 5)),
            "model.layers.1.mlp.up_proj.weight": ("F32", random_values(2, 5, 5)),
        },
        n_layers=2,
    )
    assert [layer.layer_idx for layer in scan_folder(tmp_path).layers] == [1]


def test_layers_of_a_real_shape_are_means_of_their_matrices(models):
    scan = scan_folder(models["BF16"][3])
    assert [layer.layer_idx for layer in scan.layers] == [0, 1, 2]
    for layer in scan.layers:
        matrices = [
            t
            for t in scan.tensors
            if t.layer_idx == layer.layer_idx and len(t.shape) == 2
        ]
        assert len(matrices) == 7
        n_weights = sum(t.n_weights for t in matrices)
        assert layer.n_weights == n_weights
        for measure in ("softmax_entropy_nats", "histogram_entropy_bits"):
            mean = fsum(t.n_weights * getattr(t, measure) for t in matrices)
            assert isclose(getattr(layer, measure), mean / n_weights, rel_tol=1e-15)


def test_mixed_dtypes_are_scanned_each_in_its_own(tmp_path):
    values = random_values(14, 20, 20)
    write_checkpoint(
        tmp_path,
        {
            EMBEDDING: ("BF16", values),
            "lm_head.weight": ("F16", values),
            "model.norm.weight": ("F32", values[0]),
        },
    )
    by_name = {t.name: t for t in scan_folder(tmp_path, 2).tensors}
    for name, dtype, data in (
        ("token_embd.weight", "BF16", values),
        ("output.weight", "F16", values),
        ("output_norm.weight", "F32", values[0]),
    ):
        assert_agrees(by_name[name], reference(decode(encode(data, dtype), dtype)))


# The pieces.


def test_parts_of_floats_combine_to_the_whole():
    data = random_values(15, 1000)
    parts = [data[:10], data[10:700], data[700:]]
    norms = combine_first([first_pass(part) for part in parts])
    seconds = [second_pass(p, norms, epsilon=0.01, n_bins=256) for p in parts]
    found = summarise_floats(norms, seconds, epsilon=0.01)
    expected = reference(data.astype(np.float64))
    for name, value in found.model_dump().items():
        if name in expected:
            assert isclose(value, expected[name], rel_tol=1e-12, abs_tol=1e-14)


# The built-in model.


@pytest.fixture(scope="module")
def demo():
    return open_checkpoint(str(demo_checkpoint()))


def demo_weights(demo, name: str) -> Floats:
    shard, tensor = next(pair for pair in demo.tensors if pair[1].name == name)
    with shard.path.open("rb") as file:
        file.seek(tensor.begin)
        return decode(file.read(tensor.end - tensor.begin), tensor.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [0.0, 0.01])
def test_the_built_in_model_agrees_with_the_definition(demo, epsilon):
    scan = scan_checkpoint(demo, Measures(epsilon=epsilon), work=Work(2))
    by_name = {tensor.hf_names[0]: tensor for tensor in scan.tensors}
    layer = [name for name in by_name if name.startswith("model.layers.4.")]
    matrices = [name for name in layer if "norm" not in name]
    assert len(matrices) == 7
    checked = {}
    for name in [*layer, "model.norm.weight"]:
        checked[name] = reference(demo_weights(demo, name), epsilon)
        assert_agrees(by_name[name], checked[name])
    n_weights = sum(by_name[name].n_weights for name in matrices)
    for measure in ("softmax_entropy_nats", "histogram_entropy_bits"):
        mean = fsum(by_name[n].n_weights * checked[n][measure] for n in matrices)
        found = getattr(scan.layers[4], measure)
        assert isclose(found, mean / n_weights, rel_tol=1e-12)
    assert len(scan.layers) == 30


@pytest.mark.slow
def test_threads_leave_every_bit_of_the_built_in_model(demo):
    assert scan_checkpoint(demo, work=Work(2)) == scan_checkpoint(demo)
