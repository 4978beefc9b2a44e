"""Proxies, certificates, the Hub and the token for it."""

from __future__ import annotations

import json
import os
import re
from importlib.util import find_spec
from pathlib import Path

from ewq_gguf.doctor import child
from ewq_gguf.doctor.check import Finding, failure, ok, warning
from ewq_gguf.errors import EwqError
from ewq_gguf.process import python_argv

_PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
_SCHEMES = ("http", "https", "socks5", "socks5h")
_CERTIFICATES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "PIP_CERT")
_HUB_SECONDS = 5.0
_CHILD_SECONDS = 20.0
_HUB = "https://huggingface.co"


def proxy() -> Finding:
    """The proxies that downloads go through."""
    used = []
    for name in (case for each in _PROXIES for case in (each, each.lower())):
        url = os.environ.get(name)
        if not url:
            continue
        # Never the user and password in it.
        shown = re.sub(r"//[^/]*@", "//", url)
        scheme, separator, _ = url.partition("://")
        if not separator or scheme.lower() not in _SCHEMES:
            return failure(
                f"{name}={shown} is no URL of a proxy",
                f"run `export {name}=http://HOST:PORT`, or `unset {name}`",
            )
        if scheme.lower().startswith("socks") and find_spec("socksio") is None:
            return failure(
                f"{name}={shown}: the Hub's client needs socksio for it",
                f"install socksio in this environment, or run `unset {name}`",
            )
        used.append(f"{name}={shown}")
    return ok(", ".join(used) or "none")


def certificates() -> Finding:
    """The certificates that variables name."""
    used: dict[str, list[str]] = {}
    for name in _CERTIFICATES:
        path = os.environ.get(name)
        if path and not Path(path).exists():
            return failure(
                f"{name}={path}: there is no such file",
                f"run `unset {name}`, or name a file of certificates",
            )
        if path:
            used.setdefault(path, []).append(name)
    texts = (f"{path} ({', '.join(names)})" for path, names in used.items())
    return ok(", ".join(texts) or "the usual ones")


def hub() -> Finding:
    """Whether the Hub answers, and takes the token that is there."""
    endpoint = os.environ.get("HF_ENDPOINT") or _HUB
    where = endpoint.removeprefix("https://")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return warning(
            "HF_HUB_OFFLINE is set: only models that are in its cache can be used",
            "run `unset HF_HUB_OFFLINE`",
        )
    try:
        told = _ask()
    except EwqError as error:
        return warning(
            f"{where} did not answer ({error.problem})",
            "check the network; folders and models in the Hub's cache work without it",
        )
    if problem := told.get("problem"):
        return warning(
            f"{where} cannot be reached ({problem})",
            "check the network and proxies; folders and models in the Hub's cache work "
            "without them",
        )
    status = told.get("status")
    if status == 200:
        return ok(f"{where}, signed in as {told.get('name')}")
    if status == 401 and not told.get("has_token"):
        return ok(f"{where} answers; no token (gated models: run `hf auth login`)")
    if status == 401:
        from_variable = "HF_TOKEN" in os.environ
        return failure(
            f"{where} refuses the token"
            + (" in HF_TOKEN" if from_variable else ", and with it public models too"),
            "make another at "
            + f"{endpoint}/settings/tokens, then "
            + ("`export HF_TOKEN=...`" if from_variable else "run `hf auth login`"),
        )
    return warning(f"{where} answers {status}", "try again later")


def _ask() -> dict[str, object]:
    """The child's output.

    Raises:
        ChildError, ResourceError: it took too long or crashed.
    """
    argv = python_argv("ewq_gguf.checkpoint.hub_child", str(_HUB_SECONDS))
    text = child.output(argv, seconds=_CHILD_SECONDS)
    told: dict[str, object] = json.loads(text.splitlines()[-1])
    return told
