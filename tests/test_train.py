"""train_lora.py as users meet it: it learns, goes on after any end, and agrees with transformers + peft."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
import torch
from conftest import BENCH, ROOT
from transformers import AutoModelForCausalLM

import evaluate
import train_lora
from eicap import checkpoint, lora, ultrachat
from eicap.forest import chain
from eicap.model import Checkpoint
from eicap.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tiny(checkpoints) -> Path:
    return checkpoints["qwen2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Forty short dialogues of two or four turns."""
    path = tmp_path_factory.mktemp("data") / "talk.jsonl"
    dialogues = list(ultrachat.Dialogues([ROOT / "data" / "ultrachat" / "en.jsonl"]))[:40]
    rows = [{"data": [turn["content"][:120] for turn in d[: 2 + 2 * (i % 2)]]} for i, d in enumerate(dialogues)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(tiny, data, out, *more) -> list[str]:
    found = ["--ckpt", tiny, "--lang", "en", "--data", data, "--out", out, "--device", "cpu", "--steps", 8]
    found += ["--batch-tokens", 300, "--max-tokens", 300, "--rank", 4, "--eval-every", 4, "--lr", 1e-3, *more]
    return [str(word) for word in found]


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in log(out) if "loss" in row]


def adapter(out: Path) -> bytes:
    return (out / lora.WEIGHTS).read_bytes() + (out / lora.CONFIG).read_bytes()


@pytest.fixture(scope="module")
def whole(tiny, data, tmp_path_factory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train_lora.main(command(tiny, data, out)) == 0
    return out


# What a run is


def test_a_run_leaves_an_adapter_a_log_and_what_was_run(whole, tiny, data):
    rows, run = log(whole), json.loads((whole / "run.json").read_text())
    assert [row["step"] for row in rows] == list(range(9)) and [r["step"] for r in rows if "held_out" in r] == [0, 4, 8]
    assert set(rows[3]) == {"step", "loss", "lr", "grad_norm", "tokens", "seconds"}
    assert 100 < rows[3]["tokens"] <= 300
    assert run["finished"] and run["identity"]["format"] == "chat"
    assert run["trained"]["tokens"] == sum(row.get("tokens", 0) for row in rows)
    assert not (whole / "state").exists()
    model, _ = checkpoint.load(tiny)
    lora.load(model, whole)
    assert len(lora.layers(model)) == 7 * model.config.num_layers


def test_it_learns_what_it_is_shown(tiny, tmp_path, capsys):
    data = tmp_path / "one.jsonl"
    data.write_text(json.dumps({"data": ["What is the capital of France?", "Paris, on the river Seine."]}) + "\n")
    assert train_lora.main(command(tiny, data, tmp_path / "run", "--steps", 60, "--lr", 0.01, "--rank", 8)) == 0
    found = losses(tmp_path / "run")
    assert found[-1] < found[0] - 1.4  # a random output matrix allows no more
    assert f"{found[0]:.4f} -> {found[-1]:.4f}" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not(whole, tiny, data, tmp_path):
    assert train_lora.main(command(tiny, data, tmp_path / "again")) == 0
    assert train_lora.main(command(tiny, data, tmp_path / "other", "--seed", 1)) == 0
    assert adapter(tmp_path / "again") == adapter(whole) != adapter(tmp_path / "other")
    assert losses(tmp_path / "again") == losses(whole)


def test_checkpointing_changes_nothing_but_memory(whole, tiny, data, tmp_path, monkeypatch):
    layers, forward = [], Checkpoint.forward
    monkeypatch.setattr(
        Checkpoint, "forward", lambda ctx, layer, *rest: layers.append(layer) or forward(ctx, layer, *rest)
    )
    assert train_lora.main(command(tiny, data, tmp_path / "run", "--checkpointing")) == 0
    assert layers
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=1e-5)
    more = ["--dropout", 0.3]
    for name, flag in (("a", []), ("b", ["--checkpointing"])):
        assert train_lora.main(command(tiny, data, tmp_path / name, *more, *flag)) == 0
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-5)
    assert losses(tmp_path / "a")[1:] != pytest.approx(losses(whole)[1:], rel=1e-5)


def test_accumulating_two_passes_is_one_batch_of_both(tiny, data, tmp_path):
    """The loss is the mean over all tokens of the step, not a mean of means."""
    assert train_lora.main(command(tiny, data, tmp_path / "run", "--accumulate", 2, "--steps", 1)) == 0
    model, _ = checkpoint.load(tiny)
    made = train_lora.Examples(ultrachat.Dialogues([data]), ["en"], Tokenizer(tiny), "chat", 300)
    numbers, _ = ultrachat.held_out(40)
    stream = ultrachat.packs(made.stream(numbers, 0, 0), 300)
    both = next(stream)[1] + next(stream)[1]
    with torch.no_grad():
        loss, tokens = train_lora.loss_sum(model, both, torch.device("cpu"))
    assert losses(tmp_path / "run")[0] == pytest.approx(loss.item() / tokens, rel=1e-5)


def test_the_learning_rate_rises_and_falls_as_a_cosine(whole):
    class Args:
        lr, warmup, steps = 2.0, 4, 12

    rates = [train_lora.learning_rate(step, Args) for step in range(12)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[8] == pytest.approx(1.0) and rates[5:] == sorted(rates[5:], reverse=True) and rates[11] > 0
    assert log(whole)[1]["lr"] == pytest.approx(1e-3)


# Against others


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_cross_entropy_in_pieces_equals_it_at_once(checkpoints, family, monkeypatch):
    monkeypatch.setattr(train_lora, "LOSS_ROWS", 5)
    model, _ = checkpoint.load(checkpoints[family])
    torch.manual_seed(0)
    hidden, target = torch.randn(23, 64, requires_grad=True), torch.randint(0, 4096, (23,))
    logits = hidden @ model.output_matrix.T
    if family == "gemma2":
        logits = 30 * torch.tanh(logits / 30)
    right = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
    loss = train_lora.CrossEntropy.apply(hidden, target, model)
    assert loss.item() == pytest.approx(right.item(), rel=1e-6)
    (expected,) = torch.autograd.grad(3 * right, hidden)
    (found,) = torch.autograd.grad(3 * loss, hidden)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def peft_losses(folder, steps, examples, batch_tokens, lr, rank):
    """The losses of a transformers + peft loop on the same batches, one dialogue at a time, from the same A."""
    model, _ = checkpoint.load(folder)
    lora.attach(model, rank, 32, seed=0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = [name.removesuffix("_proj") + "_proj" for name in lora.TARGETS]
    settings = peft.LoraConfig(r=rank, lora_alpha=32, target_modules=names, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(base, settings)
    parameters = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, layer in lora.layers(model).items():
            parameters[f"base_model.model.{name}.lora_A.default.weight"].copy_(layer.lora_A)
    optimizer = torch.optim.AdamW(parameters.values(), lr=lr, weight_decay=0.0)
    schedule = type("Args", (), {"lr": lr, "warmup": steps // 10, "steps": steps})
    packs, found = ultrachat.packs(examples, batch_tokens), []
    for step in range(steps):
        _, pack = next(packs)
        optimizer.param_groups[0]["lr"] = train_lora.learning_rate(step, schedule)
        total, count = 0.0, sum(map(sum, (e.loss for e in pack)))
        for example in pack:
            ids = torch.tensor([example.ids])
            labels = torch.tensor([[i if c else -100 for i, c in zip(example.ids, example.loss)]])
            loss = theirs(input_ids=ids, labels=labels).loss * sum(example.loss) / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters.values(), train_lora.CLIP)
        optimizer.step()
        optimizer.zero_grad()
        found.append(total)
    return found


def first_twenty(folder, data, out, batch_tokens, lr):
    more = ["--steps", 20, "--batch-tokens", batch_tokens, "--max-tokens", batch_tokens, "--lr", lr]
    assert train_lora.main(command(folder, data, out, *more)) == 0
    made = train_lora.Examples(ultrachat.Dialogues([data]), ["en"], Tokenizer(folder), "chat", batch_tokens)
    numbers, _ = ultrachat.held_out(40)
    expected = peft_losses(folder, 20, made.stream(numbers, 0, 0), batch_tokens, lr, 4)
    assert losses(out) == pytest.approx(expected, rel=1e-4)
    assert abs(expected[-1] - losses(out)[0]) > 0.02  # something was learned, and compared


@pytest.mark.parametrize("clip", [1.0, 0.05])  # hardly ever, and at every step
def test_the_first_twenty_losses_equal_those_of_transformers_and_peft(tiny, data, tmp_path, monkeypatch, clip):
    monkeypatch.setattr(train_lora, "CLIP", clip)
    first_twenty(tiny, data, tmp_path / "run", 300, 0.02)


@pytest.mark.slow
def test_the_first_twenty_losses_of_the_real_model_equal_those_of_transformers_and_peft(smollm2, data, tmp_path):
    first_twenty(smollm2, data, tmp_path / "run", 300, 1e-3)


def test_evaluate_scores_the_adapter_in_the_format_it_was_trained_with(whole, tiny, data, tmp_path, capsys):
    line = (BENCH / "en.jsonl").read_text(encoding="utf-8").splitlines()[0]
    (tmp_path / "bench.jsonl").write_text(line + "\n", encoding="utf-8")
    plain = tmp_path / "plain"
    assert train_lora.main(command(tiny, data, plain, "--format", "plain", "--steps", 2)) == 0
    asked = ["--ckpt", str(tiny), "--bench", str(tmp_path / "bench.jsonl"), "--device", "cpu"]
    runs = {}
    for name, more in (
        ("base", []),
        ("tuned", ["--adapter", str(whole)]),
        ("packed", ["--adapter", str(whole), "--pack-tokens", "1"]),
        ("plain", ["--adapter", str(plain)]),
        ("asked", ["--adapter", str(plain), "--format", "chat"]),
    ):
        assert evaluate.main([*asked, *more, "--out", str(tmp_path / "out" / name)]) == 0
        runs[name] = json.loads((tmp_path / "out" / name / "run.json").read_text())
        runs[name]["rows"] = (tmp_path / "out" / name / "probes.jsonl").read_bytes()
    assert [runs[name]["identity"]["format"] for name in runs] == ["chat", "chat", "chat", "plain", "chat"]
    assert runs["tuned"]["name"] == f"{tiny.name}+run" and runs["base"]["identity"]["adapter"] is None
    assert runs["tuned"]["rows"] == runs["packed"]["rows"] != runs["base"]["rows"]
    assert evaluate.main([*asked, "--adapter", str(plain), "--out", str(tmp_path / "out" / "tuned")]) == 2
    assert "another adapter, format" in capsys.readouterr().err


def test_an_adapter_of_a_run_on_other_weights_or_unfinished_is_refused(whole, checkpoints, tiny, tmp_path, capsys):
    few = ["--lang", "en", "--limit", "1"]
    assert evaluate.main(["--ckpt", str(checkpoints["llama"]), "--adapter", str(whole), *few]) == 2
    assert "other weights" in capsys.readouterr().err
    run = json.loads((whole / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(run | {"finished": False}))
    assert evaluate.main(["--ckpt", str(tiny), "--adapter", str(tmp_path), *few]) == 2
    assert "not finished" in capsys.readouterr().err
    assert evaluate.main(["--ckpt", str(tiny), "--adapter", str(tmp_path / "none"), *few]) == 2
    assert lora.CONFIG in capsys.readouterr().err


# Never loses work


def start(argv: list[str], **more) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train_lora.py"), *argv], cwd=ROOT, env=environment, stderr=subprocess.PIPE, **more
    )


def wait_for_step(out: Path, step: int) -> None:
    path, until = out / "log.jsonl", time.monotonic() + 120
    while time.monotonic() < until:
        if path.is_file() and path.read_bytes().count(b'"loss"') >= step:
            return
        time.sleep(0.002)
    raise AssertionError(f"step {step} was not reached")


@pytest.fixture(scope="module")
def long_run(tiny, data, tmp_path_factory) -> tuple[list[str], Path]:
    """Flags of a run long enough to be killed in, and the run."""
    more = ["--steps", 60, "--save-every", 7, "--dropout", 0.1]
    out = tmp_path_factory.mktemp("long") / "run"
    assert train_lora.main(command(tiny, data, out, *more)) == 0
    return more, out


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(long_run, tiny, data, tmp_path):
    more, right = long_run
    argv = command(tiny, data, tmp_path / "run", *more)
    for step in (1, 9, 30):
        process = start(argv)
        wait_for_step(tmp_path / "run", step)
        process.kill()
        process.wait()
        assert process.returncode == -signal.SIGKILL
    state = tmp_path / "run" / "state"
    (state / "state.new").write_bytes(b"a write that was cut")
    with open(tmp_path / "run" / "log.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    assert train_lora.main(argv) == 0
    assert adapter(tmp_path / "run") == adapter(right)
    strip = [{k: v for k, v in row.items() if k != "seconds"} for row in log(tmp_path / "run")]
    assert strip == [{k: v for k, v in row.items() if k != "seconds"} for row in log(right)]


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_saves_the_step_and_goes_on_from_it(long_run, tiny, data, tmp_path, sign):
    more, right = long_run
    argv = command(tiny, data, tmp_path / "run", *more, "--save-every", 1000)
    process = start(argv)
    wait_for_step(tmp_path / "run", 5)
    process.send_signal(sign)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and b"the same command goes on" in errors and b"Traceback" not in errors
    done = len(losses(tmp_path / "run"))
    state = torch.load(tmp_path / "run" / "state" / "state.pt", weights_only=True)
    assert state["step"] == done >= 5
    assert train_lora.main(argv) == 0
    assert adapter(tmp_path / "run") == adapter(right)


def test_a_finished_run_is_left_alone_and_can_still_be_merged(whole, tiny, data, tmp_path, capsys):
    before, changed = adapter(whole), (whole / lora.WEIGHTS).stat().st_mtime_ns
    assert train_lora.main(command(tiny, data, whole, "--merge", tmp_path / "merged")) == 0
    assert "finished" in capsys.readouterr().err
    assert adapter(whole) == before and (whole / lora.WEIGHTS).stat().st_mtime_ns == changed
    model, _ = checkpoint.load(tiny)
    lora.load(model, whole)
    forest = chain(list(range(50, 90)))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        mine = model.logits(model(forest.tokens, forest.positions, train_lora.attention(forest, torch.float32)))
        torch.testing.assert_close(mine, theirs(forest.tokens[None]).logits[0], atol=1e-4, rtol=0)


def test_two_processes_find_the_losses_of_one(tiny, data, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert train_lora.main(command(tiny, data, one, "--accumulate", 2)) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(ROOT / "train_lora.py"), *command(tiny, data, two)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert [r["held_out"] for r in log(two) if "held_out" in r] == pytest.approx(
        [r["held_out"] for r in log(one) if "held_out" in r], rel=1e-4
    )
    assert [row.get("tokens") for row in log(two)] == [row.get("tokens") for row in log(one)]


def test_a_loss_that_is_not_finite_stops_before_anything_is_overwritten(tiny, data, tmp_path, capsys):
    out = tmp_path / "run"
    assert train_lora.main(command(tiny, data, out, "--lr", 1e18, "--warmup", 0, "--save-every", 1)) == 2
    error = capsys.readouterr().err
    assert "not a finite number" in error and "Traceback" not in error
    state = torch.load(out / "state" / "state.pt", weights_only=True)
    assert state["step"] == len(losses(out)) >= 1 and not (out / lora.WEIGHTS).exists()


def test_a_full_disk_is_a_clear_error_and_loses_nothing(tiny, data, whole, tmp_path):
    out = tmp_path / "run"

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    process = start(command(tiny, data, out, "--save-every", 3), preexec_fn=small_disk)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and b"Traceback" not in errors
    assert b"state.pt: cannot be written" in errors
    assert train_lora.main(command(tiny, data, out, "--save-every", 3)) == 0
    assert adapter(out) == adapter(whole)


# Bad input


@pytest.mark.parametrize(
    "more, words",
    [
        (["--rank", 0], "--rank 0"),
        (["--rank", 65], "--rank 65"),
        (["--target", "q,lm_head"], "--target lm_head"),
        (["--dropout", 1], "--dropout 1"),
        (["--max-tokens", 400], "--batch-tokens 300"),
        (["--max-tokens", 5], "no dialogue's first two turns fit in 5 tokens"),
        (["--data", "none.jsonl"], "none.jsonl: cannot be read"),
        (["--ckpt", "no-such-model"], "no such checkpoint"),
        (["--lr", 0.5, "--warmup", -1], "--warmup"),
    ],
)
def test_bad_input_is_one_or_two_clear_lines_and_status_2(tiny, data, tmp_path, capsys, more, words):
    assert train_lora.main(command(tiny, data, tmp_path / "run", *more)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    error = [i for i, line in enumerate(lines) if line.startswith("train_lora.py: ")]
    assert len(error) == 1 and len(lines) - error[0] <= 2
    assert words in lines[error[0]]


def test_an_unknown_language_is_refused_with_what_there_is(tiny, tmp_path, capsys):
    argv = ["--ckpt", str(tiny), "--out", str(tmp_path / "run")]
    assert train_lora.main([*argv, "--lang", "fr"]) == 2
    assert "--lang fr: there are samples in ar, en" in capsys.readouterr().err


def test_the_folder_of_another_run_is_never_mixed_in(whole, tiny, data, tmp_path, capsys):
    assert train_lora.main(command(tiny, data, whole, "--lr", 5e-4)) == 2
    assert "another lr" in capsys.readouterr().err
    other = tmp_path / "run"
    assert train_lora.main(command(tiny, data, other, "--steps", 2, "--lr", 5e-4)) == 0
    assert train_lora.main(command(tiny, data, other, "--steps", 8, "--fresh")) == 0
    assert adapter(other) == adapter(whole)


def test_a_cut_state_is_an_error_that_says_what_to_do(tiny, data, tmp_path, capsys):
    out, state = tmp_path / "run", tmp_path / "run" / "state" / "state.pt"
    argv = command(tiny, data, out, "--lr", 1e18, "--warmup", 0, "--save-every", 1)
    assert train_lora.main(argv) == 2
    state.write_bytes(state.read_bytes()[:-1000])
    capsys.readouterr()
    assert train_lora.main(argv) == 2
    assert "state.pt: cannot be read" in capsys.readouterr().err


def test_the_picture_is_drawn_or_the_missing_package_named(whole, tiny, data, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    assert train_lora.main(command(tiny, data, whole, "--plot", tmp_path / "loss.png")) == 0
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert train_lora.main(command(tiny, data, whole, "--plot", tmp_path / "other.png")) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_help_teaches():
    text = subprocess.run([sys.executable, ROOT / "train_lora.py", "--help"], capture_output=True, text=True).stdout
    for flag in ("--ckpt", "--lang", "--data", "--out", "--steps", "--rank", "--alpha", "--target", "--dropout", "--lr",
                 "--warmup", "--max-tokens", "--batch-tokens", "--accumulate", "--format", "--checkpointing", "--dtype",
                 "--device", "--seed", "--save-every", "--eval-every", "--merge", "--plot", "torchrun"):  # fmt: skip
        assert flag in text


def test_without_a_held_out_dialogue_it_says_so_and_trains(tiny, tmp_path, capsys):
    few = tmp_path / "few.jsonl"
    few.write_text(json.dumps({"data": ["Is it warm?", "Yes, and dry."]}) + "\n")
    assert train_lora.main(command(tiny, few, tmp_path / "run")) == 0
    assert "no held-out loss" in capsys.readouterr().err
    assert "held_out" not in (tmp_path / "run" / "log.jsonl").read_text()
