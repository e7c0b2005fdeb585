"""The forest's layout and its one rule, against definitions written out in plain Python."""

import random

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from eicap.forest import (
    BlockAttention,
    Forest,
    _mask_mod,
    _softcap_mod,
    block_map,
    chain,
    flex_block_mask,
    pack,
    prefix_tree,
    query_blocks,
    sees,
)


def random_prompts(seed: int, vocabulary: int = 3, count: int = 12, longest: int = 60) -> list[list[int]]:
    rng = random.Random(seed)
    stem = rng.choices(range(vocabulary), k=longest)
    return [
        stem[: rng.randrange(longest)] + rng.choices(range(vocabulary), k=rng.randrange(1, longest))
        for _ in range(count)
    ]


def random_forest(seed: int, tokens: int = 0) -> Forest:
    trees = [prefix_tree(random_prompts(seed + i, count=8, longest=70))[0] for i in range(0, 300, 100)]
    return pack(trees, least=tokens, multiple=128)[0]


def ancestors(forest: Forest) -> list[set[int]]:
    """Each token and its ancestors, found by walking preorder with a stack of depths."""
    found, stack = [], []
    for index, depth in enumerate(forest.positions.tolist()):
        stack = [*stack[:depth], index]
        found.append(set(stack))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_every_path_of_the_tree_reads_as_its_prompt_and_sees_just_itself(seed):
    prompts = random_prompts(seed)
    forest, paths = prefix_tree(prompts)
    everything = torch.arange(len(forest))
    visible = sees(forest, everything, everything)
    for prompt, path in zip(prompts, paths):
        assert forest.tokens[path].tolist() == prompt
        assert forest.positions[path].tolist() == list(range(len(prompt)))
        assert visible[path[-1]].nonzero().flatten().tolist() == path


@pytest.mark.parametrize("seed", range(5))
def test_shared_beginnings_are_laid_out_once_whatever_the_order(seed):
    prompts = random_prompts(seed)
    forest, _ = prefix_tree(prompts)
    assert len(forest) == len({tuple(p[: i + 1]) for p in prompts for i in range(len(p))})
    again, _ = prefix_tree(prompts[::-1])
    assert torch.equal(forest.tokens, again.tokens) and torch.equal(forest.ends, again.ends)


@pytest.mark.parametrize("window", [None, 7])
def test_the_interval_rule_means_the_token_itself_or_an_ancestor(window):
    forest = random_forest(7)
    everything = torch.arange(len(forest))
    visible = sees(forest, everything, everything, window)
    for q, mine in enumerate(ancestors(forest)):
        expected = {k for k in mine if window is None or forest.positions[q] - forest.positions[k] < window}
        assert set(visible[q].nonzero().flatten().tolist()) == expected


def test_packing_keeps_trees_apart_and_fills_up_with_a_chain_of_its_own():
    forest, starts = pack([chain([1, 2, 3]), chain([4, 5])], least=9, multiple=4)
    assert starts[:2] == [0, 3]
    assert forest.tokens.tolist() == [1, 2, 3, 4, 5] + [0] * 7
    assert forest.positions.tolist() == [0, 1, 2, 0, 1, *range(7)]
    assert forest.ends.tolist() == [3, 3, 3, 5, 5] + [12] * 7


def test_a_tree_is_cut_into_blocks_of_queries_and_none_but_the_only_one_is_short():
    cut = {1: [1], 30: [30], 193: [193], 207: [207], 208: [192, 16], 399: [192, 207]}
    assert {length: query_blocks(length) for length in cut} == cut


def test_a_tree_gives_the_same_bits_whatever_stands_before_it():
    tree = prefix_tree(random_prompts(5, count=8, longest=70))[0]
    both, (_, start) = pack([prefix_tree(random_prompts(6, count=9, longest=70))[0], tree])
    torch.manual_seed(0)
    q, k, v = torch.randn(len(both), 4, 16), torch.randn(len(both), 2, 16), torch.randn(len(both), 2, 16)
    together = BlockAttention(both, torch.float32)(q, k, v, None, None, 0.3)[start:]
    alone = BlockAttention(tree, torch.float32)(q[start:], k[start:], v[start:], None, None, 0.3)
    assert torch.equal(together, alone)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_chains_attend_causally_forward_and_backward(window, softcap):
    forest = pack([chain([0] * length) for length in (1, 33, 250, 40)])[0]
    torch.manual_seed(0)
    q, k, v = (torch.randn(len(forest), heads, 16, requires_grad=True) for heads in (4, 2, 2))
    found = BlockAttention(forest, torch.float32)(q, k, v, window, softcap, 0.3)
    everything = torch.arange(len(forest))
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) * 0.3
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~sees(forest, everything, everything, window), -torch.inf)
    expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.repeat_interleave(2, 1))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    direction = torch.randn_like(found)
    for mine, right in zip(
        torch.autograd.grad(found, (q, k, v), direction), torch.autograd.grad(expected, (q, k, v), direction)
    ):
        torch.testing.assert_close(mine, right, atol=1e-4, rtol=0)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_block_attention_equals_dense_attention_under_the_rule(window, softcap):
    forest = random_forest(11)
    torch.manual_seed(0)
    q, k, v = torch.randn(len(forest), 4, 16), torch.randn(len(forest), 2, 16), torch.randn(len(forest), 2, 16)
    found = BlockAttention(forest, torch.float32)(q, k, v, window, softcap, 0.3)
    everything = torch.arange(len(forest))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double().repeat_interleave(2, 1)) * 0.3
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~sees(forest, everything, everything, window), -torch.inf)
    expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.double().repeat_interleave(2, 1))
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("window", [None, 9, 64, 200])
@pytest.mark.parametrize("seed", range(4))
def test_the_block_map_for_cuda_covers_the_dense_mask(seed, window):
    """Every visible pair is in a block that is looked at, and every block called full is."""
    forest = random_forest(seed, tokens=1024)
    everything = torch.arange(len(forest))
    blocks = len(forest) // 128
    dense = sees(forest, everything, everything, window).view(blocks, 128, blocks, 128).transpose(1, 2).flatten(2)
    some, full = block_map(forest, window)
    assert not (some & full).any()
    assert torch.equal((some | full) & dense.any(-1), dense.any(-1))
    assert dense.all(-1)[full].all()
    if window is None:  # then the map is exact
        assert torch.equal(some | full, dense.any(-1)) and torch.equal(full, dense.all(-1))


@pytest.mark.parametrize("window", [None, 40])
def test_the_mask_rule_for_cuda_equals_the_dense_one(window):
    forest = random_forest(3)
    everything = torch.arange(len(forest))
    found = _mask_mod(forest, window)(0, 0, everything[:, None], everything[None, :])
    assert torch.equal(found, sees(forest, everything, everything, window))


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_flex_attention_under_our_block_mask_equals_block_attention(window, softcap):
    """The same call that CUDA compiles, here run uncompiled on the CPU."""
    forest = random_forest(5)
    torch.manual_seed(1)
    q, k, v = torch.randn(len(forest), 4, 16), torch.randn(len(forest), 2, 16), torch.randn(len(forest), 2, 16)
    expected = BlockAttention(forest, torch.float32)(q, k, v, window, softcap, 0.3)
    found = flex_attention(
        *(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)),
        score_mod=None if softcap is None else _softcap_mod(softcap),
        block_mask=flex_block_mask(forest, window),
        scale=0.3,
        enable_gqa=True,
    )
    torch.testing.assert_close(found.squeeze(0).transpose(0, 1), expected, atol=1e-5, rtol=0)
