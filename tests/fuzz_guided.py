"""One target of fuzz_readers with atheris, which keeps inputs that reach new code."""

import random
import sys

import atheris

with atheris.instrument_imports(include=["ewq_gguf"]):
    from tests.fuzz_readers import MAX_INPUT_BYTES, TARGETS, fast_folder, options


def main() -> None:
    """Fuzz until the time is over or an input fails; atheris ends the process."""
    given = options()
    target = TARGETS[given.target]

    def change(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.2:
            return bytes(atheris.Mutate(data, max_size))
        return target.change(data, rng)[:max_size]

    with fast_folder() as work, fast_folder() as corpus:
        for index, data in enumerate(target.seeds):
            (corpus / str(index)).write_bytes(data)
        settings = {
            "seed": given.seed,
            "max_total_time": round(given.seconds),
            "max_len": MAX_INPUT_BYTES,
            "artifact_prefix": f"{given.save}/{given.target}-",
            "timeout": 20,
            "rss_limit_mb": 2048,
            "print_final_stats": 1,
            "verbosity": 0,
        }

        def read(data: bytes) -> None:
            target.outcome(work, data)

        argv = [sys.argv[0], *(f"-{key}={value}" for key, value in settings.items())]
        atheris.Setup([*argv, str(corpus)], read, custom_mutator=change)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
