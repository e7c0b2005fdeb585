"""Forest in, log-probability of each option out.

A dialogue's prompts become one prefix tree; several dialogues make a pack, which the model reads in one
pass. A dialogue is never split, and what it gives does not depend on what else is in its pack. Logits exist
only at the positions where an option is read, and there for a few rows at a time, always in float32.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from eicap import InputError
from eicap.bench import Dialogue
from eicap.forest import Forest, attention, pack, prefix_tree
from eicap.model import ROWS_PER_THREAD, LanguageModel
from eicap.prompt import Prompt
from eicap.results import option_means

HEAD_ROWS = 64  # positions whose logits exist at the same time; the vocabulary product always has so many rows
CPU_LEAST = 256  # tokens a pack has at the least: products of very few rows round differently
CUDA_BUCKET = 2048  # on CUDA packs come in few sizes, so that attention is compiled few times


def whole_rows(device: torch.device) -> int:
    """Packs are filled up to a multiple of so many tokens.

    On the CPU each thread then works on whole rows: where a thread's share ends inside a row, the odd elements
    go through another version of exp, which rounds differently.
    """
    return CUDA_BUCKET if device.type == "cuda" else ROWS_PER_THREAD * torch.get_num_threads()


@dataclass(frozen=True)
class Job:
    """A dialogue ready to be scored: its tree, and the places in it where option tokens are read.

    at[i] is the index of the token after which target[i] is looked up, both (M,) int64. For letter scoring
    there is one target an option; for text scoring one for each of the option's tokens.
    """

    dialogue: Dialogue
    prompts: list[Prompt]
    forest: Forest
    at: torch.Tensor
    target: torch.Tensor
    prompt_tokens: int  # what the tree's tokens would be without sharing


def prepare(dialogue: Dialogue, prompts: list[Prompt], context: int) -> Job:
    """Lay a dialogue's prompts out as a prefix tree. Raises InputError for one longer than `context` tokens."""
    sequences = [prompt.ids + option[:-1] for prompt in prompts for option in prompt.continuations]
    options = [option for prompt in prompts for option in prompt.continuations]
    longest = max(range(len(sequences)), key=lambda i: len(sequences[i]))
    if len(sequences[longest]) > context:
        owner = [prompt.probe.id for prompt in prompts for _ in prompt.continuations][longest]
        raise InputError(
            f"probe {owner}: its prompt has {len(sequences[longest])} tokens, the model's context is {context}\n"
            "Shorten or leave out the dialogue, or use a model with a longer context."
        )
    forest, paths = prefix_tree(sequences)
    at = [index for path, option in zip(paths, options) for index in path[len(path) - len(option) :]]
    target = [token for option in options for token in option]
    return Job(
        dialogue, prompts, forest, torch.tensor(at), torch.tensor(target), sum(map(len, set(map(tuple, sequences))))
    )


def packs(jobs: Iterable[Job], tokens: int) -> Iterator[list[Job]]:
    """Whole dialogues in packs of at most `tokens` tokens; one that is longer makes a pack of its own."""
    waiting: list[Job] = []
    for job in jobs:
        if waiting and sum(len(j.forest) for j in waiting) + len(job.forest) > tokens:
            yield waiting
            waiting = []
        waiting.append(job)
    if waiting:
        yield waiting


@torch.inference_mode()
def read_logprobs(model: LanguageModel, forest: Forest, at: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """log p(target[i] | token at[i] and its ancestors), log-softmax over the whole vocabulary: (M,) float32, CPU.

    forest, at, target: on the model's device. The rows that are read are filled up to whole blocks by
    repeating the last, since a product's row can depend on the number of its rows.
    """
    rows, row_of = at.unique(return_inverse=True)
    fill = -len(rows) % math.lcm(HEAD_ROWS, 1 if rows.is_cuda else whole_rows(rows.device))
    rows = torch.cat([rows, rows[-1:].expand(fill)])
    hidden = model(forest.tokens, forest.positions, attention(forest, model.output_matrix.dtype), rows)
    found = torch.empty(len(target), device=hidden.device)
    for first, block in zip(range(0, len(rows), HEAD_ROWS), hidden.split(HEAD_ROWS)):
        logits = model.logits(block)  # (HEAD_ROWS, vocab_size) float32
        mine = ((row_of >= first) & (row_of < first + HEAD_ROWS)).nonzero().flatten()
        row = row_of[mine] - first
        found[mine] = logits[row, target[mine]] - logits.logsumexp(-1)[row]
    return found.cpu()


def score_pack(model: LanguageModel, jobs: list[Job]) -> list[list[list[list[float]]]]:
    """For each job, prompt and place: the log-probability of each of the option's tokens.

    Where memory runs out the pack is halved, down to one dialogue; InputError if that does not fit either, or
    where a log-probability is not finite.
    """
    device = model.output_matrix.device
    on_cuda = device.type == "cuda"
    try:
        forest, starts = pack([job.forest for job in jobs], CPU_LEAST, whole_rows(device))
        at = torch.cat([job.at + start for job, start in zip(jobs, starts)])
        target = torch.cat([job.target for job in jobs])
        found = read_logprobs(model, forest.to(device), at.to(device), target.to(device))
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        if len(jobs) == 1:
            raise InputError(
                f"dialogue {jobs[0].dialogue.id}: out of memory with its {len(jobs[0].forest)} tokens alone\n"
                "Use --dtype bfloat16, --rotations 1 or a device with more memory."
            ) from None
        found = None
    if found is None:  # outside `except`, which would keep the failed pass's tensors alive
        if on_cuda:
            torch.cuda.empty_cache()
        half = len(jobs) // 2
        return score_pack(model, jobs[:half]) + score_pack(model, jobs[half:])
    values = iter(found.tolist())
    scores = [[[[next(values) for _ in option] for option in p.continuations] for p in job.prompts] for job in jobs]
    for job, finite in zip(jobs, found.isfinite().split([len(job.target) for job in jobs])):
        if not finite.all():
            raise InputError(
                f"dialogue {job.dialogue.id}: the model gives a log-probability that is not a finite number\n"
                "Its weights hold NaN or overflow in this dtype; try --dtype float32, or fetch the checkpoint again."
            )
    return scores


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def rows(job: Job, scores: list[list[list[float]]], score: str, log_prompts: bool) -> list[dict]:
    """The rows of results for a dialogue's probes, in order (fields: README, "What a run leaves")."""
    dialogue, found = job.dialogue, []
    for probe in dialogue.probes:
        mine = [(p, s) for p, s in zip(job.prompts, scores) if p.probe is probe]
        logprobs = [[sum(tokens) / len(tokens) for tokens in places] for _, places in mine]
        orders = [list(prompt.order) for prompt, _ in mine]
        means = option_means(orders, logprobs)
        plain = means if len(orders) == 1 else option_means(orders[:1], logprobs[:1])
        pred_plain, pred = plain.index(max(plain)), means.index(max(means))  # ties: the lowest index
        row = {
            "id": probe.id,
            "dialogue": dialogue.id,
            "lang": dialogue.lang,
            "culture": dialogue.culture,
            "layer": probe.layer,
            "skill": probe.skill,
            "subcategory": probe.subcategory,
            "pair": dialogue.pair,
            "answer": probe.answer,
            "orders": orders,
            "logprobs": logprobs,
            "pred_plain": pred_plain,
            "pred": pred,
            "correct_plain": pred_plain == probe.answer,
            "correct": pred == probe.answer,
        }
        if score == "text":
            ((prompt, places),) = mine
            row["sums"] = [sum(tokens) for tokens in places]
            row["tokens"] = [len(tokens) for tokens in places]
            row["bytes"] = [len(option.encode()) for option in probe.options]
        if log_prompts:
            row["prompts"] = [prompt.text for prompt, _ in mine]
        found.append(row)
    return found
