"""Datasets and models of the Hugging Face hub, or local ones in its formats; with an answer in seconds when there is no network."""

import glob
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path

from support.cli import UserError

LOCAL_FORMATS = ("json", "parquet", "text")
PROBE_SECONDS = 3
MODEL_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "*.safetensors", "*.safetensors.index.json"]
BIN_FILES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]  # of older repositories, which have no safetensors


def hub_reachable() -> bool:
    """Whether the hub answers at all. The libraries retry for 20 to 50 seconds before they say that it does not."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return True  # any answer is an answer
    except (OSError, ValueError, http.client.HTTPException):  # no network, no URL, no web server
        return False
    return True


def open_dataset(name: str, config: str | None, split: str, path: str | None, revision: str | None, streaming: bool, flag: str = "data.dataset="):
    """A `datasets` dataset (iterable when streaming). `name` is a hub name, or json, parquet or text with `path`; `flag` is what
    the user named it by.

    Raises UserError when the files, the network, the dataset, its configuration or the split is missing.
    """
    options: dict = {"split": split, "streaming": streaming}
    if name in LOCAL_FORMATS:
        files = sorted(glob.glob(path, recursive=True)) if path else []
        if not files:
            raise UserError(f"data.path={path}: no such file; dataset={name} reads local files, so give data.path a file or a quoted glob")
        options["data_files"] = {split: [glob.escape(file) for file in files]}  # they are read as patterns again
        if name == "text":
            options["sample_by"] = "document"  # one file, one document; the default is a document a line
    else:
        options |= {"name": config, "revision": revision}
        if path is not None:
            raise UserError(f"data.path={path} goes with data.dataset=json, parquet or text, not with {name}")
        if os.environ.get("HF_HUB_OFFLINE") != "1" and not hub_reachable():
            if streaming:
                local = "train on local text with --override data.source=text" if flag == "data.dataset=" else "give local files by --input"
                raise UserError(
                    f"{flag}{name}: the Hugging Face hub cannot be reached; check the network or the proxy, or {local} "
                    "(docs/TROUBLESHOOTING.md#no-network)"
                )
            os.environ["HF_HUB_OFFLINE"] = "1"  # a dataset downloaded earlier still opens from the cache
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import datasets

    try:
        return datasets.load_dataset(name, **options)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = error.__cause__ or error  # of a damaged file, the library wraps the reason
        offline = "; without the hub, name local files by data.path (docs/TROUBLESHOOTING.md#no-network)" if "Couldn't reach" in str(reason) else ""
        raise UserError(f"{flag}{name} (config {config}, split {split}) cannot be opened: {' '.join(str(reason).split())[:300]}{offline}") from None


def read_rows(dataset: Iterable[dict]) -> Iterator[dict]:
    """The rows of a dataset; UserError where a file is damaged or the network goes away in the middle."""
    try:
        yield from dataset
    except (OSError, ValueError) as error:
        raise UserError(f"reading the dataset failed: {' '.join(str(error).split())[:300]}") from None


def find_model(source: str, revision: str | None = None) -> Path:
    """The folder of a model: a local one as it is, or a hub repository, downloaded to the cache with a progress bar. Raises UserError."""
    if os.path.isdir(source):
        return Path(source)
    if os.path.exists(source) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        what = "is a file; name the folder it is in" if os.path.exists(source) else "does not exist"
        raise UserError(f"--from {source} {what}; give a folder with config.json and model.safetensors, or a name on the hub such as gpt2")
    offline = os.environ.get("HF_HUB_OFFLINE") == "1" or not hub_reachable()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import errors, list_repo_files, snapshot_download

    try:
        patterns = MODEL_FILES
        if not offline and not any(name.endswith(".safetensors") for name in list_repo_files(source, revision=revision)):
            patterns = MODEL_FILES + BIN_FILES
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns, local_files_only=offline))
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise UserError(
            f"--from {source}: there is no such folder, the Hugging Face hub cannot be reached, and the model is not in its cache; check the "
            "network or the proxy, or download its folder elsewhere and name that"
        ) from None
    except errors.GatedRepoError:
        raise UserError(f"--from {source}: its owner asks for a licence to be accepted; do so on its page at the hub, then: hf auth login") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"--from {source}: the hub's repository has no revision {revision!r}; give a commit, a branch or a tag of it") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"--from {source}: no folder here and no model on the hub has this name; if it is private: hf auth login") from None
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise UserError(f"--from {source} cannot be downloaded: {' '.join(str(error).split())[:200]}") from None
