"""The command as users meet it: what it leaves, what it says, how it is interrupted and goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import BENCH, ROOT
from safetensors.torch import load_file, save_file

import evaluate
from eicap import results


@pytest.fixture(scope="module")
def bench_file(tmp_path_factory) -> Path:
    """Six dialogues in English and two in Arabic, cut short from the bench: three turns, three probes."""
    folder = tmp_path_factory.mktemp("bench")
    for lang, count in (("en", 6), ("ar", 2)):
        lines = []
        for line in (BENCH / f"{lang}.jsonl").read_text(encoding="utf-8").splitlines()[:count]:
            dialogue = json.loads(line)
            dialogue["turns"] = [turn | {"content": turn["content"][:90]} for turn in dialogue["turns"][:3]]
            dialogue["probes"] = dialogue["probes"][:3]
            for probe in dialogue["probes"]:
                probe["after"], probe["depends_on"] = min(probe["after"], 3), [0]
                probe["options"] = [f"{option[:20]} ({i})" for i, option in enumerate(probe["options"])]
            lines.append(json.dumps(dialogue, ensure_ascii=False))
        (folder / f"{lang}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tiny(checkpoints) -> Path:
    return checkpoints["qwen2"]


def command(tiny, bench_file, out, *more) -> list[str]:
    return ["--ckpt", str(tiny), "--bench", str(bench_file), "--out", str(out), "--device", "cpu", *map(str, more)]


def rows(out: Path) -> bytes:
    return (out / "probes.jsonl").read_bytes()


@pytest.fixture(scope="module")
def whole(tiny, bench_file, tmp_path_factory) -> Path:
    """An uninterrupted run over everything."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert evaluate.main(command(tiny, bench_file, out)) == 0
    return out


def test_a_run_leaves_a_row_a_probe_in_bench_order_and_a_table(tiny, bench_file, tmp_path, capsys):
    assert evaluate.main(command(tiny, bench_file, tmp_path / "run", "--lang", "en", "--log-prompts")) == 0
    table = capsys.readouterr().out
    for word in ("foundational", "response", "overall", "chance", "survives", "probability on any letter"):
        assert word in table
    found = [json.loads(line) for line in rows(tmp_path / "run").splitlines()]
    dialogues = [json.loads(line) for line in (bench_file / "en.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in found] == [p["id"] for d in dialogues for p in d["probes"]]
    row = found[0]
    assert list(row)[:8] == ["id", "dialogue", "lang", "culture", "layer", "skill", "subcategory", "pair"]
    assert len(row["orders"]) == len(row["logprobs"]) == len(row["prompts"]) == 4
    assert row["correct"] == (row["pred"] == row["answer"])
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["finished"] and run["identity"]["format"] == "chat" and run["scored"]["probes"] == 18
    assert run["dialogues"] == {"finished": 6, "bench": 8}


def test_text_scoring_keeps_sums_tokens_and_bytes(tiny, bench_file, tmp_path):
    assert evaluate.main(command(tiny, bench_file, tmp_path / "run", "--limit", 1, "--score", "text")) == 0
    for line in rows(tmp_path / "run").splitlines():
        row = json.loads(line)
        assert row["orders"] == [[0, 1, 2, 3]] and len(row["bytes"]) == 4
        for total, tokens, mean in zip(row["sums"], row["tokens"], row["logprobs"][0]):
            assert mean == pytest.approx(total / tokens)


@pytest.mark.parametrize("more", [["--pack-tokens", 1], ["--pack-tokens", 100000]])
def test_the_bytes_do_not_depend_on_the_pack(tiny, bench_file, whole, tmp_path, more):
    assert evaluate.main(command(tiny, bench_file, tmp_path / "run", *more)) == 0
    assert rows(tmp_path / "run") == rows(whole)


def test_a_row_does_not_depend_on_the_order_of_the_bench(tiny, bench_file, whole, tmp_path):
    shutil.copytree(bench_file, tmp_path / "bench")
    lines = (bench_file / "en.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "bench" / "en.jsonl").write_text("\n".join(lines[::-1]), encoding="utf-8")
    assert evaluate.main(command(tiny, tmp_path / "bench", tmp_path / "run")) == 0
    assert sorted(rows(tmp_path / "run").splitlines()) == sorted(rows(whole).splitlines())


def test_limit_and_lang_extend_the_same_folder_to_the_same_bytes(tiny, bench_file, whole, tmp_path):
    for more in (["--lang", "ar"], ["--limit", 1], ["--lang", "en", "--limit", 3], []):
        assert evaluate.main(command(tiny, bench_file, tmp_path / "run", *more)) == 0
    assert rows(tmp_path / "run") == rows(whole)


def test_another_identity_is_never_mixed_in(tiny, bench_file, tmp_path, capsys):
    out = tmp_path / "run"
    assert evaluate.main(command(tiny, bench_file, out, "--limit", 1)) == 0
    before = rows(out)
    assert evaluate.main(command(tiny, bench_file, out, "--limit", 1, "--format", "plain", "--rotations", 1)) == 2
    assert "another format, rotations" in capsys.readouterr().err
    assert rows(out) == before
    assert evaluate.main(command(tiny, bench_file, out, "--limit", 1, "--format", "plain", "--fresh")) == 0
    assert rows(out) != before


def test_two_runs_never_write_in_one_folder(tiny, bench_file, tmp_path, capsys):
    with results.lock(tmp_path / "run"):
        assert evaluate.main(command(tiny, bench_file, tmp_path / "run")) == 2
    assert "another run is writing here" in capsys.readouterr().err
    assert not (tmp_path / "run" / "probes.jsonl").exists()


@pytest.fixture(scope="module")
def long_bench(bench_file, tmp_path_factory) -> Path:
    """The same dialogues five times over: some seconds of work to be interrupted in."""
    folder = tmp_path_factory.mktemp("long")
    for path in bench_file.iterdir():
        lines = path.read_text(encoding="utf-8").splitlines()
        again = [line.replace(f'"{path.stem}-', f'"{path.stem}-{i:02d}-') for i in range(5) for line in lines]
        (folder / path.name).write_text("\n".join(again) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def long_whole(tiny, long_bench, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("long-whole") / "run"
    assert evaluate.main(command(tiny, long_bench, out)) == 0
    return out


def start(arguments: list[str], **environment) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "evaluate.py"), *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment
    )


def wait_for_part(out: Path, process: subprocess.Popen, size: int) -> None:
    while process.poll() is None and sum(p.stat().st_size for p in out.glob("part-*.jsonl")) < size:
        time.sleep(0.002)


@pytest.mark.parametrize("size", [1, 20000])
def test_killed_at_any_moment_the_same_command_completes_to_the_same_bytes(
    tiny, long_bench, long_whole, tmp_path, size
):
    arguments = command(tiny, long_bench, tmp_path / "run", "--pack-tokens", 1)
    process = start(arguments)
    wait_for_part(tmp_path / "run", process, size)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    parts = list((tmp_path / "run").glob("part-*.jsonl"))
    assert parts
    with open(parts[0], "ab") as part:  # and the last write was cut
        part.write(b'{"id": "en-00-003-1", "dialogue": "en-0')
    assert evaluate.main(arguments) == 0
    assert rows(tmp_path / "run") == rows(long_whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal_it_says_how_to_go_on(tiny, long_bench, long_whole, tmp_path, number):
    arguments = command(tiny, long_bench, tmp_path / "run", "--pack-tokens", 1)
    process = start(arguments)
    wait_for_part(tmp_path / "run", process, 1)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in error and "Traceback" not in error
    assert evaluate.main(arguments) == 0
    assert rows(tmp_path / "run") == rows(long_whole)


def test_two_processes_leave_the_same_bytes_as_one(tiny, bench_file, tmp_path):
    arguments = [*command(tiny, bench_file, tmp_path / "two")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*launcher, str(ROOT / "evaluate.py"), *arguments],
        cwd=ROOT,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    one = command(tiny, bench_file, tmp_path / "one")
    process = start(one, OMP_NUM_THREADS="1")
    process.communicate()
    assert process.returncode == 0
    assert rows(tmp_path / "two") == rows(tmp_path / "one")
    assert not list((tmp_path / "two").glob("part-*"))


def test_show_prints_one_probe_as_the_model_sees_it(tiny, bench_file, tmp_path, capsys):
    assert evaluate.main(command(tiny, bench_file, tmp_path / "run", "--show", "en-001-2")) == 0
    shown = capsys.readouterr().out
    dialogue = json.loads((bench_file / "en.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert "<|im_start|>user\n" + dialogue["turns"][0]["content"] in shown
    assert sum(" -> " in line for line in shown.splitlines()) == 4
    assert not (tmp_path / "run").exists()


def test_a_pack_that_does_not_fit_in_memory_is_halved_down_to_an_error(tiny, bench_file, whole, tmp_path):
    """Real failures of the real allocator, under a limit on the address space that shrinks until nothing fits."""
    script = (
        "import resource, sys, evaluate, torch\n"
        "from eicap import scorer\n"
        "torch.set_num_threads(1)\n"
        "score_pack = scorer.score_pack\n"
        "def limited(model, jobs):\n"
        "    used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]), resource.RLIM_INFINITY))\n"
        "    print('pack', len(jobs), file=sys.stderr)\n"
        "    return score_pack(model, jobs)\n"
        "scorer.score_pack = limited\n"
        "sys.exit(evaluate.main(sys.argv[2:]))\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "1"}

    def run(room: int, out: str):
        arguments = command(tiny, bench_file, tmp_path / out, "--pack-tokens", 100000)
        return subprocess.run(
            [sys.executable, "-c", script, str(room), *arguments],
            capture_output=True,
            text=True,
            env=environment,
            cwd=ROOT,
        )

    nothing_fits = run(1 << 20, "none")
    assert nothing_fits.returncode == 2 and "out of memory" in nothing_fits.stderr
    assert "Traceback" not in nothing_fits.stderr
    some_fit = run(24 << 20, "some")
    assert some_fit.returncode == 0, some_fit.stderr
    assert some_fit.stderr.count("pack") > 1


def test_a_full_disk_is_an_error_that_loses_nothing(tiny, bench_file, whole, tmp_path):
    """RLIMIT_FSIZE makes the system refuse to write more, as a full disk does."""
    script = (
        "import resource, sys, evaluate\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "sys.exit(evaluate.main(sys.argv[1:]))\n"
    )
    arguments = command(tiny, bench_file, tmp_path / "run", "--pack-tokens", 1)
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2 and "cannot be written" in done.stderr and "Traceback" not in done.stderr
    assert evaluate.main(arguments) == 0
    assert rows(tmp_path / "run") == rows(whole)


def broken_checkpoint(kind: str, tiny: Path, folder: Path) -> str:
    """A copy of the checkpoint with one thing wrong; returns a word that the message must hold."""
    shutil.copytree(tiny, folder)
    weights, tokenizer_config = folder / "model.safetensors", folder / "tokenizer_config.json"
    if kind in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / kind).unlink()
        return {"model.safetensors": "no *.safetensors"}.get(kind, kind)
    if kind == "cut":
        weights.write_bytes(weights.read_bytes()[:-1000])
        return "not a complete safetensors file"
    if kind == "nan":
        tensors = load_file(weights)
        tensors["model.norm.weight"][:] = torch.nan
        save_file(tensors, weights, metadata={"format": "pt"})
        return "not a finite number"
    if kind == "architecture":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
        return "mamba"
    if kind == "context":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
        return "context is 64"
    if kind == "letter":
        model = json.loads((folder / "tokenizer.json").read_text())
        model["normalizer"] = {"type": "Replace", "pattern": {"Regex": "C$"}, "content": "see see"}
        (folder / "tokenizer.json").write_text(json.dumps(model))
        return "not as one token"
    config = json.loads(tokenizer_config.read_text())
    config.pop("chat_template")
    tokenizer_config.write_text(json.dumps(config))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return "no chat template"


@pytest.mark.parametrize(
    "kind",
    [
        "config.json",
        "tokenizer.json",
        "model.safetensors",
        "cut",
        "nan",
        "architecture",
        "context",
        "letter",
        "template",
    ],
)
def test_a_broken_checkpoint_is_a_clear_error(tiny, bench_file, tmp_path, capsys, kind):
    word = broken_checkpoint(kind, tiny, tmp_path / "tiny-instruct")
    assert evaluate.main(command(tmp_path / "tiny-instruct", bench_file, tmp_path / "run", "--limit", 1)) == 2
    error = capsys.readouterr().err.split("evaluate.py: ")[-1]
    assert word in error and len(error.strip().splitlines()) <= 2


@pytest.mark.parametrize(
    "more, word",
    [
        (["--ckpt", "no-such-model"], "no such checkpoint"),
        (["--bench", "no/such/file.jsonl"], "cannot be read"),
        (["--lang", "fr"], "no dialogue in this language"),
        (["--show", "en-999-1"], "no such probe"),
        (["--adapter", "somewhere"], "adapter_config.json"),
    ],
)
def test_a_wrong_argument_is_a_clear_error(tiny, bench_file, tmp_path, capsys, more, word):
    assert evaluate.main([*command(tiny, bench_file, tmp_path / "run"), *more]) == 2
    error = capsys.readouterr().err.split("evaluate.py: ")[-1]
    assert word in error and len(error.strip().splitlines()) <= 2


def test_an_error_of_the_process_has_status_2_and_no_traceback():
    process = start(["--ckpt", "no-such-model"])
    _, error = process.communicate()
    assert process.returncode == 2 and "Traceback" not in error


def test_help_teaches():
    process = start(["--help"])
    out, _ = process.communicate()
    assert process.returncode == 0
    for flag in ("--ckpt", "--bench", "--lang", "--format", "--score", "--rotations", "--limit", "--dtype", "--device",
                 "--adapter", "--pack-tokens", "--out", "--fresh", "--log-prompts", "--show", "torchrun"):  # fmt: skip
        assert flag in out
