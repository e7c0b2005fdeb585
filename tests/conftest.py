"""Checkpoints that the tests run on: the small real model, and small random ones made by transformers."""

import json
import signal
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from eicap import checkpoint

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "data" / "bench"

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
SPECIAL = {
    "qwen2": ("<|endoftext|>", ["<|im_start|>", "<|im_end|>"], CHATML),
    "llama": ("<|begin_of_text|>", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], LLAMA3),
    "gemma2": ("<bos>", ["<start_of_turn>", "<end_of_turn>"], GEMMA),
}
SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "eos_token_id": 0,
    "bos_token_id": 0,
    "pad_token_id": 0,
}


def random_model(family: str, **changes):
    """A transformers model of a family with random weights large enough that errors show, in float32."""
    torch.manual_seed(0)
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"tie_word_embeddings": False} | changes))
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**SHAPE | changes))
    else:
        gemma = {"head_dim": 32, "sliding_window": 40, "query_pre_attn_scalar": 24, "attn_implementation": "eager"}
        model = Gemma2ForCausalLM(Gemma2Config(**SHAPE | gemma | changes))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) * (0.3 if "norm" in name else 0.08))
    return model.eval()


def write_tokenizer(folder: Path, family: str) -> None:
    """A byte-level BPE trained on the bench, with the family's special tokens and chat template."""
    bos, others, template = SPECIAL[family]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4000, special_tokens=[bos, *others], initial_alphabet=alphabet)
    letters = [f"Answer: {letter}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"] * 5000
    text = (BENCH / "en.jsonl").read_text(encoding="utf-8").splitlines()
    tokenizer.train_from_iterator([*text, *letters], trainer)
    if family != "qwen2":  # these put a BOS in front by default
        post = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
        tokenizer.post_processor = post
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": others[-1]}
    config |= {"chat_template": template, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The small real model, fetched on first use."""
    return checkpoint.find(checkpoint.DEMO)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """A small random checkpoint of each family, with tokenizer and chat template, by family."""
    folders = {}
    for family in SPECIAL:
        folder = tmp_path_factory.mktemp("checkpoints") / f"tiny-{family}-instruct"
        random_model(family).save_pretrained(folder)
        write_tokenizer(folder, family)
        folders[family] = folder
    return folders


@pytest.fixture(autouse=True, scope="session")
def interruptible():
    """A shell's background jobs ignore Ctrl-C, and so would the commands that tests start from one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True, scope="session")
def in_the_project():
    """Names of checkpoints are looked up from the project's folder, wherever pytest was started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield
