"""Do errors add up? Roles and outliers of the built-in model, probed and predicted.

    python -m benchmarks.probes

What a role costs in a type beside the sum over its tensors of slope x error, slopes
from each tensor alone at Q4_0; then the same of the tensors whose importance is mostly
one column's. About 15 minutes on 2 cores; what was probed before is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from ewq_gguf import api
from ewq_gguf.bench.runner import CPU_SETUP, Request
from ewq_gguf.bench.writing import written_text
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.ggml_types import n_dims, written_type
from ewq_gguf.llamacpp.imatrix import importance_values
from ewq_gguf.optimal.cost_model import measured_slopes
from ewq_gguf.optimal.error_table import error_table
from ewq_gguf.optimal.sensitivity import needs_own_probe, roles_of
from ewq_gguf.optimal.settings import DEFAULT
from ewq_gguf.optimal.type_prober import open_prober
from ewq_gguf.records import OptimalPolicy
from ewq_gguf.stages.options import SILENT
from ewq_gguf.tensor_names import is_quantizable, role

TYPES = ("Q8_0", "Q6_K", "Q5_1", "Q5_0", "Q4_K", "Q4_0", "IQ4_NL", "Q3_K", "Q2_K")
N_OUTLIERS = 4


def main() -> None:
    """Print both tables."""
    run = api.with_imatrix(api.Run("demo"))
    options, toolchain = run.options, run.toolchain
    assert toolchain.lib_dir is not None
    assert options.imatrix is not None
    base = api.base_file(run)
    text = written_text(
        base,
        CPU_SETUP,
        lambda: SILENT.measure("text"),
        n_documents=64,
        seed=OptimalPolicy().seed,
    )
    request = Request(tasks=("kld",), base=base, texts=(("own", text),))
    menus = {
        tensor.name: [
            name for name in TYPES if written_type(name, tensor.shape[-1]) == name
        ]
        for tensor in read_gguf(base).tensors
        if is_quantizable(tensor.name, n_dims(tensor.shape))
    }
    errors = error_table(base, menus, toolchain.lib_dir, options=options)
    probe_type = DEFAULT.probe_type
    probed = {name: one[probe_type].error for name, one in errors.items()}
    values = importance_values(options.imatrix)
    shares = {n: float(v.max() / v.sum()) for n, v in values.items() if n in menus}
    most = sorted(shares, key=lambda name: -shares[name])[:N_OUTLIERS]
    with open_prober(
        request, toolchain.lib_dir, options=options, progress=SILENT
    ) as prober:
        slopes = measured_slopes(prober, probed, inf)
        print(
            f"{prober.n_probes} probes; any change costs {prober.noise_nats:.6f} nats\n"
        )

        def show(groups: Sequence[tuple[str, tuple[str, ...]]]) -> None:
            print("| what | type | probed, nats | predicted | ratio | needs its own |")
            print("|---|---|---:|---:|---:|---|")
            for what, names in groups:
                found = prober((names, ggml_type) for ggml_type in menus[names[0]])
                for (_, ggml_type), cost in found.items():
                    predicted = sum(
                        slopes[n] * errors[n][ggml_type].error for n in names
                    )
                    n_own = sum(
                        needs_own_probe(
                            errors[n][ggml_type],
                            errors[n][probe_type],
                            DEFAULT.doubt_ratio,
                        )
                        for n in names
                    )
                    print(
                        f"| {what} | {ggml_type} | {cost:.6f} | {predicted:.6f} | "
                        f"{cost / predicted:.2f} | {n_own} |"
                    )

        show([(role(names[0]), names) for names in roles_of(menus)])
        print("\nOne column's share of the importance, and its tensor alone:\n")
        show([(f"{name} {shares[name]:.0%}", (name,)) for name in most])


if __name__ == "__main__":
    main()
