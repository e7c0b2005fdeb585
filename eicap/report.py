"""Tables of a run, for the terminal, and its picture. Imports no torch."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from eicap import InputError
from eicap.bench import LETTERS
from eicap.results import option_means


def clustered_mean(values: list[float], clusters: list[str]) -> tuple[float, float]:
    """Mean, and its standard error when values of one cluster hang together.

    The probes of a dialogue share a text, so dialogues are the sample: with G of them,
    SE^2 = G / (G - 1) * sum over dialogues of (sum of (x - mean))^2 / n^2  (Liang and Zeger 1986; Miller 2024,
    arXiv 2411.00640). NaN with fewer than two dialogues.
    """
    mean = sum(values) / len(values)
    sums: dict[str, float] = defaultdict(float)
    for value, cluster in zip(values, clusters):
        sums[cluster] += value - mean
    groups = len(sums)
    if groups < 2:
        return mean, math.nan
    return mean, math.sqrt(groups / (groups - 1) * sum(s * s for s in sums.values())) / len(values)


def _percent(value: float, error: float) -> str:
    return f"{100 * value:5.1f} ± {100 * error:4.1f}" if not math.isnan(error) else f"{100 * value:5.1f}       "


def _line(name: str, rows: list[dict], rotated: bool) -> str:
    clusters = [row["dialogue"] for row in rows]
    cells = [
        f"{name:<16}{len(rows):>6}   {_percent(*clustered_mean([row['correct_plain'] for row in rows], clusters))}"
    ]
    if rotated:
        cells.append(_percent(*clustered_mean([row["correct"] for row in rows], clusters)))
    chance = sum(1 / len(row["logprobs"][0]) for row in rows) / len(rows)
    return "   ".join([*cells, f"{100 * chance:6.1f}"])


def score_table(rows: list[dict]) -> str:
    """Accuracy per layer, skill and language and overall: n, as written, averaged over rotations, chance; in %."""
    rotated = any(len(row["orders"]) > 1 for row in rows)
    header = f"{'':<16}{'n':>6}   {'as written':>12}" + (f"   {'rotated':>12}" if rotated else "") + "   chance"
    lines = [header]
    for key in ("layer", "skill", "lang"):
        groups = _grouped(rows, key)
        lines += ["", *(_line(name, group, rotated) for name, group in groups.items())]
    return "\n".join([*lines, "", _line("overall", rows, rotated)])


def _grouped(rows: list[dict], key: str) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(str(row[key]), []).append(row)
    order = ["foundational", "dimensional", "appraisal", "value", "social"] if key == "layer" else []
    order += ["tracking", "cause", "appraisal", "response"] if key == "skill" else []
    return {name: groups[name] for name in [*order, *groups] if name in groups}


def letter_lines(rows: list[dict]) -> str:
    """What letter scoring says beside accuracy: which letters the model favours, and how firmly it chooses."""
    places = max(len(row["logprobs"][0]) for row in rows)
    share, chosen = [0.0] * places, [0] * places
    mass, asked = 0.0, 0
    for row in rows:
        for logprobs in row["logprobs"]:
            probabilities = [math.exp(value) for value in logprobs]
            total = math.fsum(probabilities)
            mass, asked = mass + total, asked + 1
            for place, probability in enumerate(probabilities):
                share[place] += probability / total if total else 1 / len(probabilities)
            chosen[logprobs.index(max(logprobs))] += 1
    letters = [
        f"{LETTERS[i]} {100 * share[i] / asked:.1f} % (chosen {100 * chosen[i] / asked:.1f} %)" for i in range(places)
    ]
    lines = [f"letters' share of probability:  {'   '.join(letters)}"]
    rotated = [row for row in rows if len(row["orders"]) > 1]
    if rotated:
        kept = sum(len({_choice(o, p) for o, p in zip(row["orders"], row["logprobs"])}) == 1 for row in rotated)
        lines.append(f"choice survives every rotation: {100 * kept / len(rotated):.1f} % of probes")
    lines.append(f"probability on any letter:      {100 * mass / asked:.1f} % on average")
    return "\n".join(lines)


def _choice(order: list[int], logprobs: list[float]) -> int:
    return order[logprobs.index(max(logprobs))]


def count_ties(rows: list[dict]) -> int:
    """Predictions, rotation-averaged or as written, whose best score two options share."""

    def tied(scores: Iterable[float]) -> bool:
        best, second = sorted(scores, reverse=True)[:2]
        return best == second

    return sum(tied(option_means(row["orders"], row["logprobs"])) or tied(row["logprobs"][0]) for row in rows)


def report(rows: list[dict], score: str) -> str:
    """The whole report of a run, as evaluate.py prints it."""
    parts = [score_table(rows)]
    if score == "letter":
        parts.append(letter_lines(rows))
    if ties := count_ties(rows):
        parts.append(f"{ties} probes have tied best options; ties go to the first")
    parts.append("in %, ± one standard error clustered by dialogue")
    return "\n\n".join(parts)


def show_probe(probe, prompts, scores, text: str, pieces: list[str], score: str) -> str:
    """One probe as the model sees it, and the probability of each option in each rotation.

    prompts, scores: per rotation, scores[r][place] the log-probabilities of the option's tokens; text: the first
    prompt as the model reads it, special tokens included; pieces: its tokens.
    """
    lines = [text, "", f"{len(pieces)} tokens; the first and last are {pieces[0]!r} and {pieces[-1]!r}", ""]
    for option, text in enumerate(probe.options):
        lines.append(f"{'*' if option == probe.answer else ' '} {option}: {text}")
    lines += ["", "probability of each option, a line a rotation" if score == "letter" else "per option"]
    for prompt, places in zip(prompts, scores):
        if score == "letter":
            cells = {o: f"{LETTERS[j]}={o} {math.exp(places[j][0]):.4f}" for j, o in enumerate(prompt.order)}
        else:
            cells = {
                o: f"{o} {math.exp(sum(t) / len(t)):.4f} a token over {len(t)}" for o, t in zip(prompt.order, places)
            }
        best = max(range(len(places)), key=lambda j: sum(places[j]) / len(places[j]))
        lines.append("   ".join(cells[o] for o in sorted(cells)) + f"   -> {prompt.order[best]}")
    return "\n".join([*lines, "", "* is the right one"])


def training(log: Path, seen: dict, out: Path) -> str:
    """The last words of train_lora.py. seen: tokens, seconds, and how many dialogues were cut or left out."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    held_out = [row["held_out"] for row in rows if "held_out" in row]
    losses = [row["loss"] for row in rows if "loss" in row]
    lines = [f"loss            {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps"]
    if held_out:
        lines.append(f"held-out loss   {held_out[0]:.4f} -> {held_out[-1]:.4f}")
    if seen["seconds"]:
        lines.append(f"{seen['tokens']:,} tokens, {seen['tokens'] / seen['seconds']:,.0f} a second")
    if seen["cut"] or seen["left_out"]:
        lines.append(
            f"{seen['cut']} dialogues were cut at a turn, {seen['left_out']} left out: longer than --max-tokens"
        )
    return "\n".join([*lines, f"{out}: the adapter, log.jsonl and run.json"])


def pyplot():
    """matplotlib's, for a file and no window. InputError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("--plot needs matplotlib, which is not installed: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_losses(log: Path, path: Path) -> None:
    """The losses of a training run as a picture; its format is the file name's."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    figure, axes = pyplot().subplots(figsize=(6, 4), layout="constrained")
    for key, label, style in (("loss", "training", "-"), ("held_out", "held out", "o-")):
        points = [(row["step"], row[key]) for row in rows if key in row]
        axes.plot(*zip(*points), style, label=label, markersize=4) if points else None
    axes.set(xlabel="step", ylabel="loss a token", title=log.parent.name)
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: the picture cannot be written ({error})") from None
