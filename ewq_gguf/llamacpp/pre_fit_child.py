"""Child process: a text's tokens in llama.cpp under several pre-tokenizers.

    python -m ewq_gguf.llamacpp.pre_fit_child JOB ANSWER

JOB is JSON: `gguf` (only its vocabulary is loaded), `tokenizer` (the folder of the
checkpoint's own), `text` and `names`. ANSWER holds for each name that llama.cpp takes
how many tokens agree, and how many there are.
"""

from __future__ import annotations

import json
import sys
from difflib import SequenceMatcher
from pathlib import Path


def main(job_path: Path, answer_path: Path) -> None:
    """Write {name: [agreeing, all]}."""
    import llama_cpp
    from transformers import AutoTokenizer

    job = json.loads(job_path.read_text(encoding="utf-8"))
    own = AutoTokenizer.from_pretrained(job["tokenizer"], trust_remote_code=False)
    wanted = own.encode(job["text"], add_special_tokens=False)
    answer = {}
    for name in job["names"]:
        try:
            model = llama_cpp.Llama(
                job["gguf"],
                vocab_only=True,
                verbose=False,
                kv_overrides={"tokenizer.ggml.pre": name},
            )
        except ValueError:  # this llama.cpp has no code for it
            continue
        found = model.tokenize(job["text"].encode(), add_bos=False, special=False)
        model.close()
        match = SequenceMatcher(None, wanted, found, autojunk=False)
        same = sum(block.size for block in match.get_matching_blocks())
        answer[name] = (same, max(len(wanted), len(found)))
    answer_path.write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
