"""Datasets and models from the Hugging Face hub, or local ones in its formats. If there is no network, the
user hears of it within seconds."""

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

ENDINGS_OF_FORMAT = {"json": (".json", ".jsonl"), "parquet": (".parquet",), "text": (".txt",)}
LOCAL_FORMATS = tuple(ENDINGS_OF_FORMAT)  # values of data.dataset that mean local files
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
# The names of weights in older repositories, which have no safetensors.
BIN_FILES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]

TRAIN_INSTEAD = (
    "train a small model on a text of your own:\n       "
    "python3 train.py --config config_smoke.yaml --override data.path=my_book.txt"
)
HELP_PAGE = "docs/TROUBLESHOOTING.md#no-network"


class HubError(UserError):
    """A dataset or model cannot be fetched from the hub. `why` gives the reason; `instead` is what the user
    of this script can do without the hub."""

    def __init__(self, why: str, instead: str):
        super().__init__(f"{why} ({HELP_PAGE}), or {instead}")
        self.why = why


# ---- is there a hub? -----------------------------------------------------------------------------


def offline_setting() -> str | None:
    """The environment variable that forbids the libraries to use the network, such as `HF_HUB_OFFLINE=1`;
    None if there is none. Of the three names the first that is set counts, as in the libraries."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        value = os.environ.get(name)
        if value:
            return f"{name}={value}" if value.upper() in ("1", "ON", "YES", "TRUE") else None
    return None


def hub_reachable() -> bool:
    """Whether the hub answers at all. We ask before the libraries do, because they try for 20 to 50 seconds
    before they give up."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return True  # an error is an answer too
    except (OSError, ValueError, http.client.HTTPException):  # no network, not a URL, not a web server
        return False
    return True


def why_unreachable(what: str, streaming: bool) -> str | None:
    """Why `what` cannot be fetched from the hub; None if the hub answers. The text assumes that the cache of
    earlier downloads does not hold it either."""
    needed = "and a stream needs it" if streaming else "and it is not in the cache of earlier downloads"
    if setting := offline_setting():
        return f"{what}: {setting} keeps the Hugging Face hub away, {needed}; unset it"
    if hub_reachable():
        return None
    return f"{what}: the Hugging Face hub cannot be reached, {needed}; check the network or the proxy"


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Inside `with offline():`, a library that is imported now uses only its cache. It reads the setting when
    it is imported, so the import must be inside too."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        os.environ.pop("HF_HUB_OFFLINE")
        if before is not None:
            os.environ["HF_HUB_OFFLINE"] = before


# ---- datasets ------------------------------------------------------------------------------------


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
    """Open a dataset with the `datasets` library. With `streaming` its rows are read one after the other;
    otherwise they also have numbers.

    `name` is a name on the hub, or json, parquet or text, for local files at `path`. For error messages,
    `flag` is how the user named the dataset, and `instead` is what works without the hub. Raises UserError if
    the files, the dataset, its configuration or the split is missing; HubError without network.
    """
    options: dict = {"split": split, "streaming": streaming}
    unreachable = None
    if name in LOCAL_FORMATS:
        # The library takes each name for a pattern, so characters such as * and [ in it are escaped.
        options["data_files"] = {split: [glob.escape(file) for file in local_files(name, path)]}
        if name == "text":
            # Each file is one document; without this, each line would be one.
            options["sample_by"] = "document"
    else:
        if path is not None:
            raise UserError(f"data.path={path} goes with data.dataset=json, parquet or text, not with {name}")
        options |= {"name": config, "revision": revision}
        unreachable = why_unreachable(f"{flag}{name}", streaming)
        if unreachable and streaming and not offline_setting():
            raise HubError(unreachable, instead)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    with offline() if unreachable else contextlib.nullcontext():
        import datasets

        try:
            return datasets.load_dataset(name, **options)
        except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
            reason = str(error.__cause__ or error)  # for a damaged file, the library wraps the real reason
    if unreachable and ("Couldn't reach" in reason or "offline" in reason.lower()):
        raise HubError(unreachable, instead)
    raise UserError(
        f"{flag}{name} (config {config}, split {split}) cannot be opened: {' '.join(reason.split())[:300]}"
    )


def local_files(name: str, path: str | None) -> list[str]:
    """The local files that `path` means: one file, all that match a glob, or all in a folder that are of the
    format `name`."""
    if path is None:
        raise UserError(
            f"data.dataset={name} reads local files, so give data.path a file, a folder or a quoted glob"
        )
    if os.path.isdir(path):
        return [str(file) for file in find_files(path, "data.path", ENDINGS_OF_FORMAT[name])]
    files = sorted(file for file in glob.glob(path, recursive=True) if not os.path.isdir(file))
    if not files:
        raise UserError(
            f"data.path={path}: no such file; dataset={name} reads local files, so give data.path a file "
            "or a quoted glob"
        )
    return files


def read_rows(dataset: Iterable[dict]) -> Iterator[dict]:
    """The rows of a dataset. Raises UserError if a file is damaged, or if the network fails while reading."""
    try:
        yield from dataset
    except (OSError, ValueError) as error:
        raise UserError(f"reading the dataset failed: {' '.join(str(error).split())[:300]}") from None


# ---- models --------------------------------------------------------------------------------------


def find_model(source: str, revision: str | None = None) -> Path:
    """The folder of a model. `source` is a local folder, which is returned as it is, or a repository of the
    hub, which is downloaded to the cache with a progress bar. Raises UserError."""
    if os.path.exists(source):
        return check_model_folder(Path(source))
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(
            f"--from {source} does not exist; give a folder with config.json and model.safetensors, or a "
            "name on the hub such as gpt2"
        )
    setting = offline_setting()
    no_network = bool(setting) or not hub_reachable()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import errors, list_repo_files, snapshot_download

    try:
        patterns = MODEL_FILES
        if not no_network:
            names = list_repo_files(source, revision=revision)
            if not any(name.endswith(".safetensors") for name in names):
                patterns = MODEL_FILES + BIN_FILES
        return Path(
            snapshot_download(source, revision=revision, allow_patterns=patterns, local_files_only=no_network)
        )
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise not_in_cache(source, setting) from None
    except errors.GatedRepoError:
        why = "its owner asks you to accept a licence; do that on its page at the hub, then: hf auth login"
    except errors.RevisionNotFoundError:
        why = f"the hub's repository has no revision {revision!r}; give a commit, a branch or a tag of it"
    except errors.RepositoryNotFoundError:
        why = "no folder here and no model on the hub has this name; if it is private: hf auth login"
    except Exception as error:  # of the library, and of all that it uses to reach the network
        raise UserError(
            f"--from {source} cannot be downloaded: {' '.join(str(error).split())[:200]}"
        ) from None
    raise UserError(f"--from {source}: {why}")


def not_in_cache(source: str, setting: str | None) -> HubError:
    """The error for a model that is neither a local folder nor in the cache, when the hub cannot be
    reached."""
    if setting:
        why, remedy = f"{setting} keeps the Hugging Face hub away", "unset it"
    else:
        why, remedy = "the Hugging Face hub cannot be reached", "check the network or the proxy"
    return HubError(
        f"--from {source}: there is no such folder, {why}, and the model is not in its cache; {remedy}",
        f"download its folder elsewhere, and name that folder with --from:\n       hf download {source} "
        f"--local-dir {source.split('/')[-1]}",
    )


def check_model_folder(path: Path) -> Path:
    """Returns the folder if it looks like a Hugging Face model. Otherwise raises UserError, which says what
    is there instead and which command reads it."""
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
    advice = "" if ";" in what else f"; {AS_FOLDER}"  # after a `;`, `what` already says what to do
    raise UserError(f"--from {path} is {what}{advice}")
