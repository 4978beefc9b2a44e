"""Open a MODEL: a folder, a file, a Hub id, an https URL or the built-in model."""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

from ewq_gguf import store
from ewq_gguf.checkpoint.demo import DEMO_NAME, demo_checkpoint
from ewq_gguf.checkpoint.files import model_name
from ewq_gguf.checkpoint.folder import Checkpoint, open_folder
from ewq_gguf.checkpoint.fp8 import quantisation_of
from ewq_gguf.checkpoint.gguf_source import is_gguf, open_gguf, open_remote_gguf
from ewq_gguf.checkpoint.hub import HUB_FILES, check_has_weights, opener, snapshot
from ewq_gguf.checkpoint.hub_names import HubName, hub_name
from ewq_gguf.checkpoint.model_config import read_config
from ewq_gguf.checkpoint.packing import packing_of
from ewq_gguf.checkpoint.remote import RemoteFile, fetch_small
from ewq_gguf.errors import InputError, UsageError
from ewq_gguf.records import ModelIdentity

_URL = re.compile(r"https?://[^/]+/")
_REVISION = re.compile(r"/resolve/[^/]+$")

#: What is asked for below a plain URL, which cannot be listed.
_URL_FILES = (
    "config.json", "model.safetensors.index.json", "generation_config.json",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
    "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "tekken.json", "hf_quant_config.json", "spiece.model",
    "sentencepiece.bpe.model", "vocab.txt",
)  # fmt: skip

Say = Callable[[str], None]


@dataclass(frozen=True)
class Opening:
    """How to open a model.

    Attributes:
        architectures: the converter's, which a GGUF file has no need of; None does
            not check.
        is_streamed: leave the weights on their server.
        reads_weights: whether anybody will; if not, those on the Hub stay there.
        say: told about downloads and odd files; None for nobody.
    """

    architectures: Collection[str] | None = None
    is_streamed: bool = False
    reads_weights: bool = True
    say: Say | None = None


def open_checkpoint(model: str, opening: Opening | None = None) -> Checkpoint:
    """Find a model and read its config and headers, and no weight.

    Args:
        model: a folder, a .safetensors or an unquantised .gguf file, a model of the
            Hub (`org/name[@revision]`, or its page's address), an http(s) URL of a
            folder or of a .gguf file, or `demo`.
        opening: how to.

    Raises:
        UsageError: a local model cannot be streamed.
        InputError: there is no such model, or it is not a sound checkpoint.
        NetworkError: a server refused or cannot be reached.
        ResourceError: a download cannot be written.
    """
    opening = opening or Opening()
    try:
        checkpoint = _open(model, opening)
    except OSError as error:
        raise InputError(
            "scan",
            error.filename or model,
            f"cannot be read ({error.strerror})",
            "check its name and permissions",
        ) from error
    if packing_of(quantisation_of(checkpoint.folder, checkpoint.config)) is not None:
        from ewq_gguf.checkpoint.unpack import unpacked  # numba: not for the others

        checkpoint = unpacked(checkpoint, opening.say)
    if opening.say is not None:
        for note in checkpoint.notes:
            opening.say(note)
    return replace(checkpoint, origin=_origin(model, checkpoint.identity))


def _origin(model: str, identity: ModelIdentity) -> str:
    """The MODEL that names the same checkpoint in every folder and on other days."""
    if identity.hub_id is not None:
        return f"{identity.hub_id}@{identity.revision}"
    if model == "demo" or "://" in model:
        return model
    if not Path(model).exists():  # a GGUF of the Hub, without https://
        return f"https://{model}"
    return str(Path(model).absolute())


def _open(model: str, opening: Opening) -> Checkpoint:
    path = Path(model)
    if _URL.match(model):
        if name_on_hub := hub_name(model, hub_endpoint()):
            return _open_hub(name_on_hub, opening)
        return _open_url(model.rstrip("/"), opening)
    if model == "demo":
        folder, name = demo_checkpoint(on_line=opening.say), DEMO_NAME
    elif path.is_dir():
        folder, name = path, model_name(path)
    elif path.exists():
        return _open_file(path, opening)
    elif name_on_hub := hub_name(model, hub_endpoint()):
        return _open_hub(name_on_hub, opening)
    else:
        raise InputError(
            "scan",
            model,
            "no such file or folder",
            "give a folder with config.json and *.safetensors, a Hub id, or `demo`",
        )
    _check_local(model, opening)
    return open_folder(folder, name=name, architectures=opening.architectures)


def _open_file(path: Path, opening: Opening) -> Checkpoint:
    _check_local(str(path), opening)
    is_regular = stat.S_ISREG(path.stat().st_mode)
    if is_regular and is_gguf(path):
        return open_gguf(path)
    if not is_regular or path.suffix != ".safetensors":
        raise InputError(
            "scan",
            path,
            "is neither a folder nor a .safetensors or .gguf file",
            "give the checkpoint's folder",
        )
    folder = path.parent
    return open_folder(
        folder,
        name=model_name(folder),
        only=path.name,
        architectures=opening.architectures,
    )


def _check_local(model: str, opening: Opening) -> None:
    if opening.is_streamed:
        raise UsageError(
            "scan", model, "is on this machine", "leave --stream away, or give a Hub id"
        )


def _open_url(url: str, opening: Opening) -> Checkpoint:
    """A folder or a GGUF on a web server: small files are kept, weights stay there."""
    if url.partition("?")[0].endswith(".gguf"):
        return open_remote_gguf(RemoteFile(url))
    folder = store.cache_dir("remote", store.cache_key(url)[:32])
    for name in _URL_FILES:
        data = fetch_small(f"{url}/{name}")
        _keep(folder / name, data)
    return open_folder(
        folder,
        name=_REVISION.sub("", url).rsplit("/", 1)[1],
        architectures=opening.architectures,
        remote=lambda file: RemoteFile(f"{url}/{file}"),
    )


def _keep(path: Path, data: bytes | None) -> None:
    """A small file as its server has it; left alone where it is the same already.

    Others may have the folder open: threads, processes, machines that share the cache.
    """
    if data is None:
        path.unlink(missing_ok=True)
    elif not path.is_file() or path.read_bytes() != data:
        with store.replacing(path, stage="scan") as temporary:
            temporary.write_bytes(data)


def hub_endpoint() -> str:
    """The address of the Hub or its mirror (HF_ENDPOINT)."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def _open_hub(name: HubName, opening: Opening) -> Checkpoint:
    from huggingface_hub import constants

    hub_id, revision = name.hub_id, name.revision
    if name.file is not None and name.file.endswith(".gguf"):
        return open_remote_gguf(opener(hub_id, revision)(name.file))
    if opening.say is not None:
        opening.say(f"fetching {hub_id} from the Hub")
    # The small files first: what cannot be converted is refused before its weights.
    folder = snapshot(hub_id, revision, HUB_FILES)
    if not (folder / "model.safetensors.index.json").is_file():
        check_has_weights(hub_id, folder)
    config = read_config(folder, opening.architectures)
    is_packed = packing_of(quantisation_of(folder, config)) is not None
    commit = folder.name
    is_streamed = opening.is_streamed or not (opening.reads_weights or is_packed)
    is_streamed &= not constants.HF_HUB_OFFLINE
    if not is_streamed:
        for weights in ("model*.safetensors", "*.safetensors"):
            folder = snapshot(hub_id, commit, (*HUB_FILES, weights))
            if any(folder.glob(weights)):
                break
    return open_folder(
        folder,
        name=hub_id.rpartition("/")[2],
        hub_id=hub_id,
        only=_only(name, folder),
        revision=commit,
        architectures=opening.architectures,
        remote=opener(hub_id, commit) if is_streamed else None,
    )


def _only(name: HubName, folder: Path) -> str | None:
    """The one weight file that was named, where it is not one of the model's set."""
    file = name.file or ""
    is_of_set = file == "model.safetensors" or "-of-" in file
    return None if is_of_set or not file.endswith(".safetensors") else file
