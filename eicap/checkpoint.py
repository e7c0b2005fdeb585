"""Find a checkpoint by name or path, and stream its safetensors into the model.

Notable:
- a checkpoint is a folder in Hugging Face layout; a name stands for one in `checkpoints/NAME` or in the
  local Hugging Face cache. Nothing is downloaded behind the user's back but the small demo model;
- the model is built on the meta device, and each tensor is read from the file straight into its own
  storage: no open map, no second copy, no state dict (the safetensors format is a JSON header and bytes);
- every byte read goes through sha256 on its way, so that a run can say which weights it was made with.

Format: https://github.com/huggingface/safetensors#format
"""

import hashlib
import json
import operator
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from eicap import InputError, gguf
from eicap.model import Config, LanguageModel, UnsupportedModel

REPOSITORIES = {
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen2.5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama3-8b-instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
    "gemma2-9b": "google/gemma-2-9b",
    "gemma2-9b-instruct": "google/gemma-2-9b-it",
}
DEMO = "smollm2-135m-instruct"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


# Where it is


def find(name: str) -> Path:
    """The folder of a checkpoint, given its path or its name. Fetches the demo model on first use."""
    path = Path(name)
    if path.is_dir():
        return path
    if name not in REPOSITORIES and name != DEMO:
        known = ", ".join([*REPOSITORIES, DEMO])
        raise InputError(f"{name}: no such checkpoint\nGive a folder in Hugging Face layout, or one of: {known}.")
    local = Path("checkpoints") / name
    if local.is_dir():
        return local
    if name == DEMO:
        try:
            return gguf.fetch(local)
        except OSError as error:
            raise InputError(f"{local}: cannot be written ({error.strerror}); make room and try again") from None
    repository = REPOSITORIES[name]
    cached = _cached(repository)
    if cached is None:
        raise InputError(
            f"{name}: neither in {local} nor in the Hugging Face cache\n"
            f"Get it with:  hf download {repository} --local-dir {local}"
        )
    return cached


def _cached(repository: str) -> Path | None:
    """The repository's main snapshot in the local Hugging Face cache, or None."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    root = hub / f"models--{repository.replace('/', '--')}"
    main = root / "refs" / "main"
    snapshots = [root / "snapshots" / main.read_text().strip()] if main.is_file() else []
    snapshots += sorted(root.glob("snapshots/*"), key=lambda p: p.stat().st_mtime, reverse=True)
    return next((s for s in snapshots if (s / "config.json").is_file()), None)


def read_json(path: Path) -> dict:
    """A JSON object from a file; InputError names the file where there is none or it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a checkpoint folder needs it") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: a JSON object is expected")
    return content


def read_config(folder: Path) -> Config:
    """config.json as the decoder's Config."""
    path = folder / "config.json"
    try:
        return Config.from_json(read_json(path))
    except UnsupportedModel as error:
        raise InputError(f"{path}: {error}") from None
    except KeyError as error:
        raise InputError(f"{path}: {error.args[0]} is missing") from None
    except (TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        raise InputError(f"{path}: cannot be understood ({error})") from None


# What is in it


class Entry(NamedTuple):
    """One tensor in a safetensors file: `size` bytes from `offset`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, by name. InputError where the file is cut, empty or garbled."""
    broken = f"{path}: not a complete safetensors file; fetch it again"
    try:
        total = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if total < 8 or not 2 <= length <= total - 8:
                raise InputError(f"{broken} (its header does not fit in its {total} bytes)")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = {}
        for name, tensor in header.items():
            start, stop = map(operator.index, tensor["data_offsets"])
            shape = tuple(map(operator.index, tensor["shape"]))
            entries[name] = Entry(path, str(tensor["dtype"]), shape, 8 + length + start, stop - start)
            if not 0 <= start <= stop or 8 + length + stop > total:
                raise InputError(f"{broken} (tensor {name} ends past its {total} bytes)")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{broken} (its header is garbled)") from None
    return entries


def read_headers(folder: Path) -> dict[str, Entry]:
    """The tensors of a checkpoint: one file, or shards with or without an index."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise InputError(f"{index}: no weight_map from tensors to files")
        files = [folder / name for name in sorted(set(weight_map.values()))]
        for file in files:
            if not file.is_file():
                raise InputError(f"{index}: names {file.name}, which is not in the folder; fetch it")
    else:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise InputError(f"{folder}: no *.safetensors weights in this folder")
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in entries:
                raise InputError(f"{file}: tensor {name} is also in {entries[name].file.name}")
            entries[name] = entry
    return entries


def read_tensor(file, entry: Entry, name: str, digest=None) -> torch.Tensor:
    """One tensor, read from the open file straight into its own storage, on the CPU in its stored dtype."""
    tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    raw = memoryview(tensor.view(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")
    file.seek(entry.offset)
    done = 0
    while done < entry.size:  # the system gives at most 2 GiB a read, and a float32 Gemma 2 embedding has 3.7 GB
        count = file.readinto(raw[done:])
        if not count:
            raise InputError(f"{entry.file}: tensor {name} is cut short; fetch the file again")
        done += count
    if digest is not None:
        digest.update(raw)
    return tensor


def _check(entries: dict[str, Entry], shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    """InputError that lists every tensor that is missing, unknown, mis-shaped or of a wrong dtype."""
    problems = {
        "missing": [name for name in shapes if name not in entries],
        "not in the model": [name for name in entries if name not in shapes],
        "of another shape": [
            f"{name} {list(entry.shape)} for {list(shapes[name])}"
            for name, entry in entries.items()
            if name in shapes and entry.shape != shapes[name]
        ],
        "of a dtype that is not supported": [
            f"{name} {entry.dtype}" for name, entry in entries.items() if entry.dtype not in DTYPES
        ],
        "of a size that is not that of its shape": [
            name
            for name, entry in entries.items()
            if entry.dtype in DTYPES and entry.size != DTYPES[entry.dtype].itemsize * torch.Size(entry.shape).numel()
        ],
    }
    found = [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in problems.items() if names]
    if found:
        raise InputError(f"{folder}: the weights do not fit config.json\n{'; '.join(found)}")


def load(folder: Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"):
    """A checkpoint as a LanguageModel without gradients, and the sha256 of its weights.

    dtype None: float32 on the CPU, the checkpoint's own elsewhere. The sha256 is over names, dtypes, shapes
    and bytes as stored, in the order of names: how the tensors are spread over files does not change it.
    """
    config, device = read_config(folder), torch.device(device)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else config.dtype
    try:
        with torch.device("meta"):
            model = LanguageModel(config)
    except (TypeError, ValueError, RuntimeError, LookupError) as error:
        raise InputError(f"{folder / 'config.json'}: no model can be built from it ({error})") from None
    entries = read_headers(folder)
    unused = [name for name in entries if name.endswith("rotary_emb.inv_freq")]
    unused += ["lm_head.weight"] if config.tied else []
    entries = {name: entry for name, entry in sorted(entries.items()) if name not in unused}
    _check(entries, {name: tuple(p.shape) for name, p in model.named_parameters()}, folder)

    total = hashlib.sha256()
    size = sum(entry.size for entry in entries.values())
    with tqdm(total=size, unit="B", unit_scale=True, desc=f"loading {folder.name}", leave=False, delay=1) as bar:
        for name, entry in entries.items():
            digest = hashlib.sha256(f"{name} {entry.dtype} {list(entry.shape)}".encode())
            with open(entry.file, "rb", buffering=0) as file:
                tensor = read_tensor(file, entry, name, digest)
            module, _, leaf = name.rpartition(".")
            weight = nn.Parameter(tensor.to(device, dtype), requires_grad=False)
            setattr(model.get_submodule(module), leaf, weight)
            total.update(digest.digest())
            bar.update(entry.size)
    return model.eval(), total.hexdigest()
