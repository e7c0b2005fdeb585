"""Score the same prompts with this code base, lm-evaluation-harness and transformers; print times and ratios.

    python benchmarks/score.py                         the full comparison: 40 dialogues (an hour or two on two cores)
    python benchmarks/score.py --dialogues 10          a smaller sample

Each program runs in a process of its own, one after the other, on the same float32 checkpoint; loading is not
timed. (a) lm-evaluation-harness's hf backend, batch size 8; (b) transformers, left padding, logits_to_keep=1,
sorted by length, batch size 8. Needs requirements-dev.txt.
"""

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from eicap import bench, checkpoint, prompt, scorer  # noqa: E402
from eicap.tokenizer import Tokenizer  # noqa: E402

TASKS = {"letter, 1 rotation": ("letter", "1"), "letter, 4 rotations": ("letter", "all"), "text": ("text", "1")}


def dialogues(count: int) -> list[bench.Dialogue]:
    """English dialogues of the bench; where it has too few they come again, each with a number of its own."""
    known = bench.read(ROOT / "data" / "bench" / "en.jsonl")
    found = []
    for i in range(count):
        dialogue = known[i % len(known)]
        (role, first), *rest = dialogue.turns
        found.append(dataclasses.replace(dialogue, id=f"{i}", turns=((role, f"({i}) {first}"), *rest)))
    return found


def make_prompts(folder: Path, count: int, task: str) -> list[list[prompt.Prompt]]:
    score, rotate = TASKS[task]
    tokenizer, wording = Tokenizer(folder), prompt.read_wording()
    return [prompt.prompts(d, tokenizer, wording, "chat", score, rotate) for d in dialogues(count)]


def matrix_rate(model) -> float:
    """Operations a second of this process: best of 20 products of 2,048 rows, weighted over a layer's shapes."""
    seconds = operations = 0
    for weight in (p for p in model.model.layers[0].parameters() if p.ndim == 2):
        x = torch.randn(2048, weight.shape[1], dtype=weight.dtype)
        best = float("inf")
        for _ in range(20):
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            best = min(best, time.perf_counter() - start)
        seconds, operations = seconds + best, operations + 2 * 2048 * weight.numel()
    return operations / seconds


@torch.inference_mode()
def ours(folder: Path, count: int, task: str, dtype: torch.dtype = torch.float32) -> dict:
    model, _ = checkpoint.load(folder, dtype)
    score, rotate = TASKS[task]
    tokenizer, wording = Tokenizer(folder), prompt.read_wording()
    rate, found, tokens = matrix_rate(model), [], 0
    start = time.perf_counter()  # from text on: prompts, ids, trees, model
    jobs = (
        scorer.prepare(d, prompt.prompts(d, tokenizer, wording, "chat", score, rotate), 8192) for d in dialogues(count)
    )
    for pack in scorer.packs(jobs, 4096):
        tokens += sum(len(job.forest) for job in pack)
        for job in scorer.score_pack(model, pack):
            found += [sum(option) for places in job for option in places]
    seconds = time.perf_counter() - start
    rate = max(rate, matrix_rate(model))
    size = sum(p.numel() for p in model.model.layers.parameters())
    share = 2 * size * tokens / seconds / rate
    return {"seconds": seconds, "logprobs": found, "tokens": tokens, "rate": rate / 1e9, "share": share}


def ours_bfloat16(folder: Path, count: int, task: str) -> dict:
    return ours(folder, count, task, torch.bfloat16)


def lm_eval(folder: Path, count: int, task: str) -> dict:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    follows = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if TASKS[task][0] == "letter" else None
    pairs = [
        (p.text, end)
        for prompts in make_prompts(folder, count, task)
        for p in prompts
        for end in (follows[: len(p.order)] if follows else p.probe.options)
    ]
    harness = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=8)
    start = time.perf_counter()
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = [logprob for logprob, _ in harness.loglikelihood(requests, disable_tqdm=True)]
    return {"seconds": time.perf_counter() - start, "logprobs": found}


@torch.inference_mode()
def transformers(folder: Path, count: int, task: str) -> dict:
    from transformers import AutoModelForCausalLM

    prompts = [p for prompts in make_prompts(folder, count, task) for p in prompts]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    start = time.perf_counter()
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    found = {}
    for first in range(0, len(by_length), 8):
        chosen = by_length[first : first + 8]
        longest = max(len(prompts[i].ids) for i in chosen)
        rows = [[0] * (longest - len(prompts[i].ids)) + prompts[i].ids for i in chosen]
        mask = [[0] * (longest - len(prompts[i].ids)) + [1] * len(prompts[i].ids) for i in chosen]
        logits = model(torch.tensor(rows), attention_mask=torch.tensor(mask), logits_to_keep=1).logits[:, -1].float()
        for i, row in zip(chosen, logits.log_softmax(-1)):
            found[i] = [row[option[0]].item() for option in prompts[i].continuations]
    return {"seconds": time.perf_counter() - start, "logprobs": [x for i in range(len(prompts)) for x in found[i]]}


PROGRAMS = {f.__name__: f for f in (ours, ours_bfloat16, lm_eval, transformers)}


def run(program: str, folder: Path, count: int, task: str) -> dict:
    """One program in a process of its own: its figures, and the process's peak memory in GB."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as answer:
        command = [sys.executable, __file__, "--only", program, "--task", task, "--ckpt", str(folder)]
        command += ["--dialogues", str(count), "--answer", answer.name]
        subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"})
        return json.load(answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default=checkpoint.DEMO)
    parser.add_argument("--dialogues", type=int, default=40)
    parser.add_argument("--task", choices=TASKS, help="only this task")
    parser.add_argument("--bfloat16", action="store_true", help="also time this code base in bfloat16")
    parser.add_argument("--only", choices=PROGRAMS, help=argparse.SUPPRESS)
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = checkpoint.find(args.ckpt)
    if args.only:
        answer = PROGRAMS[args.only](folder, args.dialogues, args.task)
        answer["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        Path(args.answer).write_text(json.dumps(answer))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.dialogues} dialogues", flush=True)
    for task in [args.task] if args.task else TASKS:
        programs = ["ours", "lm_eval"] + ["transformers"] * task.startswith("letter")
        programs += ["ours_bfloat16"] * args.bfloat16
        answers = {program: run(program, folder, args.dialogues, task) for program in programs}
        mine = answers["ours"]
        print(f"\n{task}: {mine['tokens']} tree tokens")
        for program, answer in answers.items():
            gap = max(abs(a - b) for a, b in zip(mine["logprobs"], answer["logprobs"], strict=True))
            print(
                f"  {program:<14}{answer['seconds']:9.1f} s   {answer['seconds'] / mine['seconds']:5.2f} x ours   "
                f"{answer['memory']:5.2f} GB ({mine['memory'] / answer['memory']:.2f})   largest difference {gap:.1e}"
            )
        print(f"  ours: {mine['share']:.0%} of {mine['rate']:.0f} GFLOP/s, the process's own matrix rate", flush=True)


if __name__ == "__main__":
    main()
