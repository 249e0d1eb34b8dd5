"""Opening Hugging Face datasets: from local files, or from the hub with an answer in seconds when there is no network."""

import glob
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator

from support.cli import UserError

LOCAL_FORMATS = ("json", "parquet", "text")
PROBE_SECONDS = 3


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


def open_dataset(name: str, config: str | None, split: str, path: str | None, revision: str | None, streaming: bool):
    """A `datasets` dataset (iterable when streaming). `name` is a hub name, or json, parquet or text with `path`.

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
                raise UserError(
                    f"data.dataset={name}: the Hugging Face hub cannot be reached; check the network or the proxy, or train on "
                    "local text with --override data.source=text (docs/TROUBLESHOOTING.md, offline)"
                )
            os.environ["HF_HUB_OFFLINE"] = "1"  # a dataset downloaded earlier still opens from the cache
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import datasets

    try:
        return datasets.load_dataset(name, **options)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = error.__cause__ or error  # of a damaged file, the library wraps the reason
        offline = "; without the hub, name local files by data.path (docs/TROUBLESHOOTING.md, offline)" if "Couldn't reach" in str(reason) else ""
        raise UserError(
            f"data.dataset={name} (config {config}, split {split}) cannot be opened: {' '.join(str(reason).split())[:300]}{offline}"
        ) from None


def read_rows(dataset: Iterable[dict]) -> Iterator[dict]:
    """The rows of a dataset; UserError where a file is damaged or the network goes away in the middle."""
    try:
        yield from dataset
    except (OSError, ValueError) as error:
        raise UserError(f"reading the dataset failed: {' '.join(str(error).split())[:300]}") from None
