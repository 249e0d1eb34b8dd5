"""Datasets and models of the Hugging Face hub, or local ones in its formats; with an answer in seconds
when there is no network."""

import contextlib
import glob
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path

from support.files.find_files import find_files
from support.foreign.model_files import AS_FOLDER, own_checkpoint, what_is
from support.messages import UserError

LOCAL_FORMATS = ("json", "parquet", "text")
PROBE_SECONDS = 3
MODEL_FILES = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "*.safetensors",
    "*.safetensors.index.json",
]
BIN_FILES = [
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
]  # of older repositories, which have no safetensors


TRAIN_INSTEAD = (
    "train a small model on a text of your own:\n       python3 train.py --config config_smoke.yaml "
    "--override data.path=my_book.txt"
)
NO_NETWORK = "docs/TROUBLESHOOTING.md#no-network"


class HubError(UserError):
    """What is asked of the hub cannot be had: `why`, and what the user can do `instead`, which depends on
    the script."""

    def __init__(self, why: str, instead: str):
        super().__init__(f"{why} ({NO_NETWORK}), or {instead}")
        self.why = why


def offline_by_choice() -> str | None:
    """The setting by which a user keeps the libraries from the network, as the libraries read it."""
    names = [
        name
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
        if os.environ.get(name)
    ]
    chosen = bool(names) and os.environ[names[0]].upper() in ("1", "ON", "YES", "TRUE")
    return f"{names[0]}={os.environ[names[0]]}" if chosen else None


def hub_reachable() -> bool:
    """Whether the hub answers at all. The libraries retry for 20 to 50 seconds before they say that it
    does not."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return True  # any answer is an answer
    except (OSError, ValueError, http.client.HTTPException):  # no network, no URL, no web server
        return False
    return True


def local_files(name: str, path: str | None) -> list[str]:
    """The files of a local format: those that a path names, or those of the format in a folder."""
    if path is None:
        raise UserError(
            f"data.dataset={name} reads local files, so give data.path a file, a folder or a quoted glob"
        )
    if os.path.isdir(path):
        kinds = {"json": (".json", ".jsonl"), "parquet": (".parquet",), "text": (".txt",)}[name]
        return [str(file) for file in find_files(path, "data.path", kinds)]
    files = sorted(file for file in glob.glob(path, recursive=True) if not os.path.isdir(file))
    if not files:
        raise UserError(
            f"data.path={path}: no such file; dataset={name} reads local files, so give data.path a file "
            "or a quoted glob"
        )
    return files


def open_dataset(
    name: str,
    config: str | None,
    split: str,
    path: str | None,
    revision: str | None,
    streaming: bool,
    flag: str = "data.dataset=",
    instead: str = TRAIN_INSTEAD,
):
    """A `datasets` dataset (iterable when streaming). `name` is a hub name, or json, parquet or text with
    `path`; `flag` is what the user named it by, `instead` what works without the hub.

    Raises UserError when the files, the dataset, its configuration or the split is missing, HubError without
    network.
    """
    options: dict = {"split": split, "streaming": streaming}
    unreachable = None
    if name in LOCAL_FORMATS:
        options["data_files"] = {
            split: [glob.escape(file) for file in local_files(name, path)]
        }  # they are read as patterns again
        if name == "text":
            options["sample_by"] = "document"  # one file, one document; the default is a document a line
    else:
        options |= {"name": config, "revision": revision}
        if path is not None:
            raise UserError(f"data.path={path} goes with data.dataset=json, parquet or text, not with {name}")
        unreachable = why_unreachable(f"{flag}{name}", streaming)
        if unreachable and streaming and not offline_by_choice():
            raise HubError(unreachable, instead)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    with offline() if unreachable else contextlib.nullcontext():
        import datasets

        try:
            return datasets.load_dataset(name, **options)
        except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
            reason = str(error.__cause__ or error)  # of a damaged file, the library wraps the reason
    if unreachable and ("Couldn't reach" in reason or "offline" in reason.lower()):
        raise HubError(unreachable, instead)
    raise UserError(
        f"{flag}{name} (config {config}, split {split}) cannot be opened: {' '.join(reason.split())[:300]}"
    )


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """While the libraries are imported they are told to look into the cache alone, since there is no network."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        os.environ.pop("HF_HUB_OFFLINE")
        if before is not None:
            os.environ["HF_HUB_OFFLINE"] = before


def why_unreachable(what: str, streaming: bool) -> str | None:
    """What is said if it then turns out not to be in the cache either; None where the hub answers."""
    cached = "and a stream needs it" if streaming else "and it is not in the cache of earlier downloads"
    if setting := offline_by_choice():
        return f"{what}: {setting} keeps the Hugging Face hub away, {cached}; unset it"
    return (
        None
        if hub_reachable()
        else f"{what}: the Hugging Face hub cannot be reached, {cached}; check the network or the proxy"
    )


def read_rows(dataset: Iterable[dict]) -> Iterator[dict]:
    """The rows of a dataset; UserError where a file is damaged or the network goes away in the middle."""
    try:
        yield from dataset
    except (OSError, ValueError) as error:
        raise UserError(f"reading the dataset failed: {' '.join(str(error).split())[:300]}") from None


def check_model_folder(path: Path) -> Path:
    """The folder itself, if it looks like a model of Hugging Face's. Raises UserError that says what is
    there instead, and what reads that."""
    if not (path.is_dir() or path.is_file()):
        raise UserError(f"--from {path} is a pipe, a socket or a device; name a folder")
    if own := own_checkpoint(path):
        raise UserError(
            f"--from {path}: {own} is a checkpoint of ours; --ckpt reads it: python3 convert.py --ckpt "
            f"{own} --to hf --output export"
        )
    if path.is_dir() and (path / "config.json").exists():
        return path
    what = what_is(path) or ("a folder without config.json" if path.is_dir() else "a file")
    raise UserError(f"--from {path} is {what}" + ("" if ";" in what else f"; {AS_FOLDER}"))


def find_model(source: str, revision: str | None = None) -> Path:
    """The folder of a model: a local one as it is, or a hub repository, downloaded to the cache with a
    progress bar. Raises UserError."""
    if os.path.exists(source):
        return check_model_folder(Path(source))
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(
            f"--from {source} does not exist; give a folder with config.json and model.safetensors, or a "
            "name on the hub such as gpt2"
        )
    chosen = offline_by_choice()
    no_network = bool(chosen) or not hub_reachable()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import errors, list_repo_files, snapshot_download

    try:
        patterns = MODEL_FILES
        if not no_network and not any(
            name.endswith(".safetensors") for name in list_repo_files(source, revision=revision)
        ):
            patterns = MODEL_FILES + BIN_FILES
        return Path(
            snapshot_download(source, revision=revision, allow_patterns=patterns, local_files_only=no_network)
        )
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        absent = (
            f"{chosen} keeps the Hugging Face hub away"
            if chosen
            else "the Hugging Face hub cannot be reached"
        )
        remedy = "unset it" if chosen else "check the network or the proxy"
        raise HubError(
            f"--from {source}: there is no such folder, {absent}, and the model is not in its cache; "
            f"{remedy}",
            f"download its folder elsewhere, and name that by --from:\n       hf download {source} "
            f"--local-dir {source.split('/')[-1]}",
        ) from None
    except errors.GatedRepoError:
        raise UserError(
            f"--from {source}: its owner asks for a licence to be accepted; do so on its page at the hub, "
            "then: hf auth login"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"--from {source}: the hub's repository has no revision {revision!r}; give a commit, a branch "
            "or a tag of it"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"--from {source}: no folder here and no model on the hub has this name; if it is private: hf "
            "auth login"
        ) from None
    except Exception as error:  # of the library, and of whatever it uses to reach the network
        raise UserError(
            f"--from {source} cannot be downloaded: {' '.join(str(error).split())[:200]}"
        ) from None
