#!/usr/bin/env python
"""Fine-tune a language model on chat dialogues with LoRA, written by hand.

    python train_lora.py --lang ar                                            Qwen2.5-7B on the Arabic sample
    python train_lora.py --ckpt smollm2-135m-instruct --lang en               the small real model, on a laptop
    python train_lora.py --ckpt NAME --lang en --data ultrachat/*.jsonl       the real thing: see README
    torchrun --nproc-per-node 4 train_lora.py --ckpt NAME --lang en           several GPUs
    python evaluate.py --ckpt NAME --adapter runs/NAME-uc-ar                  and what it did

The base stays frozen; a low-rank adapter is trained on what the assistant says. A run is a folder, runs/NAME-uc-LANG:
the adapter as PEFT writes it, log.jsonl (a row a step) and run.json. Interrupted at any moment, the same command goes
on where it stopped, to the same bytes. The loop itself is `fit`, below.
"""

import argparse
import json
import math
import os
import platform
import resource
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from eicap import InputError, checkpoint, lora, prompt, report, results, ultrachat
from eicap.forest import attention
from eicap.tokenizer import Tokenizer
from evaluate import choose_device, choose_format, positive

SAMPLES = Path(__file__).parent / "data" / "ultrachat"
LOSS_ROWS = 256  # positions whose logits exist at the same time
CLIP = 1.0  # largest norm of the gradient of a step
EVALUATED = 64  # held-out dialogues that are looked at, at the most
CUDA_BUCKET = 2048  # on CUDA batches come in few sizes, so that attention is compiled few times


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what is trained on what").add_argument
    add("--ckpt", default="qwen2.5-7b", metavar="NAME", help="a checkpoint, as for evaluate.py (default: %(default)s)")
    add("--lang", required=True, metavar="LIST", help="en, ar or en,ar: which samples; with --data, the run's name")
    add("--data", type=Path, nargs="+", metavar="PATH", help="JSON Lines of dialogues instead of the samples")
    add("--format", choices=["auto", "chat", "plain"], default="auto", help="as for evaluate.py")
    add("--max-tokens", type=positive, default=2048, metavar="N", help="longer dialogues are cut at a turn (2048)")
    add = parser.add_argument_group("the adapter").add_argument
    add("--rank", type=int, default=16, metavar="R", help="r: the width of A and B (16)")
    add("--alpha", type=float, default=32, metavar="A", help="what B A x is multiplied by, times r (32)")
    add("--dropout", type=float, default=0.0, metavar="P", help="share of the adapter's inputs that is dropped (0)")
    add("--target", default="q,k,v,o,gate,up,down", metavar="LIST", help="which matrices (%(default)s)")
    add = parser.add_argument_group("how it is trained").add_argument
    add("--steps", type=positive, default=100, metavar="N", help="updates of the adapter (100)")
    add("--lr", type=float, default=2e-4, metavar="X", help="highest learning rate; it then falls as a cosine (2e-4)")
    add("--warmup", type=int, metavar="N", help="steps in which it rises (a tenth of the steps)")
    add("--batch-tokens", type=positive, metavar="N", help="tokens read in one pass (2048 on the CPU, 8192 on a GPU)")
    add("--accumulate", type=positive, default=1, metavar="N", help="passes to a step, in each process (1)")
    add("--checkpointing", action="store_true", help="keep less for the backward pass, compute a third more")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of the base, as for evaluate.py")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU where there is one")
    add("--seed", type=int, default=0, metavar="N", help="of A, of the dialogues' order and of dropout (0)")
    add = parser.add_argument_group("what it leaves").add_argument
    add("--out", type=Path, metavar="DIR", help="the run's folder (default: runs/NAME-uc-LANG)")
    add("--fresh", action="store_true", help="start over: drop what the folder holds of an earlier run")
    add("--save-every", type=positive, default=20, metavar="N", help="steps between states to go on from (20)")
    add("--eval-every", type=positive, default=20, metavar="N", help="steps between held-out losses (20)")
    add("--merge", type=Path, metavar="DIR", help="also write a full checkpoint with the adapter merged into it")
    add("--plot", type=Path, metavar="FILE", help="also draw the losses (needs matplotlib)")
    return parser.parse_args(argv)


# The pieces


class CrossEntropy(torch.autograd.Function):
    """Sum of -log p(target) over R positions, from their hidden states (R, hidden_size): float32.

    The logits of LOSS_ROWS positions exist at a time, and their gradient is taken while they do: with p = softmax(z),
    dz = p - onehot(target). Of a vocabulary of 152,000 words nothing is kept but d hidden.
    """

    @staticmethod
    def forward(ctx, hidden, target, model):
        weight, cap = model.output_matrix, model.config.final_softcap
        total, back = hidden.new_zeros((), dtype=torch.float64), torch.empty_like(hidden)
        for rows, wanted, out in zip(hidden.split(LOSS_ROWS), target.split(LOSS_ROWS), back.split(LOSS_ROWS)):
            logits = model.logits(rows)
            slope = 1 - (logits / cap).square() if cap else None  # of z = cap tanh(y / cap), by y
            logp = logits.log_softmax(-1)
            del logits
            total += F.nll_loss(logp, wanted, reduction="sum")
            if hidden.requires_grad:
                grad = logp.exp_()
                grad[torch.arange(len(wanted), device=grad.device), wanted] -= 1
                grad = grad if slope is None else grad.mul_(slope)
                torch.mm(grad.to(weight.dtype), weight, out=out)
        ctx.save_for_backward(back)
        return total.float()

    @staticmethod
    def backward(ctx, grad):
        (back,) = ctx.saved_tensors
        return back * grad.to(back.dtype), None, None


def loss_sum(model, examples: list[ultrachat.Example], device: torch.device) -> tuple[torch.Tensor, int]:
    """Summed loss of a batch of dialogues, and over how many tokens."""
    forest, read, target = ultrachat.batch(examples, CUDA_BUCKET if device.type == "cuda" else 1)
    forest, read, target = forest.to(device), read.to(device), target.to(device)
    attend = attention(forest, model.output_matrix.dtype)
    hidden = model(forest.tokens, forest.positions, attend, read)
    return CrossEntropy.apply(hidden, target, model), len(read)


def learning_rate(step: int, args) -> float:
    """Linear over the first `warmup` steps, then half a cosine down to zero."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - args.warmup) / max(args.steps - args.warmup, 1)))


@torch.inference_mode()
def held_out_loss(model, packs: list[list[ultrachat.Example]], device, rank: int, world: int) -> float:
    """Mean loss per token of the held-out dialogues; NaN where there are none."""
    model.eval()
    total, tokens = 0.0, 0
    for pack in packs[rank::world]:
        loss, count = loss_sum(model, pack, device)
        total, tokens = total + loss.item(), tokens + count
    model.train()
    total, tokens = add_up([total, tokens], device, world)
    return total / tokens if tokens else math.nan


def add_up(values: list[float], device, world: int) -> list[float]:
    """Each value summed over the processes."""
    if world == 1:
        return values
    every = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(every)
    return every.tolist()


def memory(device: torch.device) -> float:
    """Peak memory so far, in GB: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Stop:
    """Ctrl-C and SIGTERM are asked for after a step, which is then saved; a second one ends the run at once."""

    def __enter__(self):
        self.asked = False
        self.before = {sign: signal.signal(sign, self) for sign in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __call__(self, signum, frame):
        self.asked = True
        print("\nfinishing this step, then saving; once more stops at once", file=sys.stderr)
        self.restore()

    def __exit__(self, *error):
        self.restore()

    def restore(self):
        for sign, handler in self.before.items():
            signal.signal(sign, handler)


# State


def save_state(folder: Path, step: int, cursor: int, parameters, optimizer) -> None:
    """Everything that a restart needs, in one file, written beside the old one and renamed over it.

    There is no random state: A, the order and dropout are drawn anew from the seed and the step.
    """
    path = folder / "state" / "state.pt"
    state = {"step": step, "cursor": cursor, "adapter": list(parameters), "optimizer": optimizer.state_dict()}
    try:
        path.parent.mkdir(exist_ok=True)
        with open(path.with_suffix(".new"), "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path.with_suffix(".new"), path)
    except OSError as error:
        raise results.no_room(path, error) from None
    except RuntimeError as error:  # torch's own writer, on a full disk
        raise results.no_room(path, OSError(28, str(error).splitlines()[0])) from None


def load_state(folder: Path, parameters, optimizer) -> tuple[int, int]:
    """Put a saved state back. Returns the step and the cursor to go on from: zeros where there is none."""
    path = folder / "state" / "state.pt"
    if not path.is_file():
        return 0, 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for parameter, saved in zip(parameters, state["adapter"], strict=True):
                parameter.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
        return state["step"], state["cursor"]
    except Exception as error:  # a pickle that is cut or garbled can fail in any way
        raise InputError(
            f"{path}: cannot be read ({type(error).__name__}); it is cut, or not a state of train_lora.py\n"
            f"--fresh starts over."
        ) from None


def keep_log(path: Path, step: int) -> None:
    """Drop the rows after `step`: of steps that were taken after the last state was saved, or cut in writing."""
    rows = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        try:
            if json.loads(line)["step"] <= step:
                rows.append(line + b"\n")
        except (ValueError, KeyError, TypeError):
            continue
    try:
        path.with_suffix(".new").write_bytes(b"".join(rows))
        os.replace(path.with_suffix(".new"), path)
    except OSError as error:
        raise results.no_room(path, error) from None


def log(path: Path, row: dict) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise results.no_room(path, error) from None


# The run


def read_files(args) -> tuple[list[Path], list[str]]:
    """The training files, and the language of each."""
    langs = [lang.strip() for lang in args.lang.split(",")]
    if args.data:
        return args.data, [langs[0]] * len(args.data)
    known = sorted(path.stem for path in SAMPLES.glob("*.jsonl"))
    for lang in langs:
        if lang not in known:
            raise InputError(f"--lang {lang}: there are samples in {', '.join(known)}; give others by --data FILE")
    return [SAMPLES / f"{lang}.jsonl" for lang in langs], langs


def read_targets(text: str) -> list[str]:
    """q,v or q_proj,v_proj as names of linear layers."""
    targets = [name.strip().removesuffix("_proj") + "_proj" for name in text.split(",")]
    for target in targets:
        if target not in lora.TARGETS:
            known = ", ".join(name.removesuffix("_proj") for name in lora.TARGETS)
            raise InputError(f"--target {target.removesuffix('_proj')}: no such matrix; choose from {known}")
    return targets


class Examples:
    """Dialogues by number, as the model reads them."""

    def __init__(self, dialogues: ultrachat.Dialogues, langs: list[str], tokenizer, format: str, most: int):
        self.dialogues, self.langs, self.tokenizer, self.format, self.most = dialogues, langs, tokenizer, format, most
        self.wording = prompt.read_wording()

    def __getitem__(self, number: int) -> ultrachat.Example:
        lang = self.langs[self.dialogues.file_of(number)]
        words = self.wording.get(lang, self.wording["en"])
        return ultrachat.render(self.dialogues[number], self.tokenizer, self.format, words, self.most)

    def stream(self, numbers, seed: int, cursor: int):
        """(cursor, Example) for ever. InputError where a whole epoch has none that fits."""
        empty = 0
        for at, number in ultrachat.order(numbers, seed, cursor):
            example = self[number]
            empty = 0 if len(example) else empty + 1
            if empty >= len(numbers):
                raise InputError(
                    f"{self.dialogues.paths[0]}: no dialogue's first two turns fit in {self.most} tokens\n"
                    "Give a larger --max-tokens."
                )
            yield at, example


def train(args: argparse.Namespace) -> int:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(args.device, int(os.environ.get("LOCAL_RANK", 0)))
    targets, (paths, langs) = read_targets(args.target), read_files(args)
    args.warmup = args.steps // 10 if args.warmup is None else args.warmup
    args.batch_tokens = args.batch_tokens or (8192 if device.type == "cuda" else 2048)
    if args.max_tokens > args.batch_tokens:
        raise InputError(f"--max-tokens {args.max_tokens}: more than --batch-tokens {args.batch_tokens} hold")
    if not 0 <= args.dropout < 1:
        raise InputError(f"--dropout {args.dropout}: a share from 0 to below 1 is expected")
    if args.warmup < 0:
        raise InputError(f"--warmup {args.warmup}: 0 or more is expected")
    if args.plot:
        report.pyplot()  # fails now, where it would fail later
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if rank == 0:
            checkpoint.find(args.ckpt)  # the demo model may have to be fetched: once
        dist.barrier()

    # What is learned from
    dialogues = ultrachat.Dialogues(paths)
    trained, unseen = ultrachat.held_out(len(dialogues))
    folder = checkpoint.find(args.ckpt)
    name = folder.resolve().name if Path(args.ckpt).is_dir() else args.ckpt
    config, tokenizer = checkpoint.read_config(folder), Tokenizer(folder)
    format = choose_format(args.format, name)
    examples = Examples(dialogues, langs, tokenizer, format, min(args.max_tokens, config.context))
    shown = [(i, examples[number]) for i, number in enumerate(unseen[:EVALUATED])]
    shown = [pack for _, pack in ultrachat.packs((s for s in shown if len(s[1])), args.batch_tokens)]

    # What is learned
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    model, weights = checkpoint.load(folder, dtype, device)

    identity = {
        "checkpoint": weights,
        "tokenizer": tokenizer.fingerprint,
        "data": dialogues.fingerprint,
        "format": format,
        "dtype": str(model.output_matrix.dtype).removeprefix("torch."),
        "device": device.type,
        "processes": world,
        "targets": sorted(targets),
    }
    names = ["lang", "rank", "alpha", "dropout", "steps", "lr", "warmup", "max_tokens", "batch_tokens", "accumulate"]
    identity |= {name: getattr(args, name) for name in [*names, "checkpointing", "seed"]}
    out = args.out or Path("runs") / f"{name}-uc-{args.lang.replace(',', '-')}"
    with results.lock(out) if rank == 0 else nullcontext():
        if rank == 0:
            if args.fresh:
                results.clear(out, [lora.CONFIG, lora.WEIGHTS, "log.jsonl", "state/*"])
            results.check_identity(out, identity)
        if world > 1:
            dist.barrier()
        if (results.read_run(out) or {}).get("finished"):
            lora.load(model, out)
            print(f"{out}: this run is finished; use --out for another", file=sys.stderr)
        else:
            lora.attach(model, args.rank, args.alpha, targets, args.dropout, args.seed)
            status = fit(args, out, model, examples, trained, shown, identity, rank, world)
            if status:
                return status
        if rank == 0 and args.plot:
            report.plot_losses(out / "log.jsonl", args.plot)
        if rank == 0 and args.merge:
            lora.merge(model, folder, args.merge)
            print(f"{args.merge}: a full checkpoint with the adapter merged into it")
    if world > 1:
        dist.destroy_process_group()
    return 0


def fit(args, out, model, examples, trained, shown, identity, rank, world) -> int:
    """The loop, from the last saved state on, to the finished adapter. Returns the exit status."""
    model.train()
    model.model.checkpointing = args.checkpointing
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, device = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0), parameters[0].device
    step, cursor = load_state(out, parameters, optimizer)
    count, size = sum(p.numel() for p in parameters), sum(p.numel() for p in model.parameters())
    run = {
        "command": sys.argv,
        "checkpoint": args.ckpt,
        "data": [str(path) for path in examples.dialogues.paths],
        "identity": identity,
        "format": examples.format,
        "parameters": {"trained": count, "share": count / size},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "finished": False,
    }
    path = out / "log.jsonl"
    if rank == 0:
        results.write_json(out / "run.json", run)
        keep_log(path, step or -1)  # the held-out loss before training is found anew
        print(
            f"{args.ckpt}: {examples.format} format, {identity['dtype']} on {device}; {count:,} parameters train, "
            f"{count / size:.2%} of all\n{len(trained):,} dialogues, {len(examples.dialogues) - len(trained):,} more "
            f"are held out"
            + ("" if shown else " (none that fits in --max-tokens: no held-out loss)")
            + (f"; going on after step {step}" if step else ""),
            file=sys.stderr,
        )
        if step == 0 and shown:
            print("held-out loss before training …", file=sys.stderr)
    if step == 0 and shown:
        before = held_out_loss(model, shown, device, rank, world)
        if rank == 0:
            log(path, {"step": 0, "held_out": before})

    stream = ultrachat.packs(examples.stream(trained, args.seed, cursor), args.batch_tokens)
    seen = {"tokens": 0, "cut": 0, "left_out": 0, "seconds": 0.0}
    bar = tqdm(total=args.steps, initial=step, unit="step", desc="training", disable=rank > 0, smoothing=0.1)
    with ThreadPoolExecutor(1) as ahead, Stop() as stop, bar:
        waiting = ahead.submit(next, stream)
        while step < args.steps:
            start, total, tokens, read = time.perf_counter(), 0.0, 0, 0
            torch.manual_seed((args.seed * args.steps + step) * world + rank)  # of dropout
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)

            # Every process takes its share of the packs of this step, and adds up gradients of the summed loss
            for turn in range(args.accumulate * world):
                try:
                    following, pack = waiting.result()
                except InputError:  # a dialogue that cannot be rendered: what is learned so far is kept
                    if rank == 0 and step:
                        save_state(out, step, cursor, parameters, optimizer)
                    raise
                waiting = ahead.submit(next, stream)
                seen["cut"] += sum(example.cut and len(example) > 0 for example in pack)
                seen["left_out"] += sum(len(example) == 0 for example in pack)
                if turn % world == rank:
                    loss, targets = loss_sum(model, pack, device)
                    loss.backward()
                    total, tokens, read = total + loss.item(), tokens + targets, read + sum(map(len, pack))

            # The mean over all tokens that carry loss, whoever read them
            total, tokens, read, asked = add_up([total, tokens, read, float(stop.asked)], device, world)
            gradient = torch.cat([parameter.grad.flatten() for parameter in parameters])
            if world > 1:
                dist.all_reduce(gradient)
            gradient /= tokens
            norm = gradient.norm().item()
            if not (math.isfinite(total) and math.isfinite(norm)):
                raise InputError(
                    f"step {step + 1}: the loss or its gradient is not a finite number; nothing is overwritten\n"
                    "Start again with a lower --lr, or --dtype float32."
                )
            gradient *= min(1.0, CLIP / (norm + 1e-6))
            for parameter, part in zip(parameters, gradient.split([p.numel() for p in parameters])):
                parameter.grad.copy_(part.view_as(parameter))
            optimizer.step()
            optimizer.zero_grad()
            step, cursor = step + 1, following

            # What is written down
            seconds = time.perf_counter() - start
            row = {"step": step, "loss": total / tokens, "lr": learning_rate(step - 1, args), "grad_norm": norm}
            row |= {"tokens": int(read), "seconds": round(seconds, 3)}
            if shown and (step % args.eval_every == 0 or step == args.steps):
                row["held_out"] = held_out_loss(model, shown, device, rank, world)
            seen["tokens"], seen["seconds"] = seen["tokens"] + int(read), seen["seconds"] + seconds
            if rank == 0:
                log(path, row)
                if asked or step % args.save_every == 0 or step == args.steps:
                    save_state(out, step, cursor, parameters, optimizer)
            bar.update()
            bar.set_postfix_str(
                f"loss {row['loss']:.3f}, {seen['tokens'] / seen['seconds']:,.0f} tokens/s, {memory(device):.1f} GB"
            )
            if asked and step < args.steps:
                bar.close()
                print(
                    f"stopped after step {step}, which is saved; the same command goes on from there", file=sys.stderr
                )
                return 130

    if rank == 0:
        lora.save(model, out, args.ckpt, args.rank, args.alpha, args.dropout)
        run |= {"finished": True, "ended": datetime.now(UTC).isoformat(timespec="seconds"), "trained": seen}
        results.write_json(out / "run.json", run)
        shutil.rmtree(out / "state", ignore_errors=True)
        print(report.training(path, seen, out))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = arguments(argv)
    try:
        return train(args)
    except InputError as error:
        print(f"train_lora.py: {error}", file=sys.stderr)
        return 2
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        print("train_lora.py: out of memory; try --checkpointing, or a smaller --batch-tokens", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ntrain_lora.py: stopped; the same command goes on from the last saved state", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
