"""In the converter's process: the pre-tokenizer that the user names.

The converter has no option for it: it knows a pre-tokenizer by the hash of a test text,
and stops where it does not know the hash. The name is in the environment.
"""

from __future__ import annotations

import os
from typing import Any

VARIABLE = "EWQ_PRE_TOKENIZER"


def use_named_pre() -> None:
    """Let the converter's classes answer with the name in the environment, if any."""
    name = os.environ.get(VARIABLE)
    if name is None:
        return
    from conversion.base import TextModel  # type: ignore[import-not-found]

    def named(self: Any, tokenizer: Any) -> str:
        return name

    TextModel.get_vocab_base_pre = named
