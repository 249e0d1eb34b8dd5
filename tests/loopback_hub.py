"""A Hugging Face hub with one dataset or one model, on the loopback device: code that uses the network runs
without a network.

It answers what `datasets.load_dataset(..., streaming=True)` and `huggingface_hub.snapshot_download` ask for:
the repository's description, its tree, the paths in it, and byte ranges of its files.

    files = {"README.md": b"...", "20231101.en/train-00000.parquet": b"..."}
    with LoopbackHub("wikimedia/wikipedia", files) as hub:
        subprocess.run(..., env=os.environ | hub.environment(cache_folder))
"""

import hashlib
import io
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = hashlib.sha1(b"the only commit").hexdigest()
OFFLINE_SWITCHES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def parquet(texts: list[str], field: str = "text") -> bytes:
    """The bytes of a parquet file of articles with the columns of Wikipedia: id, url, title, text."""
    import pyarrow
    import pyarrow.parquet

    rows = {
        "id": [str(i) for i in range(len(texts))],
        "url": ["-"] * len(texts),
        "title": [text[:9] for text in texts],
        field: texts,
    }
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(rows), file, row_group_size=20)
    return file.getvalue()


def dataset_card(splits: dict[str, dict[str, str]]) -> bytes:
    """A README.md whose header names the files of each configuration and split: {config: {split: path}}."""
    lines = ["---", "configs:"]
    for config, paths in splits.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, path in paths.items():
            lines += [f"  - split: {split}", f"    path: {path}"]
    return "\n".join([*lines, "---", "# A data set for tests", ""]).encode()


class LoopbackHub:
    """Serves `files`, {path in the repository: content}, as the dataset `name`, or as a model with
    kind="models". `requests` lists what was asked for."""

    def __init__(self, name: str, files: dict[str, bytes], kind: str = "datasets"):
        self.name = name
        self.files = files
        self.kind = kind
        self.requests: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, cache: Path) -> dict[str, str]:
        """The variables that make a child process use this hub instead of the real one, with its own
        cache."""
        return dict.fromkeys(OFFLINE_SWITCHES, "0") | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_XET": "1",
        }

    def tree(self, folder: str, recursive: bool) -> list[dict] | None:
        """The entries in `folder` ("" is the root); None if there is no such folder."""
        prefix = f"{folder}/" if folder else ""
        inside = [path for path in self.files if path.startswith(prefix)]
        if not inside:
            return None

        def is_listed(path: str) -> bool:
            return path.startswith(prefix) and (recursive or "/" not in path.removeprefix(prefix))

        folders: set[str] = set()
        for path in inside:
            folders.update(str(parent) for parent in PurePosixPath(path).parents)
        folders.discard(".")
        entries = [self.folder_entry(path) for path in sorted(folders) if is_listed(path)]
        return entries + [self.entry(path) for path in inside if is_listed(path)]

    def folder_entry(self, path: str) -> dict:
        return {"type": "directory", "path": path, "oid": COMMIT, "size": 0}

    def entry(self, path: str) -> dict:
        content = self.files[path]
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        hub = self.hub
        url = urlsplit(self.path)
        path = unquote(url.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append(f"{self.command} {path}")
        if path == "/":
            return self.send(200, b"a hub")
        prefix = "" if hub.kind == "models" else "/datasets"
        file = re.fullmatch(rf"{prefix}/{hub.name}/resolve/([^/]+)/(.*)", path)
        api = re.fullmatch(
            rf"/api/{hub.kind}/{hub.name}(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path
        )
        if not api and not file:
            return self.refuse("RepoNotFound", "Repository Not Found")
        revision = file[1] if file else api[2]
        if revision not in (None, "main", COMMIT):
            return self.refuse("RevisionNotFound", f"Invalid rev id: {revision}")
        if file:
            return self.send_file(file[2])
        if api[1] == "tree":
            return self.send_tree(api[3] or "", parse_qs(url.query))
        if api[1] == "paths-info":
            return self.send_paths_info(body)
        return self.send_json(
            {
                "id": hub.name,
                "sha": COMMIT,
                "private": False,
                "gated": False,
                "tags": [],
                "siblings": [{"rfilename": path} for path in hub.files],
                "cardData": None,
            }
        )

    def send_tree(self, folder: str, query: dict[str, list[str]]) -> None:
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = self.hub.tree(folder, recursive)
        if entries is None:
            self.refuse("EntryNotFound", "Entry not found")
        else:
            self.send_json(entries)

    def send_paths_info(self, body: bytes) -> None:
        wanted = (
            json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode()).get("paths", [])
        )
        self.send_json([self.hub.entry(path) for path in wanted if path in self.hub.files])

    def send_file(self, path: str) -> None:
        content = self.hub.files.get(path)
        if content is None:
            return self.refuse("EntryNotFound", "Entry not found")
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self.send(200, content, headers)
        start = int(asked[1])
        end = min(int(asked[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        return self.send(206, content[start : end + 1], headers)

    def refuse(self, code: str, message: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self.send(404, json.dumps({"error": message}).encode(), headers)

    def send_json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
