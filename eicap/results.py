"""What a run leaves on disk, written so that a kill at any instant costs nothing but the pack in flight.

    results/NAME/run.json        what was run: everything needed to repeat it
    results/NAME/probes.jsonl    a row a probe, in bench order; only ever replaced whole
    results/NAME/part-N.jsonl    while a run is going: what process N has finished, appended a dialogue at a time
    results/NAME/lock            held while a run is going

Imports no torch, so that whoever only reads results starts at once.
"""

import fcntl
import json
import math
import os
import shlex
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from eicap import InputError


def write_json(path: Path, content: dict) -> None:
    """Replace a file whole: written beside it, flushed to disk, renamed over it."""
    _write(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".new")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise no_room(path, error) from None


def no_room(path: Path, error: OSError) -> InputError:
    return InputError(
        f"{path}: cannot be written ({error.strerror})\n"
        "What is finished is safe: make room, or check the folder's rights, and run the same command again."
    )


@contextmanager
def lock(folder: Path):
    """Hold the folder while a run writes in it. InputError while another run holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "w")  # noqa: SIM115  closed below, whatever the run does
    except OSError as error:
        raise no_room(folder, error) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{folder}: another run is writing here; wait for it, or use --out") from None
        yield


def read_run(folder: Path) -> dict | None:
    """The contents of run.json, or None where there is none."""
    path = folder / "run.json"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: cannot be read ({error}); --fresh starts over") from None
    if not isinstance(run, dict) or not isinstance(run.get("identity"), dict):
        raise InputError(f"{path}: not a run's run.json; use --out, or --fresh to start over")
    return run


def check_identity(folder: Path, identity: dict) -> None:
    """InputError where the folder holds a run of other contents or settings, saying which."""
    run = read_run(folder)
    if run is None:
        if (folder / "probes.jsonl").exists():
            raise InputError(f"{folder}: has probes.jsonl but no run.json; use --out, or --fresh to start over")
        return
    differs = [key for key in identity if run["identity"].get(key) != identity[key]]
    if differs:
        raise InputError(
            f"{folder}: holds a run with another {', '.join(differs)}\n"
            "Use --out for another folder, or --fresh to start over."
        )


def clear(folder: Path, patterns: list[str]) -> None:
    """Remove what a run left (--fresh), run.json and the files of these patterns, and nothing else."""
    for pattern in ["run.json", *patterns]:
        for file in folder.glob(pattern):
            file.unlink()


class Part:
    """The file to which one process appends the dialogues it has finished."""

    def __init__(self, folder: Path, process: int):
        self.path = folder / f"part-{process}.jsonl"

    def append(self, rows: Iterable[dict]) -> None:
        """All rows of one dialogue, in one write."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        try:
            with open(self.path, "ab", buffering=0) as file:
                data = text.encode("utf-8")
                if file.write(data) != len(data):  # a full disk takes part of it
                    raise OSError(28, "No space left on device")
                os.fsync(file.fileno())
        except OSError as error:
            raise no_room(self.path, error) from None


def read_rows(path: Path) -> list[dict]:
    """The rows of a probes.jsonl. InputError with file and line for one that is garbled."""
    return [row for _, row in _read_lines(path, tail_may_be_cut=False).values()]


def _read_lines(
    path: Path, tail_may_be_cut: bool, check: Callable[[dict], None] = lambda row: None
) -> dict[str, tuple[str, dict]]:
    """Probe id -> line as written, and the row in it. The last line of a part file may be cut, and is then left out."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    found = {}
    tail = lines.pop()  # empty where the file ends in a newline
    if tail and not tail_may_be_cut:
        raise InputError(f"{path}, line {len(lines) + 1}: the line is cut; --fresh starts over")
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            text = line.decode("utf-8")
            row = json.loads(text)
            if row["id"] in found and not tail_may_be_cut:
                raise ValueError
            found[row["id"]] = text, row
        except (ValueError, KeyError, TypeError, RecursionError):
            if tail_may_be_cut:  # a cut line, and then another after a restart
                continue
            raise InputError(f"{where}: not a row of results; --fresh starts over") from None
        try:
            check(row)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            why = f"{error} is missing" if isinstance(error, KeyError) else error
            raise InputError(f"{where}: not a row of results ({why}); --fresh starts over") from None
    return found


def read_run_and_rows(folder: Path, partial: bool = False) -> tuple[dict, dict[str, dict]]:
    """A run's run.json and its rows by probe id, each row checked; for whoever compares runs.

    partial: take what an unfinished run has so far. InputError where there is no run, it is unfinished, or a row
    is garbled.
    """
    run = read_run(folder)
    if run is None:
        raise InputError(f"{folder}: no results here (no run.json); give a folder that evaluate.py made")
    if not isinstance(run["identity"].get("bench"), dict):
        raise InputError(f"{folder / 'run.json'}: does not say which bench was scored; run evaluate.py again")
    paths = [folder / "probes.jsonl"]
    if not run.get("finished"):
        if not partial:
            command = shlex.join(["python", *map(str, run.get("command", ["evaluate.py"]))])
            raise InputError(
                f"{folder}: this run is unfinished; --partial takes what is there, and this completes it:\n{command}"
            )
        paths += sorted(folder.glob("part-*.jsonl"))
    rows = {}
    for path in paths:
        lines = _read_lines(path, tail_may_be_cut=path.name != "probes.jsonl", check=_check_row)
        rows |= {id: row for id, (_, row) in lines.items()}
    if not rows:
        raise InputError(f"{folder}: no row of results in it; run evaluate.py again")
    return run, rows


def _check_row(row: dict) -> None:
    """ValueError that says what is wrong with a row."""
    for name in ("id", "dialogue", "lang", "layer", "skill"):
        if not isinstance(row.get(name), str):
            raise ValueError(f"{name} is not a string")
    for name in ("subcategory", "culture", "pair"):
        if not isinstance(row.get(name), str | None):
            raise ValueError(f"{name} is neither a string nor null")
    orders, logprobs, answer = row["orders"], row["logprobs"], row["answer"]
    options = len(orders[0]) if orders else 0
    every = list(range(options))
    if options < 2 or any(sorted(order) != every for order in orders):
        raise ValueError("orders are not permutations of the options")
    if [len(values) for values in logprobs] != [options] * len(orders):
        raise ValueError("logprobs do not match orders")
    if not all(map(math.isfinite, chain.from_iterable(logprobs))):
        raise ValueError("a log-probability is not a finite number")
    if type(answer) is not int or not 0 <= answer < options:
        raise ValueError("answer is none of the options")
    for choice, correct in (("pred", "correct"), ("pred_plain", "correct_plain")):
        if row[correct] is not (row[choice] == answer):
            raise ValueError(f"{correct} does not follow from {choice} and answer")


def merge(folder: Path, dialogues: Iterable[tuple[str, list[str]]]) -> set[str]:
    """Gather every finished dialogue into probes.jsonl, in bench order, and drop the part files.

    dialogues: (dialogue id, its probes' ids) of the whole bench, in order. A dialogue counts when all of its
    probes are there. Returns the ids of the finished dialogues. Safe to be killed in, and to be done again.
    """
    path, parts = folder / "probes.jsonl", sorted(folder.glob("part-*.jsonl"))
    lines = _read_lines(path, tail_may_be_cut=False)
    for part in parts:
        lines = _read_lines(part, tail_may_be_cut=True) | lines
    done = {dialogue: probes for dialogue, probes in dialogues if all(probe in lines for probe in probes)}
    if parts:
        _write(path, "".join(lines[probe][0] + "\n" for probes in done.values() for probe in probes))
        for part in parts:
            part.unlink(missing_ok=True)
    return set(done)


def option_means(orders: list[list[int]], logprobs: list[list[float]]) -> list[float]:
    """Mean log-probability of each option over the rotations; orders[r][j] is the option at place j."""
    sums = [0.0] * len(orders[0])
    for order, values in zip(orders, logprobs):
        for option, value in zip(order, values):
            sums[option] += value
    return [total / len(orders) for total in sums]
