#!/usr/bin/env python
"""Score a language model on multi-turn probes of emotional intelligence.

    python evaluate.py --ckpt smollm2-135m-instruct              the small real model, fetched on first use
    python evaluate.py --ckpt qwen2.5-7b                          by name: checkpoints/NAME or the Hugging Face cache
    python evaluate.py --ckpt path/to/folder --bench my.jsonl     your own model, your own bench
    python evaluate.py --ckpt NAME --adapter runs/NAME-uc-ar       with a LoRA adapter: train_lora.py's, or PEFT's
    python evaluate.py --ckpt NAME --show en-001-2                one probe exactly as the model sees it
    torchrun --nproc-per-node 4 evaluate.py --ckpt NAME           several GPUs (or CPUs): the same bytes

Every probe is asked once per rotation of its options, because models favour letters. The score of an option is
the log-probability of its letter. A run is a folder, results/NAME[+ADAPTER]: run.json and probes.jsonl, a row a probe.
Interrupted at any moment, the same command goes on where it stopped. --lang and --limit only select: a later
command with others extends the same folder.
"""

import argparse
import hashlib
import json
import os
import platform
import signal
import sys
import time
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from eicap import InputError, bench, checkpoint, lora, prompt, report, results, scorer
from eicap.tokenizer import Tokenizer

PACK_TOKENS = {"cpu": 4096, "cuda": 16384}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join([*checkpoint.REPOSITORIES, checkpoint.DEMO])
    parser.add_argument("--ckpt", required=True, metavar="NAME", help=f"a folder in Hugging Face layout, or: {names}")
    parser.add_argument(
        "--adapter", type=Path, metavar="DIR", help="a LoRA adapter on top: a run of train_lora.py, or PEFT's"
    )
    group = parser.add_argument_group("what is asked")
    default = Path(__file__).parent / "data" / "bench"
    group.add_argument("--bench", type=Path, default=default, metavar="PATH", help="a bench file, or a folder of them")
    group.add_argument("--lang", metavar="LIST", help="only these languages, e.g. en or en,ar")
    group.add_argument("--limit", type=positive, metavar="N", help="only the first N dialogues of each language")
    group = parser.add_argument_group("how it is asked")
    group.add_argument(
        "--format",
        choices=["auto", "chat", "plain"],
        default="auto",
        help="chat: the checkpoint's own chat template; plain: a transcript; "
        "auto: chat where the name says instruct or ends in -it",
    )
    group.add_argument(
        "--score",
        choices=["letter", "text"],
        default="letter",
        help="letter: options are listed, their letters are scored; text: each option is scored as the reply",
    )
    group.add_argument(
        "--rotations",
        choices=["all", "1"],
        default="all",
        help="all: every cyclic order of the options; 1: as written (letter scoring only)",
    )
    group = parser.add_argument_group("how it is run")
    group.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="auto: float32 on the CPU, the checkpoint's own on a GPU",
    )
    group.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU where there is one"
    )
    group.add_argument(
        "--pack-tokens",
        type=positive,
        metavar="N",
        help="tokens read in one pass; changes speed and memory, never a score "
        f"(default: {PACK_TOKENS['cpu']} on the CPU, {PACK_TOKENS['cuda']} on a GPU)",
    )
    group = parser.add_argument_group("what it leaves")
    group.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: results/NAME[+ADAPTER])")
    group.add_argument("--fresh", action="store_true", help="start over: drop what the folder holds of an earlier run")
    group.add_argument("--log-prompts", action="store_true", help="keep the full text of every prompt in probes.jsonl")
    group.add_argument("--show", metavar="PROBE_ID", help="print one probe as the model sees it, and write nothing")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def select(dialogues: list[bench.Dialogue], langs: str | None, limit: int | None) -> list[bench.Dialogue]:
    """The dialogues of these languages, the first `limit` of each, in bench order."""
    known = sorted({dialogue.lang for dialogue in dialogues})
    wanted = [lang.strip() for lang in langs.split(",")] if langs else known
    for lang in wanted:
        if lang not in known:
            raise InputError(f"--lang {lang}: no dialogue in this language; the bench has {', '.join(known)}")
    count = dict.fromkeys(wanted, 0)
    chosen = []
    for dialogue in dialogues:
        if dialogue.lang in count and (limit is None or count[dialogue.lang] < limit):
            count[dialogue.lang] += 1
            chosen.append(dialogue)
    return chosen


def choose_format(asked: str, name: str) -> str:
    """chat where the checkpoint's name says that it was tuned to chat."""
    if asked != "auto":
        return asked
    name = name.lower()
    return "chat" if "instruct" in name or name.endswith("-it") else "plain"


def check_adapter(folder: Path, name: str, weights: str) -> None:
    """InputError where run.json says that the adapter is unfinished or for other weights; PEFT's folders have none."""
    run = results.read_run(folder)
    if run and run["identity"].get("checkpoint") != weights:
        raise InputError(f"{folder}: was trained on other weights, {run.get('checkpoint')}, and does not fit {name}")
    if run and not run.get("finished"):
        raise InputError(f"{folder}: its training is not finished; the same train_lora.py command completes it")


def choose_device(asked: str, rank: int) -> torch.device:
    if asked == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "--device cuda: torch sees no CUDA GPU here\nUse --device cpu, or install a CUDA build of torch."
        )
    if asked == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


class Jobs:
    """Dialogues made ready for the scorer, one after the other."""

    def __init__(self, args, tokenizer: Tokenizer, format: str, context: int):
        self.args, self.tokenizer, self.format, self.context = args, tokenizer, format, context
        self.wording = prompt.read_wording()

    def __call__(self, dialogue: bench.Dialogue) -> scorer.Job:
        made = prompt.prompts(dialogue, self.tokenizer, self.wording, self.format, self.args.score, self.args.rotations)
        return scorer.prepare(dialogue, made, self.context)


def show(probe_id: str, dialogues: list[bench.Dialogue], jobs: Jobs, model) -> None:
    for dialogue in dialogues:
        for probe in dialogue.probes:
            if probe.id == probe_id:
                job = jobs(dialogue)
                scores = scorer.score_pack(model, [job])[0]
                mine = [(p, s) for p, s in zip(job.prompts, scores) if p.probe is probe]
                made, found = zip(*mine)
                text, pieces = jobs.tokenizer.text(made[0].ids), jobs.tokenizer.pieces(made[0].ids)
                print(report.show_probe(probe, made, found, text, pieces, jobs.args.score))
                return
    raise InputError(f"--show {probe_id}: no such probe in {jobs.args.bench}")


def score(model, todo: list[bench.Dialogue], jobs: Jobs, part: results.Part, pack_tokens: int, quiet: bool) -> dict:
    """Score dialogues and append their rows, pack by pack, with a progress bar. Returns counts."""
    counts = {"probes": 0, "prompts": 0, "tree_tokens": 0, "prompt_tokens": 0}
    start = time.perf_counter()
    total = sum(len(dialogue.probes) for dialogue in todo)
    with tqdm(total=total, unit="probe", disable=quiet or not total, desc="scoring", smoothing=0.1) as bar:
        for pack in scorer.packs(map(jobs, todo), pack_tokens):
            for job, scores in zip(pack, scorer.score_pack(model, pack)):
                part.append(scorer.rows(job, scores, jobs.args.score, jobs.args.log_prompts))
                counts["probes"] += len(job.dialogue.probes)
                counts["prompts"] += len(job.prompts)
                counts["tree_tokens"] += len(job.forest)
                counts["prompt_tokens"] += job.prompt_tokens
                bar.update(len(job.dialogue.probes))
            seconds = time.perf_counter() - start
            saved = 1 - counts["tree_tokens"] / counts["prompt_tokens"]
            bar.set_postfix_str(f"{counts['tree_tokens'] / seconds:,.0f} tokens/s, {saved:.0%} of tokens shared")
    return counts | {"seconds": round(time.perf_counter() - start, 3)}


def evaluate(args: argparse.Namespace) -> None:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.score == "text":
        args.rotations = "1"  # no letters, no places
    dialogues = bench.read(args.bench)
    chosen = select(dialogues, args.lang, args.limit)
    device = choose_device(args.device, int(os.environ.get("LOCAL_RANK", 0)))
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if rank == 0:
            checkpoint.find(args.ckpt)  # the demo model may have to be fetched: once
        dist.barrier()

    folder = checkpoint.find(args.ckpt)
    name = folder.resolve().name if Path(args.ckpt).is_dir() else args.ckpt
    config, tokenizer = checkpoint.read_config(folder), Tokenizer(folder)
    trained = results.read_run(args.adapter) if args.adapter else None
    asked = trained["identity"].get("format", "auto") if trained and args.format == "auto" else args.format
    jobs = Jobs(args, tokenizer, choose_format(asked, name), config.context)
    for lang in {dialogue.lang for dialogue in chosen}:  # a tokenizer or template that will not do fails here, early
        jobs(next(dialogue for dialogue in chosen if dialogue.lang == lang))
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    model, weights = checkpoint.load(folder, dtype, device)
    adapter = None
    if args.adapter:
        check_adapter(args.adapter, name, weights)
        adapter = lora.load(model, args.adapter)
        name += f"+{args.adapter.resolve().name}"
    if args.show:
        return show(args.show, dialogues, jobs, model)

    identity = {
        "checkpoint": weights,
        "tokenizer": tokenizer.fingerprint,
        "adapter": adapter,
        "bench": bench.fingerprint(dialogues),
        "prompts": hashlib.sha256(json.dumps(jobs.wording, sort_keys=True).encode()).hexdigest(),
        "format": jobs.format,
        "score": args.score,
        "rotations": args.rotations,
        "dtype": str(model.output_matrix.dtype).removeprefix("torch."),
        "device": device.type,
        "log_prompts": args.log_prompts,
    }
    out = args.out or Path("results") / name
    with results.lock(out) if rank == 0 else nullcontext():
        run_in(out, args, name, identity, dialogues, chosen, jobs, model, rank, world)
    if world > 1:
        dist.destroy_process_group()


def run_in(out: Path, args, name: str, identity: dict, dialogues, chosen, jobs: Jobs, model, rank: int, world: int):
    """Score what the folder does not hold yet, merge it in bench order, and print the report."""
    order = [(dialogue.id, [probe.id for probe in dialogue.probes]) for dialogue in dialogues]
    device = model.output_matrix.device
    done = None
    if rank == 0:
        if args.fresh:
            results.clear(out, ["probes.jsonl", "part-*.jsonl"])
        results.check_identity(out, identity)
        done = results.merge(out, order)
        run = {
            "command": sys.argv,
            "name": name,
            "checkpoint": args.ckpt,
            "adapter": args.adapter and str(args.adapter),
            "bench": str(args.bench),
            "identity": identity,
            "wording": jobs.wording,
            "processes": world,
            "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "finished": False,
        }
        results.write_json(out / "run.json", run)
        print(
            f"{name}: {jobs.format} format, {identity['dtype']} on {device}, {len(chosen)} dialogues", file=sys.stderr
        )
        if kept := sum(dialogue.id in done for dialogue in chosen):
            print(f"{out}: {kept} of them are already scored and kept", file=sys.stderr)
    if world > 1:
        shared = [done]
        dist.broadcast_object_list(shared)
        done = shared[0]

    todo = [dialogue for dialogue in chosen if dialogue.id not in done][rank::world]
    pack_tokens = args.pack_tokens or PACK_TOKENS[device.type]
    counts = score(model, todo, jobs, results.Part(out, rank), pack_tokens, quiet=rank > 0)
    if world > 1:
        every = [{} for _ in range(world)]
        dist.all_gather_object(every, counts)  # also the barrier: every part file is complete
        counts = {key: sum(c[key] for c in every) for key in counts} | {"seconds": max(c["seconds"] for c in every)}
    if rank == 0:
        done = results.merge(out, order)
        run |= {"finished": True, "ended": datetime.now(UTC).isoformat(timespec="seconds"), "scored": counts}
        run["dialogues"] = {"finished": len(done), "bench": len(dialogues)}
        results.write_json(out / "run.json", run)
        wanted = {probe.id for dialogue in chosen for probe in dialogue.probes}
        rows = [row for row in results.read_rows(out / "probes.jsonl") if row["id"] in wanted]
        print(report.report(rows, args.score))
        print(f"\n{out / 'probes.jsonl'}: {len(rows)} probes of this selection")


def stop(signum, frame):
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = arguments(argv)
    try:
        evaluate(args)
    except InputError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print(
            f"evaluate.py: {args.ckpt}: does not fit on the GPU; try --dtype bfloat16 or --device cpu", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        print(
            "\nevaluate.py: stopped; what is scored is kept, and the same command goes on from there", file=sys.stderr
        )
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    sys.exit(main())
