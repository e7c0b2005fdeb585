"""The decoder against transformers, on random weights in float32: chains, trees and forests."""

import random

import pytest
import torch
from conftest import random_model

from eicap.forest import attention, chain, pack, prefix_tree
from eicap.model import Config, LanguageModel, UnsupportedModel

LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
MODELS = {
    "llama": ("llama", {}),
    "llama tied, 3.1's rope": ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA31}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", {}),
}


@pytest.fixture(params=MODELS)
def pair(request):
    """A transformers model, and ours with its weights."""
    family, changes = MODELS[request.param]
    theirs = random_model(family, **changes)
    ours = LanguageModel(Config.from_json(theirs.config.to_dict()))
    weights = theirs.state_dict()
    if ours.config.tied:
        weights.pop("lm_head.weight")
    ours.load_state_dict(weights)
    return theirs, ours


@torch.inference_mode()
def logits(model, forest):
    return model.logits(model(forest.tokens, forest.positions, attention(forest, torch.float32)))


def random_ids(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(4096), k=length)


@torch.inference_mode()
def test_logits_of_a_chain_equal_transformers(pair):
    theirs, ours = pair
    ids = random_ids(421, seed=1)  # ten times Gemma 2's window here, and not a multiple of any block
    expected = theirs(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits(ours, chain(ids)), expected, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_logits_of_trees_equal_transformers_one_prompt_at_a_time(pair):
    theirs, ours = pair
    rng, shared = random.Random(2), random_ids(300, seed=3)
    prompts = [shared[: rng.randrange(20, 300)] + random_ids(rng.randrange(1, 120), seed=i) for i in range(14)]
    prompts += [prompts[0], prompts[1][:-5]]  # twice the same, and one that is the beginning of another
    tree, paths = prefix_tree(prompts)
    other = chain(random_ids(77, seed=4))
    forest, (start, _, _) = pack([tree, other, chain(random_ids(3, seed=5))])
    found = logits(ours, forest)
    for prompt, path in zip(prompts, paths):
        expected = theirs(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(found[torch.tensor(path) + start], expected, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_reading_some_positions_gives_their_rows(pair):
    _, ours = pair
    forest, read = chain(random_ids(200, seed=6)), torch.tensor([0, 5, 5, 199, *range(60, 80)])
    attend = attention(forest, torch.float32)
    everywhere = ours(forest.tokens, forest.positions, attend)
    some = ours(forest.tokens, forest.positions, attend, read)
    torch.testing.assert_close(some, everywhere[read], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_bfloat16_logits_are_float32_products_of_the_hidden_states():
    ours = LanguageModel(Config.from_json(random_model("qwen2").config.to_dict())).bfloat16()
    for weight in ours.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    hidden = torch.randn(64, 64).bfloat16()
    found = ours.logits(hidden)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, hidden.float() @ ours.output_matrix.float().T, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "relu"}, "relu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(changes, word):
    config = random_model("llama").config.to_dict() | {"rope_parameters": None, "dtype": None} | changes
    with pytest.raises(UnsupportedModel, match=word):
        Config.from_json(config)
