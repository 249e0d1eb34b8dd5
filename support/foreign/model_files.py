"""Models of other programs: what a file or folder is, by its first bytes or its file names, and the command
that reads it.

To add a format: its first bytes in FIRST_BYTES, or its ending in ENDINGS for one that begins with nothing of
its own; a folder with a known file in `folder_kind`. No library opens anything here, and nothing is
unpickled: archives are only listed, and the texts in a pickle are only read.
"""

import contextlib
import json
import pickletools
import re
import shlex
import zipfile
from pathlib import Path

from support.messages import printable

# What a file or folder is, and the next step.
Kind = tuple[str, str]

FAMILIES = ("llama", "mistral", "qwen3", "gpt2")  # values of model_type that convert.py reads
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before version 1.6
MAX_PICKLE_BYTES = 2**22  # as much of a pickle is searched for texts

AS_FOLDER = (
    "convert.py reads a model as a folder: config.json, model.safetensors and tokenizer.json "
    "(docs/CONVERTING.md)"
)
UNPACK = "unpack it, and name the folder that comes out"
NOT_THE_PAGE = "download the file itself, not its page"
FIRST_BYTES: dict[bytes, Kind] = {
    b"GGUF": ("a GGUF file of llama.cpp", f"convert.py writes GGUF and does not read it; {AS_FOLDER}"),
    b"lmgg": ("an old file of llama.cpp", AS_FOLDER),
    b"tjgg": ("an old file of llama.cpp", AS_FOLDER),
    b"\x89HDF\r\n\x1a\n": ("an HDF5 file (Keras, TensorFlow)", AS_FOLDER),
    b"version https://git-lfs": (
        "a pointer of Git LFS and not the file itself",
        "fetch the file: git lfs pull",
    ),
    b"\x93NUMPY": ("a NumPy array", AS_FOLDER),
    b"PAR1": ("a parquet file, which holds data and no model", "name it with data.path"),
    b"\x1f\x8b": ("a gzip archive", UNPACK),
    b"BZh": ("a bzip2 archive", UNPACK),
    b"\xfd7zXZ\x00": ("an xz archive", UNPACK),
    b"\x28\xb5\x2f\xfd": ("a zstandard archive", UNPACK),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", UNPACK),
    b"Rar!": ("a rar archive", UNPACK),
    b"<!DOCTYPE": ("an HTML page, not a model", NOT_THE_PAGE),
    b"<!doctype": ("an HTML page, not a model", NOT_THE_PAGE),
    b"<html": ("an HTML page, not a model", NOT_THE_PAGE),
}
ENDINGS: dict[str, Kind] = {
    ".onnx": ("an ONNX file", AS_FOLDER),
    ".pb": ("a TensorFlow file", AS_FOLDER),
    ".tflite": ("a TensorFlow Lite file", AS_FOLDER),
    ".msgpack": ("a Flax file", AS_FOLDER),
    ".keras": ("a Keras file", AS_FOLDER),
    ".h5": ("an HDF5 file (Keras, TensorFlow)", AS_FOLDER),
    ".model": ("a SentencePiece tokenizer, not a model", AS_FOLDER),
    ".distcp": ("a part of a checkpoint of torch.distributed", AS_FOLDER),
}
TORCHSCRIPT = ("a TorchScript program", f"it holds code, which is never run here; {AS_FOLDER}")
TORCH = "a PyTorch file"  # support.checkpoint opens such a file, so its own reason may say more
PICKLE = (
    "a Python pickle, which could run any code when it is opened",
    f"it is not opened here; {AS_FOLDER}",
)


def what_is(path: Path) -> str | None:
    """What a file or folder is that is not a checkpoint of ours, and the next step, as one phrase; None if it
    may be ours, or cannot be recognized.

    >>> what_is(Path("model.gguf"))                                             # doctest: +SKIP
    'a GGUF file of llama.cpp; convert.py writes GGUF and does not read it; ...'
    """
    found = folder_kind(path) if path.is_dir() else file_kind(path)
    return printable("; ".join(found)) if found else None


def own_checkpoint(path: Path) -> Path | None:
    """A checkpoint of ours: this file, or one in this folder; None if there is none."""
    if not path.is_dir():
        is_ours = zipfile.is_zipfile(path) and "tiny_transformer" in texts_in_pickle(path)
        return path if is_ours else None
    files = [path / f"{name}.ckpt" for name in ("final", "last", "best")]
    files += sorted(path.glob("[!.]*.ckpt"), reverse=True)
    return next((file for file in files if file.is_file() and own_checkpoint(file)), None)


def unfit(model_type: object) -> str:
    """Why a model of this type cannot be read."""
    why = ""
    if model_type == "qwen2":
        why = "; its q, k and v have biases, its other matrices have none: our model has no switch for that"
    return f"model_type {repr(model_type)[:50]} cannot be read{why}; these can: {', '.join(FAMILIES)}"


# ---- folders -------------------------------------------------------------------------------------


def folder_kind(folder: Path) -> Kind | None:
    """What a folder is; None if it cannot be recognized."""
    names = {path.name for path in folder.iterdir()}
    ends = {Path(name).suffix for name in names}
    if own := own_checkpoint(folder):
        return "a folder", f"name a file in it, e.g. {own}"
    if "adapter_config.json" in names:
        return adapter_kind(folder)
    if "config.json" in names:
        return model_folder_kind(folder, names)
    if snapshot := next(iter(sorted(folder.glob("snapshots/*/config.json"))), None):
        return "a folder of the Hugging Face cache", command_to_convert(snapshot.parent)
    if inner := sorted(folder.glob("checkpoint-*/config.json"), key=lambda path: path.stat().st_mtime):
        return (
            "a run of transformers' Trainer",
            f"its newest checkpoint is a model folder: {command_to_convert(inner[-1].parent)}",
        )
    if "params.json" in names and any(name.startswith("consolidated.") for name in names):
        return "a model in Meta's own layout", f"take the same model in Hugging Face's layout; {AS_FOLDER}"
    if ".metadata" in names or ".distcp" in ends:
        return "a sharded checkpoint of torch.distributed", AS_FOLDER
    if "saved_model.pb" in names:
        return "a SavedModel of TensorFlow", AS_FOLDER
    if "train.bin" in names:
        return (
            "a folder of token files, which are data and no model",
            "train on them with data.source=tokens and data.path",
        )
    if ends & {".safetensors", ".bin", ".pt", ".pth"}:
        return "a folder of weights without their config.json", AS_FOLDER
    if other_formats := sorted(ends & {".gguf", ".onnx", ".h5", ".msgpack"}):
        name = min(name for name in names if name.endswith(other_formats[0]))
        what, then = file_kind(folder / name) or ("a file of another program", AS_FOLDER)
        return f"a folder with {name}, {what}", then
    if next(folder.glob("[!.]*/[!.]*.ckpt"), None):
        return (
            "a folder of runs",
            f"name a checkpoint in it; python3 list.py {shlex.quote(str(folder))} shows them",
        )
    return None


def model_folder_kind(folder: Path, names: set[str]) -> Kind:
    """What a folder with a config.json is."""
    if not names & set(WEIGHT_FILES):
        endings = (".h5", ".msgpack", ".onnx", ".gguf", ".bin", ".safetensors")
        others = sorted(name for name in names if name.endswith(endings))
        instead = f" (only {', '.join(others[:3])})" if others else ""
        return (
            f"a model folder without weights{instead}",
            f"it should hold {WEIGHT_FILES[0]}, its parts with an index, or {WEIGHT_FILES[2]}",
        )
    model_type = entry_of(folder / "config.json", "model_type")
    next_step = command_to_convert(folder) if model_type in FAMILIES else unfit(model_type)
    return f"a Hugging Face model folder ({str(model_type)[:50]})", next_step


def adapter_kind(folder: Path) -> Kind:
    """What a folder of adapters is."""
    base = entry_of(folder / "adapter_config.json", "base_model_name_or_path")
    return f"a folder of adapters (PEFT) for {str(base or 'another model')[:100]}", (
        "merge them into that model first (merge_and_unload, then save_pretrained, in PEFT), and give the "
        "merged folder to convert.py --from"
    )


def entry_of(path: Path, key: str) -> object:
    """One entry of a JSON file; None where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, RecursionError, AttributeError):
        return None


def read_from_hub(name: str) -> str:
    """The command that fetches a model, to add to the answer for a missing file; nothing for a name that
    cannot be one of the hub."""
    if name.endswith(".ckpt") or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        return ""
    output = f"checkpoints/{name.rpartition('/')[2]}.ckpt"
    return f"; if it is a model of the Hugging Face hub: python3 convert.py --from {name} --output {output}"


def command_to_convert(folder: Path) -> str:
    """The command that turns a model folder into a checkpoint."""
    output = f"checkpoints/{folder.resolve().name}.ckpt"
    return (
        f"make a checkpoint of it: python3 convert.py --from {shlex.quote(str(folder))} --output "
        f"{shlex.quote(output)}"
    )


# ---- files ---------------------------------------------------------------------------------------


def file_kind(path: Path) -> Kind | None:
    """What a file is; None if it cannot be recognized, or may be ours."""
    with open(path, "rb") as file:
        head = file.read(512)
    for begin, found in FIRST_BYTES.items():
        if head.startswith(begin):
            return found
    if head.startswith(b"PK\x03\x04"):
        return archive_kind(path)
    if head[257:262] == b"ustar":
        return "a tar archive", UNPACK
    if head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") <= path.stat().st_size:
        return weights_kind(path, "a safetensors file")
    if head.startswith(LEGACY_MAGIC):
        return weights_kind(path, f"{TORCH} from before version 1.6")
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return PICKLE
    if path.suffix.lower() in ENDINGS:
        return ENDINGS[path.suffix.lower()]
    if path.suffix.lower() in (".json", ".yaml", ".yml", ".txt", ".md"):
        return text_kind(path)
    return None


def text_kind(path: Path) -> Kind:
    """What a text file is: a part of a model folder, or any other text."""
    of_a_model = (*WEIGHT_FILES, "config.json", "tokenizer.json", "adapter_config.json")
    if path.name in of_a_model and (folder := folder_kind(path.parent)):
        what, next_step = folder
        return f"a file in {what}", next_step
    return "a text file", "python3 list.py shows the checkpoints there are"


def weights_kind(path: Path, what: str) -> Kind:
    """What a file of weights is, which another file describes: its folder tells how to read it."""
    names = {file.name for file in path.parent.iterdir()}
    if names & {"adapter_config.json", "config.json"} and (folder := folder_kind(path.parent)):
        what_folder, next_step = folder
        return f"{what} in {what_folder}", next_step
    target = WEIGHT_FILES[0] if path.suffix == ".safetensors" else WEIGHT_FILES[2]
    return what, (
        f"by itself it does not say what model it is: put it as {target} next to the model's config.json and "
        "tokenizer.json, and give that folder to convert.py --from"
    )


def archive_kind(path: Path) -> Kind | None:
    """What a zip archive is; torch.save has written one since version 1.6."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return None
    if any(name.endswith("constants.pkl") for name in names):
        return TORCHSCRIPT
    if not any(name.endswith("data.pkl") for name in names):
        if names and all(name.endswith(".npy") for name in names):
            return "an archive of NumPy arrays", AS_FOLDER
        return ENDINGS[".keras"] if path.suffix == ".keras" else ("a zip archive", UNPACK)
    texts = texts_in_pickle(path)
    if "tiny_transformer" in texts:
        return None
    if {"model_args", "iter_num"} <= texts:
        return "a checkpoint of nanoGPT", (
            "nothing here reads it; to train the same kind of model here: python3 train.py --config "
            "configs/shakespeare_char.yaml"
        )
    if "pytorch-lightning_version" in texts:
        return "a Lightning checkpoint of another program", f"let that program save its model; {AS_FOLDER}"
    if {"optimizer_state_dict", "model_state_dict"} & texts or {"state_dict", "optimizer"} <= texts:
        return "a training checkpoint of another program", f"let that program save its model; {AS_FOLDER}"
    return weights_kind(path, f"{TORCH} of another program")


def texts_in_pickle(path: Path) -> set[str]:
    """The texts in the pickle of a file that torch.save wrote. Nothing is unpickled, and only the beginning
    of a long pickle is read."""
    # Whatever was found stays if the pickle is damaged, or longer than what was read.
    damaged = (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, UnicodeDecodeError)
    texts: set[str] = set()
    with contextlib.suppress(*damaged, KeyError, IndexError), zipfile.ZipFile(path) as archive:
        [entry] = [entry for entry in archive.infolist() if entry.filename.lower().endswith("data.pkl")]
        if entry.compress_type == zipfile.ZIP_STORED:
            with archive.open(entry) as file:
                for _, value, _ in pickletools.genops(file.read(MAX_PICKLE_BYTES)):
                    if isinstance(value, str):
                        texts.add(value)
    return texts
