"""Scores of packed forests against transformers, one prompt at a time."""

from functools import cache

import pytest
import torch
from conftest import BENCH
from transformers import AutoModelForCausalLM, AutoTokenizer

from eicap import InputError, bench, checkpoint, prompt, results, scorer
from eicap.tokenizer import Tokenizer


def english(count: int) -> list[bench.Dialogue]:
    return bench.read(BENCH / "en.jsonl")[:count]


def make_jobs(folder, dialogues, format="chat", score="letter", rotate="all") -> list[scorer.Job]:
    tokenizer, wording = Tokenizer(folder), prompt.read_wording()
    return [scorer.prepare(d, prompt.prompts(d, tokenizer, wording, format, score, rotate), 4096) for d in dialogues]


@torch.inference_mode()
def one_at_a_time(model, prompts) -> list[list[list[float]]]:
    """By transformers: each prompt with what is read of a continuation is a forward pass of its own."""

    @cache
    def logprobs(ids):
        return model(torch.tensor([ids])).logits[0].float().log_softmax(-1)

    scores = []
    for made in prompts:
        start = len(made.ids) - 1
        rows = [logprobs(tuple(made.ids + option[:-1]))[start:] for option in made.continuations]
        scores.append([[row[i, t].item() for i, t in enumerate(o)] for row, o in zip(rows, made.continuations)])
    return scores


def flat(scores):
    return torch.tensor([value for prompt_ in scores for places in prompt_ for value in places])


@pytest.mark.parametrize(
    "format, score", [("chat", "letter"), ("plain", "letter"), ("chat", "text"), ("plain", "text")]
)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_packed_scores_equal_transformers_one_prompt_at_a_time(checkpoints, family, format, score):
    jobs = make_jobs(checkpoints[family], english(2), format, score)
    model, _ = checkpoint.load(checkpoints[family])
    theirs = AutoModelForCausalLM.from_pretrained(checkpoints[family], attn_implementation="eager")
    for job, found in zip(jobs, scorer.score_pack(model, jobs)):
        some = range(0, len(job.prompts), 3 if score == "letter" else 1)  # every probe, in different rotations
        expected = one_at_a_time(theirs, [job.prompts[i] for i in some])
        torch.testing.assert_close(flat([found[i] for i in some]), flat(expected), atol=1e-4, rtol=0)


def test_smollm2_scores_equal_transformers_one_prompt_at_a_time(smollm2):
    (job,) = make_jobs(smollm2, english(1))
    model, _ = checkpoint.load(smollm2)
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    (found,) = scorer.score_pack(model, [job])
    some = range(0, len(job.prompts), 6)
    expected = one_at_a_time(theirs, [job.prompts[i] for i in some])
    torch.testing.assert_close(flat([found[i] for i in some]), flat(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "family, threads, dtype",
    [("llama", n, torch.float32) for n in (1, 2, 3)]
    + [("llama", 2, torch.bfloat16), ("qwen2", 2, torch.float32), ("gemma2", 2, torch.float32)],
)
def test_scores_are_the_same_to_the_last_bit_whatever_shares_the_pack(checkpoints, family, threads, dtype):
    jobs = make_jobs(checkpoints[family], english(3), rotate="1")
    model, _ = checkpoint.load(checkpoints[family], dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone = [scorer.score_pack(model, [job])[0] for job in jobs]
        assert scorer.score_pack(model, jobs) == alone
        assert scorer.score_pack(model, jobs[::-1]) == alone[::-1]
        assert scorer.score_pack(model, jobs[1:]) == alone[1:]
    finally:
        torch.set_num_threads(before)


def test_packs_hold_whole_dialogues_up_to_the_limit(checkpoints):
    jobs = make_jobs(checkpoints["llama"], english(5))
    sizes = [len(job.forest) for job in jobs]
    limit = sizes[0] + sizes[1]
    cut = list(scorer.packs(jobs, limit))
    assert [job for pack in cut for job in pack] == jobs
    assert all(len(pack) == 1 or sum(len(j.forest) for j in pack) <= limit for pack in cut)
    assert [len(pack) for pack in scorer.packs(jobs, 1)] == [1] * 5


def test_the_tree_is_several_times_smaller_than_its_prompts(checkpoints):
    (job,) = make_jobs(checkpoints["llama"], english(1))
    assert job.prompt_tokens == sum(len(p.ids) for p in job.prompts)
    assert job.prompt_tokens > 3 * len(job.forest)


def test_a_prompt_longer_than_the_context_is_an_error_that_names_the_probe(checkpoints):
    tokenizer = Tokenizer(checkpoints["llama"])
    (dialogue,) = english(1)
    made = prompt.prompts(dialogue, tokenizer, prompt.read_wording(), "chat", "letter", "1")
    with pytest.raises(InputError, match=rf"{dialogue.id}-\d.*context is 50"):
        scorer.prepare(dialogue, made, 50)


def test_nan_in_the_logits_is_an_error_that_names_the_dialogue(checkpoints):
    jobs = make_jobs(checkpoints["llama"], english(2), rotate="1")
    model, _ = checkpoint.load(checkpoints["llama"])
    model.model.layers[2].mlp.up_proj.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="not a finite number"):
        scorer.score_pack(model, jobs)


def test_rows_undo_the_rotation_and_give_ties_to_the_first(checkpoints):
    (job,) = make_jobs(checkpoints["llama"], english(1))
    job = scorer.Job(job.dialogue, job.prompts[:4], job.forest, job.at, job.target, job.prompt_tokens)
    # the model likes place 0 by 0.5, and option 2 wherever it stands by 2
    scores = [[[-3 + 0.5 * (j == 0) + 2 * (o == 2)] for j, o in enumerate(p.order)] for p in job.prompts]
    dialogue = bench.Dialogue(**{**job.dialogue.__dict__, "probes": job.dialogue.probes[:1]})
    job = scorer.Job(dialogue, job.prompts, job.forest, job.at, job.target, job.prompt_tokens)
    (row,) = scorer.rows(job, scores, "letter", log_prompts=False)
    assert row["orders"] == [[0, 1, 2, 3], [1, 2, 3, 0], [2, 3, 0, 1], [3, 0, 1, 2]]
    assert row["pred"] == row["pred_plain"] == 2
    assert results.option_means(row["orders"], row["logprobs"]) == [-2.875, -2.875, -0.875, -2.875]
    tied = [[[-1.0]] * 4] * 4
    assert scorer.rows(job, tied, "letter", log_prompts=False)[0]["pred"] == 0


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("format", ["chat", "plain"])
def test_prompts_are_what_transformers_would_read(checkpoints, family, format):
    theirs = AutoTokenizer.from_pretrained(checkpoints[family])
    (dialogue,) = english(1)
    made = prompt.prompts(dialogue, Tokenizer(checkpoints[family]), prompt.read_wording(), format, "letter", "all")
    for one in made:
        probe = one.probe
        seen = [{"role": role, "content": text} for role, text in dialogue.turns[: probe.after]]
        options = "\n".join(f"{'ABCD'[j]}. {probe.options[o]}" for j, o in enumerate(one.order))
        body = f"{probe.question}\n{options}\nReply with the letter of the best option only."
        if format == "chat":
            if seen[-1]["role"] == "user":
                seen[-1]["content"] += "\n\n" + body
            else:
                seen.append({"role": "user", "content": body})
            text = theirs.apply_chat_template(seen, tokenize=False, add_generation_prompt=True)
            ids = theirs(text, add_special_tokens=False)["input_ids"]
        else:
            turns = "\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in seen)
            text = f"{turns}\n\n{body}\nAnswer:"
            ids = theirs(text)["input_ids"]
        assert one.text == text and one.ids == ids
        separator = " " if format == "plain" else ""
        letters = [
            theirs(text + separator + letter, add_special_tokens=format == "plain")["input_ids"] for letter in "ABCD"
        ]
        assert [ids + option for option in one.continuations] == letters


def test_no_probe_sees_a_later_turn(checkpoints):
    tokenizer, wording = Tokenizer(checkpoints["qwen2"]), prompt.read_wording()
    for dialogue in bench.read(BENCH):
        for one in prompt.prompts(dialogue, tokenizer, wording, "chat", "letter", "1"):
            assert all(text in one.text for _, text in dialogue.turns[: one.probe.after])
            assert not any(text in one.text for _, text in dialogue.turns[one.probe.after :])
