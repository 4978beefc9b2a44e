"""The ways people write a model of the Hub: ids, pages, links to files, tags."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from ewq_gguf.errors import InputError, UsageError

_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_NAME = r"[A-Za-z0-9][\w.-]*"
_HUB_ID = re.compile(rf"({_NAME}/{_NAME})(?:@([\w./-]+))?(?::([\w.-]+))?")
_ON_A_PAGE = re.compile(rf"({_NAME}(?:/{_NAME})?)(?:@([\w./-]+))?(?::([\w.-]+))?")
#: Words that a page's address has between a repository and a revision.
_WITH_REVISION = ("tree", "blob", "resolve", "raw", "commit")
#: What stands in the place of an owner on pages of other things.
_OTHERS = ("api", "blog", "collections", "datasets", "docs", "papers", "spaces")


@dataclass(frozen=True)
class HubName:
    """A model of the Hub.

    Attributes:
        hub_id: `org/name`.
        revision: a branch, tag or commit; None for the main branch.
        file: the file of the repository that was named; None for none.
    """

    hub_id: str
    revision: str | None = None
    file: str | None = None


def hub_name(model: str, endpoint: str) -> HubName | None:
    """The model of the Hub that somebody means, or None if it is none of the Hub's.

    Args:
        model: `org/name[@revision]`, a page's address with or without https://, on the
            Hub or a mirror, or `hf://org/name`.
        endpoint: The address of the Hub or its mirror, as HF_ENDPOINT has it.

    Raises:
        UsageError: a tag follows, which names a finished file.
        InputError: it is a page of the Hub, but no model's.
    """
    page = _page(model, endpoint)
    pattern = _HUB_ID if page is None else _ON_A_PAGE
    head, rest = (model, []) if page is None else _split(page, model)
    match = pattern.fullmatch(head)
    if match is None:
        if page is not None:
            raise _no_model(model)
        return None
    hub_id, revision, tag = match.groups()
    if tag is not None:
        raise _tagged(model, hub_id, tag)
    if not rest or rest[0] not in _WITH_REVISION or len(rest) == 1:
        return HubName(hub_id, revision)
    n_parts = 3 if rest[1:3] == ["refs", "pr"] else 1
    revision, inside = "/".join(rest[1 : 1 + n_parts]), rest[1 + n_parts :]
    is_file = rest[0] != "tree"
    if len(inside) > 1 or (inside and not is_file):
        raise InputError(
            "scan",
            model,
            "is in a subfolder of the repository",
            f"run `hf download {hub_id} --include '{inside[0]}/*' --local-dir DIR` and "
            "give that folder",
        )
    return HubName(hub_id, revision, inside[0] if inside else None)


def _page(model: str, endpoint: str) -> str | None:
    """The path of a page of the Hub, without a slash around it; None of others."""
    for prefix in (f"{endpoint.rstrip('/')}/", "hf://"):
        if model.startswith(prefix):
            return _path(model.removeprefix(prefix))
    scheme = model if re.match(r"https?://", model) else f"https://{model}"
    try:
        parts = urlsplit(scheme)
    except ValueError:
        return None
    return _path(parts.path) if parts.netloc.lower() in _HOSTS else None


def _path(text: str) -> str:
    return unquote(re.split(r"[?#]", text)[0]).strip("/")


def _split(page: str, model: str) -> tuple[str, list[str]]:
    """`org/name`, or a lone `name` of old, and what follows it."""
    parts = page.split("/")
    if parts[0] in _OTHERS:
        raise _no_model(model)
    n_parts = 1 if len(parts) == 1 or parts[1] in _WITH_REVISION else 2
    if len(parts) > 2 and "@" in parts[1]:  # a revision may hold slashes
        n_parts = len(parts)
    return "/".join(parts[:n_parts]), parts[n_parts:]


def _no_model(model: str) -> InputError:
    return InputError(
        "scan", model, "is no model's page", "give a model's id, such as org/name"
    )


def _tagged(model: str, hub_id: str, tag: str) -> UsageError:
    return UsageError(
        "scan",
        model,
        f"{tag} names a finished file, and ewq makes its own of unquantised models",
        f"give {hub_id} (not its GGUF copy), and `--policy preset:{tag.upper()}` for a "
        "standard file",
    )
