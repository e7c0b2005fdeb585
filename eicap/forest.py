"""A batch is a forest: T tokens in preorder, and one rule for who sees whom.

        tokens      w0 w1 w2 | a0 a1 | b0 b1 b2        w: a shared dialogue; a, b: two probes on it
        positions    0  1  2    3  4    3  4  5        depth in the tree: what rotary embedding sees
        ends         8  8  8    5  5    8  8  8        one past the token's own subtree

    query q sees key k  exactly when  k <= q < ends[k]      ("k is q or an ancestor of q")

One chain is plain causal text, many chains are a packed training batch, a prefix tree is many prompts
that share their beginnings: every shared token is computed once. The tree is made from the ids of the
complete prompts, so sharing cannot change what a model reads.

On the CPU attention runs over blocks of queries, each against only the keys that some query of the block
can see. Blocks are cut from each tree's own start and never across trees, so that what one tree gives is
the same to the last bit whatever else is in the batch. On CUDA the rule is a `mask_mod` of flex_attention
(arXiv 2412.05496) and its block mask is made from `ends` block by block, never as a T x T matrix.
"""

from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate

import torch
import torch.nn.functional as F

QUERY_BLOCK = 192  # queries that attend together; from 192 on the CPU kernel works on taller tiles
FEW_ROWS = 16  # matrix products of fewer rows may round a row differently


@dataclass(frozen=True)
class Forest:
    """T tokens in preorder: `tokens`, `positions` and `ends`, each (T,) int64, on one device."""

    tokens: torch.Tensor
    positions: torch.Tensor
    ends: torch.Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: torch.device) -> "Forest":
        return Forest(self.tokens.to(device), self.positions.to(device), self.ends.to(device))


def chain(ids: list[int]) -> Forest:
    """One sequence: plain causal text."""
    length = len(ids)
    return Forest(torch.tensor(ids), torch.arange(length), torch.full((length,), length))


def prefix_tree(prompts: list[list[int]]) -> tuple[Forest, list[list[int]]]:
    """Many sequences with their shared beginnings laid out once.

    Returns the forest and, for each prompt, the index of each of its tokens. In lexicographic order a
    prompt shares with its predecessor the longest prefix that it shares with any before it, so that new
    tokens are just the rest of it, and preorder comes for free. The layout does not depend on the order
    of `prompts`.
    """
    tokens, positions, ends = [], [], []
    paths: list[list[int]] = [[] for _ in prompts]
    previous, path = [], []  # ids and token indices of the prompt before
    for i in sorted(range(len(prompts)), key=prompts.__getitem__):
        ids = prompts[i]
        shared = 0
        while shared < min(len(ids), len(previous)) and ids[shared] == previous[shared]:
            shared += 1
        for index in path[shared:]:
            ends[index] = len(tokens)
        path = path[:shared] + list(range(len(tokens), len(tokens) + len(ids) - shared))
        tokens += ids[shared:]
        positions += range(shared, len(ids))
        ends += [0] * (len(ids) - shared)
        paths[i], previous = path, ids
    for index in path:
        ends[index] = len(tokens)
    return Forest(torch.tensor(tokens), torch.tensor(positions), torch.tensor(ends)), paths


def pack(forests: list[Forest], least: int = 0, multiple: int = 1) -> tuple[Forest, list[int]]:
    """Several forests side by side, and the index at which each begins.

    The result has at least `least` tokens and a multiple of `multiple`: what is missing is filled with
    one more chain, which nobody reads.
    """
    length = sum(map(len, forests))
    fill = max(least, length)
    fill += -fill % multiple - length
    forests = forests + [chain([0] * fill)] if fill else forests
    starts = [0, *accumulate(map(len, forests))]
    return Forest(
        torch.cat([f.tokens for f in forests]),
        torch.cat([f.positions for f in forests]),
        torch.cat([f.ends + start for f, start in zip(forests, starts)]),
    ), starts[:-1]


def sees(forest: Forest, queries: torch.Tensor, keys: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """The rule, densely: may query q see key k? (Q,) and (K,) token indices to (Q, K) bool."""
    q, k = queries[:, None], keys[None, :]
    visible = (k <= q) & (q < forest.ends[keys])
    if window is not None:
        visible &= forest.positions[queries][:, None] - forest.positions[keys] < window
    return visible


def attention(forest: Forest, dtype: torch.dtype):
    """The attention of a forest, as the model calls it:

        attend(q, k, v, window, softcap, scale)

    q (T, heads, head_dim), k and v (T, kv heads, head_dim), to (T, heads, head_dim).
    """
    return CudaAttention(forest) if forest.tokens.is_cuda else BlockAttention(forest, dtype)


# On the CPU


def query_blocks(length: int) -> list[int]:
    """The sizes of the blocks into which a tree of so many tokens is cut, from its own start."""
    cuts = list(range(0, length, QUERY_BLOCK))
    if len(cuts) > 1 and length - cuts[-1] < FEW_ROWS:
        cuts.pop()  # a short last block joins the one before
    return [stop - start for start, stop in zip(cuts, cuts[1:] + [length])]


class BlockAttention:
    """Attention over blocks of queries, each against the keys that some query of the block can see."""

    def __init__(self, forest: Forest, dtype: torch.dtype):
        self.forest, self.dtype = forest, dtype
        roots = (forest.positions == 0).nonzero().flatten().tolist()
        self.trees = list(zip(roots, roots[1:] + [len(forest)]))
        self.plan = cache(self._plan)  # one a window: layers of one kind share it

    def _plan(self, window: int | None) -> list[list[tuple]]:
        """For each tree its blocks: how many queries, the keys they see, an additive mask (queries, keys).

        Keys count from the tree's start. A chain that no window cuts is one block without a mask: causal.
        """
        plan = []
        for root, end in self.trees:
            if (window is None or end - root <= window) and bool((self.forest.ends[root:end] == end).all()):
                plan.append([(end - root, slice(None), None)])
                continue
            blocks, start = [], root
            for size in query_blocks(end - root):
                stop = start + size
                keys = torch.arange(root, stop)
                keys = keys[self.forest.ends[root:stop] > start]  # seen by the block's first query, or in the block
                visible = sees(self.forest, torch.arange(start, stop), keys, window)
                if window is not None:
                    some = visible.any(0)
                    keys, visible = keys[some], visible[:, some]
                blocks.append((size, keys - root, torch.where(visible, 0.0, -torch.inf).to(self.dtype)))
                start = stop
            plan.append(blocks)
        return plan

    def __call__(self, q, k, v, window, softcap, scale):
        lengths = [end - root for root, end in self.trees]
        attend = F.scaled_dot_product_attention if softcap is None else partial(_softcapped, softcap=softcap)
        seen = []
        for *tree, blocks in zip(q.split(lengths), k.split(lengths), v.split(lengths), self.plan(window)):
            for queries, (_, keys, mask) in zip(tree[0].split([size for size, *_ in blocks]), blocks):
                block = [x.transpose(0, 1).unsqueeze(0) for x in (queries, tree[1][keys], tree[2][keys])]
                out = attend(*block, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True)
                seen.append(out.squeeze(0).transpose(0, 1))  # (1, heads, queries, head_dim) and back
        return torch.cat(seen)


def _softcapped(q, k, v, attn_mask, is_causal, scale, enable_gqa, softcap):
    """scaled_dot_product_attention with Gemma 2's soft-cap on the scores, which that function does not know."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = softcap * torch.tanh(q @ k.mT * scale / softcap)
    if is_causal:
        attn_mask = torch.full_like(scores[0, 0], -torch.inf).triu(1)
    return (scores + attn_mask).softmax(-1, dtype=torch.float32).to(q.dtype) @ v


# On CUDA


def block_map(forest: Forest, window: int | None = None, size: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Which blocks of `size` keys a block of `size` queries must look at, without a T x T matrix.

    T is a multiple of `size`. Returns two (T / size, T / size) bool matrices, rows for queries: `some`, some
    pair may be visible and the rule is applied pair by pair; `full`, every pair is visible.
    """
    ends, positions = forest.ends.view(-1, size), forest.positions.view(-1, size)
    index = torch.arange(len(ends), device=ends.device)
    q, k = index[:, None], index[None, :]
    some = (k == q) | ((k < q) & (ends.amax(1)[k] > q * size))  # a key's subtree reaches the block's first query
    full = (k < q) & (ends.amin(1)[k] >= (q + 1) * size)  # every key's subtree holds the whole block
    if window is not None:
        first, last = positions.amin(1), positions.amax(1)
        some &= first[q] - last[k] < window
        full &= last[q] - first[k] < window
    return some & ~full, full


@cache
def _flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    # Shapes come in few sizes and each is compiled once; past the limit, or unfused, is an error, not a slow run.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@cache
def _softcap_mod(softcap: float):
    return lambda score, batch, head, q, k: softcap * torch.tanh(score / softcap)


def _mask_mod(forest: Forest, window: int | None):
    ends, positions = forest.ends, forest.positions
    if window is None:
        return lambda batch, head, q, k: (k <= q) & (q < ends[k])
    return lambda batch, head, q, k: (k <= q) & (q < ends[k]) & (positions[q] - positions[k] < window)


def flex_block_mask(forest: Forest, window: int | None = None):
    """The rule as flex_attention takes it: the block map, and the rule itself for blocks that are not full."""
    from torch.nn.attention.flex_attention import BlockMask

    def ordered(blocks):  # per row: how many, and their indices first
        count = blocks.sum(-1, dtype=torch.int32)
        first = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
        return count[None, None], first[None, None]

    some, full = block_map(forest, window)
    return BlockMask.from_kv_blocks(*ordered(some), *ordered(full), BLOCK_SIZE=128, mask_mod=_mask_mod(forest, window))


class CudaAttention:
    """Compiled flex_attention under the forest's block mask. T is a multiple of 128."""

    def __init__(self, forest: Forest):
        self.mask = cache(lambda window: flex_block_mask(forest, window))

    def __call__(self, q, k, v, window, softcap, scale):
        heads_first = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
        mod = None if softcap is None else _softcap_mod(softcap)
        seen = _flex_attention()(
            *heads_first, score_mod=mod, block_mask=self.mask(window), scale=scale, enable_gqa=True
        )
        return seen.squeeze(0).transpose(0, 1)
