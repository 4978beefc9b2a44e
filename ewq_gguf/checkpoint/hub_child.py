"""Child process: ask the Hub who this token belongs to, or only whether it answers.

python -m ewq_gguf.checkpoint.hub_child SECONDS

A process of its own, because looking up a name can take longer than any time-out of the
connection. The token is read here and printed nowhere.
"""

from __future__ import annotations

import json
import sys


def main(seconds: float) -> None:
    """Print `{"has_token", "status", "name", "problem"}` as the last line of stdout."""
    from huggingface_hub import constants, get_session, get_token
    from huggingface_hub.utils._headers import build_hf_headers

    token = get_token()
    told: dict[str, object] = {"has_token": token is not None}
    try:
        answer = get_session().get(
            f"{constants.ENDPOINT}/api/whoami-v2",
            headers=build_hf_headers(token=token or False),
            timeout=seconds,
        )
        told["status"] = answer.status_code
        told["name"] = answer.json().get("name") if answer.is_success else None
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        told["problem"] = reason.replace(token, "TOKEN") if token else reason
    sys.stdout.write(f"\n{json.dumps(told)}\n")


if __name__ == "__main__":
    main(float(sys.argv[1]))
