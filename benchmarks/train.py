"""Train the same adapter on the same dialogues with this code base and with transformers + peft; print ratios.

    python benchmarks/train.py                       24 English dialogues, about five minutes on two cores
    python benchmarks/train.py --dialogues 60        all of them

Each program runs in a process of its own, one after the other: float32 SmolLM2-135M-Instruct, rank 16 on all seven
matrices, AdamW, the same shuffled dialogues of mixed length. Ours packs about 2,048 tokens into a step; `peft` pads
four dialogues to the longest of them; `peft_single` takes one at a time, without padding. The learning rate is zero,
so that all programs must find the same loss. What is timed are whole steps (forward, backward, clipping, update)
after one that is not timed; what is counted are tokens of dialogues, not of padding. Needs requirements-dev.txt.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from score import matrix_rate  # noqa: E402

import train_lora  # noqa: E402
from eicap import checkpoint, lora, ultrachat  # noqa: E402
from eicap.tokenizer import Tokenizer  # noqa: E402


def examples(folder: Path, count: int) -> list[ultrachat.Example]:
    dialogues = ultrachat.Dialogues([ROOT / "data" / "ultrachat" / "en.jsonl"])
    made = train_lora.Examples(dialogues, ["en"], Tokenizer(folder), "chat", 2048)
    numbers, _ = ultrachat.held_out(len(dialogues))
    return [example for _, example in itertools.islice(made.stream(numbers, 0, 0), count)]


def peak_memory() -> float:
    """Of this process, in GB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def timed(step, batches: list, parameters) -> dict:
    """step(batch) -> (summed loss, tokens that carry loss, real tokens) over all batches; the first also untimed."""
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)
    total = targets = tokens = 0
    for i, batch in enumerate([batches[0], *batches]):
        if i == 1:
            start = time.perf_counter()
        loss, count, read = step(batch)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if i:
            total, targets, tokens = total + loss, targets + count, tokens + read
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": tokens, "targets": targets, "loss": total / targets, "memory": peak_memory()}


def ours(folder: Path, count: int, adapter: Path, checkpointing: bool = False) -> dict:
    read = examples(folder, count)
    model, _ = checkpoint.load(folder, torch.float32)
    rate = matrix_rate(model)
    lora.load(model, adapter)
    model.model.checkpointing = checkpointing
    parameters = [m for layer in lora.layers(model).values() for m in (layer.lora_A, layer.lora_B)]
    for parameter in parameters:
        parameter.requires_grad_()

    def step(pack):
        loss, count = train_lora.loss_sum(model.train(), pack, torch.device("cpu"))
        (loss / count).backward()
        return loss.item(), count, sum(map(len, pack))

    packs = [pack for _, pack in ultrachat.packs(enumerate(read), 2048)]
    answer = timed(step, packs, parameters)
    size = sum(p.numel() for name, p in model.model.layers.named_parameters() if "lora" not in name)
    rate = max(rate, matrix_rate(model))
    share = (6 if checkpointing else 4) * size * answer["tokens"] / answer["seconds"] / rate
    return answer | {"rate": rate / 1e9, "share": share}


def ours_checkpointing(folder: Path, count: int, adapter: Path) -> dict:
    return ours(folder, count, adapter, checkpointing=True)


def peft(folder: Path, count: int, adapter: Path, size: int = 4) -> dict:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    read = examples(folder, count)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True).train()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step(few):
        longest = max(map(len, few))
        ids = torch.tensor([e.ids + [0] * (longest - len(e)) for e in few])
        mask = torch.tensor([[1] * len(e) + [0] * (longest - len(e)) for e in few])
        labels = [[t if c else -100 for t, c in zip(e.ids, e.loss)] + [-100] * (longest - len(e)) for e in few]
        loss = model(input_ids=ids, attention_mask=mask, labels=torch.tensor(labels)).loss
        loss.backward()
        targets = sum(map(sum, (e.loss for e in few)))
        return loss.item() * targets, targets, sum(map(len, few))

    return timed(step, [read[i : i + size] for i in range(0, count, size)], parameters)


def peft_single(folder: Path, count: int, adapter: Path) -> dict:
    return peft(folder, count, adapter, size=1)


PROGRAMS = {f.__name__: f for f in (ours, ours_checkpointing, peft, peft_single)}


def make_adapter(folder: Path, out: Path) -> None:
    """An adapter whose B is not zero, so that every gradient is at work."""
    model, _ = checkpoint.load(folder, torch.float32)
    lora.attach(model, 16, 32)
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in lora.layers(model).values():
            layer.lora_B.normal_(std=0.01)
    lora.save(model, out, str(folder), 16, 32, 0.0)


def run(program: str, folder: Path, count: int, adapter: Path) -> dict:
    with tempfile.NamedTemporaryFile("r", suffix=".json") as answer:
        command = [sys.executable, __file__, "--only", program, "--ckpt", str(folder), "--dialogues", str(count)]
        command += ["--adapter", str(adapter), "--answer", answer.name]
        subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        return json.load(answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default=checkpoint.DEMO)
    parser.add_argument("--dialogues", type=int, default=24)
    parser.add_argument("--programs", default=",".join(PROGRAMS), help="which, in this order")
    parser.add_argument("--only", choices=PROGRAMS, help=argparse.SUPPRESS)
    parser.add_argument("--adapter", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = checkpoint.find(args.ckpt)
    if args.only:
        answer = PROGRAMS[args.only](folder, args.dialogues, args.adapter)
        Path(args.answer).write_text(json.dumps(answer))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.dialogues} dialogues", flush=True)
    with tempfile.TemporaryDirectory() as adapter:
        make_adapter(folder, Path(adapter))
        answers = {}
        for program in args.programs.split(","):
            answer = answers[program] = run(program, folder, args.dialogues, Path(adapter))
            speed = answer["tokens"] / answer["seconds"]
            line = f"{program:<20}{speed:6.0f} tokens/s {answer['memory']:6.2f} GB   loss {answer['loss']:.6f}"
            if "share" in answer:
                line += f"   {answer['share']:.0%} of {answer['rate']:.0f} GFLOP/s, the process's own matrix rate"
            print(line, flush=True)
    rivals = [program for program in answers if program.startswith("peft")]
    for program, rival in itertools.product([p for p in answers if p not in rivals], rivals):
        a, b = answers[program], answers[rival]
        speed = b["seconds"] / b["tokens"] * a["tokens"] / a["seconds"]
        print(f"{program}: {speed:.2f} x the tokens/s of {rival} in {a['memory'] / b['memory']:.2f} of its memory")


if __name__ == "__main__":
    main()
