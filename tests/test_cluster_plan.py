"""Placement on machines: by hand, against brute force, and what people type."""

from __future__ import annotations

import tomllib
from io import StringIO
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from ewq_gguf.cli.budget import machines_of
from ewq_gguf.errors import InputError, UsageError
from ewq_gguf.plan.size_target import SizeTarget
from ewq_gguf.records.layout import LayoutTensor
from ewq_gguf.records.placement import Machine, Placement, Stage
from ewq_gguf.records.plan import PlanTensor
from ewq_gguf.report.placement_view import placement_view
from ewq_gguf.rpc.commands import rpc_commands, rpc_flags
from ewq_gguf.rpc.context_memory import (
    compute_bytes,
    context_bytes,
    kv_bytes,
    padded_context,
)
from ewq_gguf.rpc.machines import check_machines, machines_of_tables, parse_machine
from ewq_gguf.rpc.placement import can_place, place
from ewq_gguf.tensor_names import layer_idx, role

#: Of the models below: 2 x 16 values a token and layer, 2 bytes each, 256 tokens.
KV = 2 * 16 * 2 * 256
EMBEDDING, HEAD = 1000, 1600


def tensor(name, size, shape=(16, 16)):
    return PlanTensor(
        name=name,
        role=role(name),
        layer_idx=layer_idx(name),
        shape=shape,
        base_type="F32",
        is_quantizable=True,
        ggml_type="F32",
        written_type="F32",
        size_bytes=size,
    )


def model(layer_sizes, *, is_tied=False):
    """Layers of these bytes, with an embedding and a head."""
    tensors = [tensor("token_embd.weight", EMBEDDING), tensor("output_norm.weight", 0)]
    if not is_tied:
        tensors.append(tensor("output.weight", HEAD))
    for i, size in enumerate(layer_sizes):
        tensors.append(tensor(f"blk.{i}.attn_k.weight", size))
        tensors.append(tensor(f"blk.{i}.attn_v.weight", 0))
    return tuple(tensors)


def machine(name, n_bytes, *, head=False, tensors=None, disk=None, speed=None):
    """A machine with room for so many bytes beside the compute buffer."""
    room = compute_bytes(tensors or model([1]), 256, has_output=head)
    return Machine(
        name=name,
        memory_bytes=n_bytes + room,
        disk_bytes=disk,
        bytes_per_second=speed,
    )


def runs(placement):
    return [(s.machine, s.first_layer, s.last_layer) for s in placement.stages]


# Placement by hand.


def test_one_machine_that_holds_everything_holds_a_tied_embedding_once():
    tied = model([100, 100], is_tied=True)
    just = machine("a", EMBEDDING + 200 + 2 * KV, head=True)

    found = place(tied, [just], 256)

    assert found is not None
    assert found.hops == 0
    assert found.stages[0].weight_bytes == EMBEDDING + 200
    assert place(tied, [machine("a", EMBEDDING + 199 + 2 * KV, head=True)], 256) is None


def test_a_tied_embedding_is_stored_twice_on_two_machines():
    tied = model([100, 100], is_tied=True)
    two = [machine("a", EMBEDDING), machine("b", EMBEDDING + 200 + 2 * KV, head=True)]

    found = place(tied, two, 256)

    assert found is not None
    assert runs(found) == [("a", None, None), ("b", 0, 1)]
    assert [s.weight_bytes for s in found.stages] == [EMBEDDING, EMBEDDING + 200]
    assert [s.has_output for s in found.stages] == [False, True]
    assert found.stages[1].kv_bytes == 2 * KV


def test_fewest_machines_win_over_the_order_they_are_named_in():
    tensors = model([100] * 4)
    small = [machine(f"s{i}", 200 + 2 * KV) for i in range(2)]
    large = machine("large", HEAD + 300 + 3 * KV, head=True)
    main = machine("main", EMBEDDING + 100 + KV)

    found = place(tensors, [main, *small, large], 256)

    assert found is not None
    assert runs(found) == [("main", 0, 0), ("large", 1, 3)]


def test_the_faster_machine_takes_the_layers_where_all_speeds_are_known():
    tensors = model([100] * 4)
    room = EMBEDDING + HEAD + 400 + 4 * KV
    slow = machine("slow", EMBEDDING + 300 + 3 * KV, speed=10)
    others = [
        machine("b", room, head=True, speed=100),
        machine("c", room, head=True, speed=1000),
    ]

    timed = place(tensors, [slow, *others], 256)
    untimed = place(tensors, [slow, others[0], others[1].model_copy(
        update={"bytes_per_second": None})], 256)  # fmt: skip

    assert timed is not None
    assert runs(timed) == [("slow", None, None), ("c", 0, 3)]
    assert timed.seconds_per_token == pytest.approx((400 + HEAD) / 1000)
    assert untimed is not None
    assert runs(untimed) == [("slow", 0, 2), ("b", 3, 3)]
    assert untimed.seconds_per_token is None


def test_a_worker_may_hold_the_output_head_alone():
    tensors = model([100, 100])
    two = [machine("a", EMBEDDING + 200 + 2 * KV), machine("b", HEAD, head=True)]

    found = place(tensors, two, 256)

    assert found is not None
    assert runs(found) == [("a", 0, 1), ("b", None, None)]
    assert rpc_flags(found.model_copy(update={
        "stages": (found.stages[0], found.stages[1].model_copy(
            update={"machine": "10.0.0.2"}))}))[4:] == (
        "-ngl", "1", "--rpc", "10.0.0.2:50052", "--tensor-split", "1")  # fmt: skip


def test_the_disk_limits_weights_and_not_the_cache():
    tensors = model([100, 100])
    main = machine("a", EMBEDDING)
    worker = machine("b", HEAD + 200 + 2 * KV, head=True, disk=HEAD + 200)

    assert place(tensors, [main, worker], 256) is not None
    tight = worker.model_copy(update={"disk_bytes": HEAD + 199})
    assert place(tensors, [main, tight], 256) is None


def test_the_context_counts():
    tensors = model([100, 100])
    only = machine("a", EMBEDDING + HEAD + 200 + 2 * KV, head=True)

    assert place(tensors, [only], 1) is not None
    assert place(tensors, [only], 257) is None


def test_tensors_outside_the_layers_go_where_llama_cpp_puts_them():
    tensors = (
        *model([100, 100]),
        tensor("token_embd_norm.weight", 10),  # with the first layer
        tensor("rope_freqs.weight", 7),  # everywhere
        tensor("position_embd.weight", 20),  # with the input
        tensor("cls.weight", 40),  # with the output
    )
    main, worker = machine("a", EMBEDDING + 27), machine("b", 10**9, head=True)

    found = place(tensors, [main, worker], 256)

    assert found is not None
    assert [s.weight_bytes for s in found.stages] == [
        EMBEDDING + 20 + 7,
        200 + 10 + 7 + HEAD + 40,
    ]


def test_any_room_and_speed_can_be_typed():
    endless = parse_machine("a=999999999999999999TiB,999999999999999999TiB,1B/s")

    found = place(model([100, 100]), [endless], 256)

    assert found is not None
    assert found.seconds_per_token == 200 + HEAD


def test_126_layers_on_8_machines():
    tensors = model([3_000_000_000 + i for i in range(126)])
    cluster = [
        machine(f"10.0.0.{i}", (45 + 3 * i) * 10**9, head=True, speed=10**10 * (1 + i))
        for i in range(8)
    ]

    found = place(tensors, cluster, 8192)

    assert found is not None
    assert sum(s.n_layers for s in found.stages) == 126
    assert found.hops == len(found.stages) - 1


@pytest.mark.parametrize("differ", [0, 1])
def test_126_layers_on_16_machines_that_are_all_needed(differ):
    """As many sets of workers as there can be, or only 16 where they are alike."""
    tensors = model([10**9 + i for i in range(126)])
    cluster = [
        machine(
            str(i),
            8 * (10**9 + KV) + differ * i * 10**7 + 4000,
            head=True,
            speed=10**9 * (1 + differ * i),
        )
        for i in range(16)
    ]

    found = place(tensors, cluster, 256)

    assert found is not None
    assert found.hops == 15
    check_consistent(found, 126)
    assert not can_place(tensors, cluster[1:], 256)


def test_a_model_without_an_input_embedding():
    tensors = model([100, 100])[2:]
    only = machine("a", HEAD + 200 + 2 * KV, head=True, tensors=tensors)
    untied = [t for t in tensors if t.name != "output.weight"]

    found = place(tensors, [only], 256)

    assert found is not None
    assert found.stages[0].weight_bytes == HEAD + 200
    assert compute_bytes(tensors, 256) == compute_bytes(tensors, 256, has_output=False)
    rest = place(untied, [only], 256)
    assert rest is not None
    assert rest.stages[0].weight_bytes == 200


@pytest.mark.parametrize("n", [0, 17])
def test_llama_cpp_takes_16_servers(n):
    with pytest.raises(UsageError, match="1 to 16 machines"):
        place(model([1]), [machine(str(i), 1) for i in range(n)], 256)


def test_a_model_without_layers_is_refused():
    with pytest.raises(InputError, match="no layers"):
        place(model([]), [machine("a", 10**9)], 256)


# Placement against brute force.


def every_placement(tensors, layers, machines):
    """(stages, seconds) of each way to place layers that every machine has room for."""
    is_tied = not any(t.name == "output.weight" for t in tensors)
    body = compute_bytes(tensors, 256, has_output=False)
    full = compute_bytes(tensors, 256)
    head = EMBEDDING if is_tied else HEAD
    units = [*layers, head]
    for n in range(len(machines)):
        for workers in permutations(machines[1:], n):
            for cuts in combinations(range(len(units)), n):
                ends = [*cuts, len(units)]
                if n == 0:
                    ends = [len(units)]
                start, seconds, fits = 0, 0.0, True
                for who, end in zip([machines[0], *workers], ends, strict=True):
                    read = sum(units[start:end])
                    weights = read
                    if who is machines[0]:
                        weights += EMBEDDING
                        if is_tied and end == len(units):
                            weights -= EMBEDDING
                    cache = KV * (min(end, len(layers)) - start)
                    room = full if end == len(units) else body
                    disk = who.disk_bytes
                    fits &= weights + cache + room <= who.memory_bytes
                    fits &= disk is None or weights <= disk
                    seconds += read / (who.bytes_per_second or 1)
                    start = end
                if fits:
                    yield n + 1, seconds


@settings(max_examples=300)
@given(
    layers=st.lists(st.integers(1, 40).map(lambda n: 1000 * n), min_size=1, max_size=5),
    kinds=st.lists(
        st.tuples(st.integers(1, 8), st.integers(1, 5)), min_size=1, max_size=4
    ),
    members=st.lists(st.integers(0, 3), min_size=1, max_size=5),
    disk=st.none() | st.integers(1000, 90_000),
    is_tied=st.booleans(),
)
def test_no_placement_is_better(layers, kinds, members, disk, is_tied):
    """Of machines that may be alike: several of one kind."""
    tensors = model(layers, is_tied=is_tied)
    machines = []
    for i, member in enumerate(members):
        room, speed = kinds[member % len(kinds)]
        machines.append(
            machine(str(i), 20_000 * room, head=True, speed=speed, disk=disk)
        )

    found = place(tensors, machines, 256)
    best = min(every_placement(tensors, layers, machines), default=None)

    assert can_place(tensors, machines, 256) == (best is not None)
    if best is None:
        assert found is None
        return
    assert found is not None
    assert len(found.stages) == best[0]
    assert found.seconds_per_token == pytest.approx(best[1])
    check_consistent(found, len(layers))
    untimed = [m.model_copy(update={"bytes_per_second": None}) for m in machines]
    blind = place(tensors, untimed, 256)
    assert blind is not None
    assert blind.hops == found.hops


def check_consistent(found: Placement, n_layers):
    """Every layer once and in order, every machine within its limits."""
    layers = [
        idx
        for s in found.stages
        if s.first_layer is not None and s.last_layer is not None
        for idx in range(s.first_layer, s.last_layer + 1)
    ]
    assert layers == list(range(n_layers))
    assert [s.has_output for s in found.stages] == [False] * found.hops + [True]
    by_name = {m.name: m for m in found.machines}
    for stage in found.stages:
        limit = by_name[stage.machine]
        used = stage.weight_bytes + stage.kv_bytes + stage.compute_bytes
        assert used <= limit.memory_bytes
        assert limit.disk_bytes is None or stage.weight_bytes <= limit.disk_bytes


# Memory beside the weights.


@pytest.mark.parametrize(
    ("shapes", "width"),
    [
        pytest.param({"attn_k": (8, 32), "attn_v": (12, 32)}, 20, id="attention"),
        pytest.param({"attn_k": (8, 32)}, 16, id="v-is-k"),
        pytest.param({"attn_qkv": (48, 32), "attn_output": (32, 32)}, 16, id="fused"),
        pytest.param({"attn_qkv": (48, 32), "ssm_out": (32, 32)}, 0, id="linear"),
        pytest.param({"ssm_in": (64, 32)}, 0, id="mamba"),
        pytest.param(
            {"attn_kv_a_mqa": (40, 64), "attn_k_b": (4, 32, 16)}, 40, id="latent"
        ),
        pytest.param(
            {
                "attn_kv_a_mqa": (40, 64),
                "attn_q": (96, 64),
                "attn_kv_b": (160, 32),
                "attn_output": (64, 80),
            },
            176,
            id="latent-not-absorbed",
        ),
    ],
)
@pytest.mark.parametrize(("asked", "cells"), [(1, 256), (256, 256), (257, 512)])
def test_the_cache_of_a_layer(shapes, width, asked, cells):
    tensors = [
        LayoutTensor(name=f"blk.3.{name}.weight", shape=shape, ggml_type="F16")
        for name, shape in shapes.items()
    ]

    assert padded_context(asked) == cells
    assert kv_bytes(tensors, asked) == {3: 2 * cells * width}


def test_context_bytes_is_cache_and_buffer():
    tensors = model([1, 1])

    buffer = compute_bytes(tensors, 256)
    assert context_bytes(tensors, 256) == 2 * KV + buffer
    assert context_bytes(tensors, 256, n_devices=3) == 2 * KV + 3 * buffer


def test_the_memory_of_several_devices_holds_a_buffer_in_each():
    tensors = [
        LayoutTensor(name=t.name, shape=t.shape, ggml_type="F16") for t in model([1, 1])
    ]
    room = 10 * context_bytes(tensors, 256)

    one, two = (
        SizeTarget("auto", memory_bytes=room, n_devices=n, n_ctx=256).limit(
            room, tensors
        )
        for n in (1, 2)
    )

    assert one.n_bytes - two.n_bytes == compute_bytes(tensors, 256)


@pytest.mark.parametrize(
    ("ask", "option"),
    [
        (SizeTarget("auto", memory_bytes=1), "--budget"),
        (SizeTarget("1 machines", machines=(parse_machine("a=1B"),)), "--machine"),
    ],
)
def test_too_little_memory_is_said_of_the_option_that_was_given(ask, option):
    with pytest.raises(InputError, match=f"{option}: 1 bytes of memory do not hold"):
        ask.limit(1, model([1, 1]))


def test_experts_are_counted_as_often_as_one_token_meets_them():
    def room(n_experts):
        shape = (n_experts, 1000, 16)
        extra = tensor("blk.0.ffn_up_exps.weight", 1, shape)
        return compute_bytes((*model([1]), extra), 512)

    assert room(8) < room(16) == room(128)


# What people type.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=1GiB", Machine(name="a", memory_bytes=1 << 30)),
        ("a=1GB,2GB", Machine(name="a", memory_bytes=10**9, disk_bytes=2 * 10**9)),
        (
            "10.0.0.2:99=1GB,50GB/s",
            Machine(
                name="10.0.0.2:99", memory_bytes=10**9, bytes_per_second=5 * 10**10
            ),
        ),
        (
            "a=1GB, 2GB, 3GB/s",
            Machine(
                name="a",
                memory_bytes=10**9,
                disk_bytes=2 * 10**9,
                bytes_per_second=3 * 10**9,
            ),
        ),
    ],
)
def test_a_machine(text, expected):
    assert parse_machine(text) == expected


@pytest.mark.parametrize(
    "text", ["", "a", "=1GB", "a=", "a=0GB", "a=1GB,2GB,3GB", "a=3GB/s", "a=1GB,1/s"]
)
def test_no_machine(text):
    with pytest.raises(UsageError):
        parse_machine(text)


def test_a_machine_is_named_once():
    with pytest.raises(UsageError, match="a: is given twice"):
        check_machines([parse_machine("a=1GB"), parse_machine("a=2GB")])


def test_workers_of_one_address_are_refused_before_planning():
    main = parse_machine("10.0.0.2=1GB")  # whose own worker may have its address

    check_machines([main, parse_machine("10.0.0.2:50052=2GB")])
    for first, second in (("10.0.0.2", "10.0.0.2:50052"), ("gpu1:9", "GPU1:9")):
        two = [parse_machine(f"{name}=2GB") for name in (first, second)]
        with pytest.raises(UsageError, match="two workers' address"):
            check_machines([main.model_copy(update={"name": "main"}), *two])


def test_machines_of_a_file():
    text = '[[machine]]\nname="a"\nmemory="1GB"\n[[machine]]\nname="b"\nmemory="2GB"\n'
    text += 'disk = "3GB"\nspeed = "4GB/s"\n'

    found = machines_of_tables(tomllib.loads(text))

    assert found == (parse_machine("a=1GB"), parse_machine("b=2GB,3GB,4GB/s"))


@pytest.mark.parametrize(
    ("tables", "problem"),
    [
        ({}, "is not a list"),
        ({"machine": [], "x": 1}, "is not a list"),
        ({"machine": 3}, "is not a list"),
        ({"machine": []}, "is not a list"),
        ({"machine": [3]}, "machine 1: is not a"),
        ({"machine": [{"name": "a"}]}, "has no memory"),
        ({"machine": [{"memory": "1GB"}]}, "has no name"),
        ({"machine": [{"name": "a", "memory": 1}]}, "has a memory that is no text"),
        ({"machine": [{"name": "a", "memory": "1GB", "ram": ""}]}, "unknown key 'ram'"),
    ],
)
def test_no_machines_of_a_file(tables, problem):
    with pytest.raises(InputError, match=problem):
        machines_of_tables(tables)


def test_machines_of_both(tmp_path):
    file = tmp_path / "machines.toml"
    file.write_text('[[machine]]\nname = "a"\nmemory = "1GB"\n')

    assert machines_of(["b=2GB"], file) == (
        parse_machine("a=1GB"),
        parse_machine("b=2GB"),
    )
    assert machines_of(["b=2GB"], None) == (parse_machine("b=2GB"),)
    with pytest.raises(UsageError, match="a: is given twice"):
        machines_of(["a=2GB"], file)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"[[machine", "is not TOML"),
        (b"x = " + b"[" * 9999, "is not TOML"),
        (b"\xff", "is not UTF-8"),
        (b"", "is not a list"),
        (None, "cannot be read"),
    ],
)
def test_no_file_of_machines(tmp_path, content, problem):
    file = tmp_path / "machines.toml"
    if content is not None:
        file.write_bytes(content)

    with pytest.raises(InputError, match=problem) as caught:
        machines_of([], file)

    assert "\n" not in str(caught.value)


# What is printed.


def two_stages(worker, *, buffers=0):
    return Placement(
        machines=(
            Machine(name="main", memory_bytes=10**9),
            Machine(name=worker, memory_bytes=10**9, disk_bytes=10**9),
            Machine(name="idle", memory_bytes=10**9, bytes_per_second=10**9),
        ),
        n_ctx=4096,
        hops=1,
        seconds_per_token=0.0125,
        stages=(
            Stage(
                machine="main",
                first_layer=0,
                last_layer=9,
                weight_bytes=6 * 10**8,
                kv_bytes=10**6,
                compute_bytes=buffers,
                has_output=False,
            ),
            Stage(
                machine=worker,
                first_layer=10,
                last_layer=10,
                weight_bytes=9 * 10**8,
                kv_bytes=10**6,
                compute_bytes=buffers,
                has_output=True,
            ),
        ),
    )


@pytest.mark.parametrize("width", [80, 40])
@pytest.mark.parametrize("worker", ["10.0.0.2", "worker.example.com:50052"])
def test_the_view_fits_its_columns(width, worker):
    console = Console(width=width, file=StringIO(), record=True)
    console.print(placement_view(two_stages(worker, buffers=2 * 10**7)))
    text = console.export_text()

    assert all(len(line) <= width for line in text.splitlines())
    assert "…" not in text
    for part in (
        "0-9", "10+out", "62%", "92%", "20.00 MB", "buffers", "1 between", "12.5 ms",
        "idle",
    ):  # fmt: skip
        assert part in text


def test_the_commands_of_a_placement():
    assert rpc_commands("m o.gguf", two_stages("10.0.0.2:50053")).splitlines() == [
        "# The workers first. All machines need the same build of llama.cpp, and each",
        "# worker one device: name it with -d where there are several.",
        "# 10.0.0.2: layer 10 and the output head, 900,000,000 bytes of weights.",
        "ggml-rpc-server -H 10.0.0.2 -p 50053 -c",
        "# The main machine: layers 0 to 9, 600,000,000 bytes of weights, and the input"
        " embedding.",
        "llama-server -m 'm o.gguf' -c 4096 -fit off -ngl 2 --rpc 10.0.0.2:50053 "
        "--tensor-split 2",
        "# Or, to measure its speed:",
        "llama-bench -m 'm o.gguf' -ngl 2 --rpc 10.0.0.2:50053 -ts 2",
    ]


def test_the_commands_of_one_machine_name_no_workers():
    two = two_stages("unused")
    alone = two.stages[0].model_copy(update={"has_output": True})
    one = two.model_copy(update={"stages": (alone,), "hops": 0})

    assert rpc_commands("m.gguf", one).splitlines() == [
        "# The main machine: layers 0 to 9 and the output head, 600,000,000 bytes of "
        "weights, and the input embedding.",
        "llama-server -m m.gguf -c 4096 -fit off -ngl 0",
        "# Or, to measure its speed:",
        "llama-bench -m m.gguf -ngl 0",
    ]


@pytest.mark.fault(96)
def test_a_public_address_is_refused_unless_it_is_allowed():
    public = two_stages("8.8.8.8")

    with pytest.raises(UsageError, match="8.8.8.8: is a public address") as caught:
        rpc_commands("m.gguf", public)

    assert caught.value.exit_code == 2
    assert "# WARNING" in rpc_commands("m.gguf", public, allow_public=True)


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "192.168.1.2:1", "gpu1"])
def test_a_private_address_needs_no_leave(name):
    assert "WARNING" not in rpc_commands("m.gguf", two_stages(name))


@pytest.mark.fault(96)
@pytest.mark.parametrize(
    "name",
    ["", "a b", "a;b", "a$(x)", "-H", "a:0", "a:65536", "a:1:2", "::1", "8.8.2056",
     "0x8080808", "134744072", "a.0x8", "256.1.1.1", "a:٣",
     "0.0.0.0", "0.0.0.0:1", "0.1.2.3", "224.0.0.1", "239.1.1.1", "240.0.0.1",
     "255.255.255.255", "127.1", "10.0.0.2\n", "a\nb"],
)  # fmt: skip
def test_what_is_no_address(name):
    with pytest.raises(UsageError, match="is not the address of a worker"):
        rpc_commands("m.gguf", two_stages(name), allow_public=True)
    main, worker = (Machine(name=of, memory_bytes=1) for of in ("main", name))
    check_machines([worker])
    with pytest.raises(UsageError, match="is not the address of a worker"):
        check_machines([main, worker])


def test_two_workers_of_one_address():
    two = two_stages("10.0.0.2")
    again = two.stages[1].model_copy(update={"machine": "10.0.0.2:50052"})

    with pytest.raises(UsageError, match="two workers' address"):
        rpc_flags(two.model_copy(update={"stages": (*two.stages, again)}))


@pytest.mark.parametrize("n", [1, 7, 126])
@pytest.mark.parametrize("m", [1, 3])
def test_shares_of_layers_meet_every_layer_exactly(n, m):
    """llama.cpp's own arithmetic, in its 32-bit floats, finds the planned device."""
    shares = [n, m, n + m, 1]
    ends = np.cumsum(shares).astype(np.float32) / np.float32(sum(shares))
    owners = [
        int(np.searchsorted(ends, np.float32(i) / np.float32(sum(shares)), "right"))
        for i in range(sum(shares))
    ]

    assert owners == [k for k, share in enumerate(shares) for _ in range(share)]
