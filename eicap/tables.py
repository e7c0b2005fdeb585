"""What stats.py prints and draws, from the reports of eicap/comparison.py."""

import math
from pathlib import Path

from eicap import InputError
from eicap.comparison import BOOTSTRAPS, EXCHANGES, FEWEST, FLIPS, title
from eicap.report import pyplot

BAR = 21  # characters, zero in the middle
ADJUSTMENTS = {"holm": "Holm", "bh": "Benjamini-Hochberg", "maxt": "step-down max-T"}
MARKS = {"improves": "*", "worsens": "*", "not measurable": "?", "no difference found": " ", None: "-"}


def grid(lines: list[list[str]], left: tuple[int, ...] = (0,)) -> str:
    """Columns as wide as their widest cell; those in `left` are left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    aligned = [
        [cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))]
        for line in lines
    ]
    return "\n".join("   ".join(line).rstrip() for line in aligned)


def mean(value: float, metric: str) -> str:
    return f"{value:.3f}" if metric == "logprob" else f"{100 * value:.1f}"


def change(value: float, metric: str) -> str:
    return f"{value:+.3f}" if metric == "logprob" else f"{100 * value:+.1f}"


def interval(ends: list[float] | None, write, metric: str) -> str:
    return f"[{write(ends[0], metric)}, {write(ends[1], metric)}]" if ends else ""


def p_value(p: float | None) -> str:
    return "" if p is None else "<0.0001" if p < 0.0001 else f"{p:.4f}"


def found(value: float | str, metric: str) -> str:
    return value if isinstance(value, str) else mean(value, metric)


def scale(rows: list[dict]) -> float:
    """A round number, such as 20 or 30 points, that holds all differences and their intervals."""
    largest = max(abs(value) for row in rows for value in [row["diff"], *(row["ci"] or [])]) or 0.01
    power = 10 ** math.floor(math.log10(largest))
    return next(step * power for step in (1, 2, 3, 5, 10) if step * power >= largest * (1 - 1e-9))


def bar(row: dict, reach: float) -> str:
    """The difference and its interval on a line from -reach to +reach."""

    def place(value: float) -> int:
        return round((BAR - 1) / 2 * (1 + value / reach))

    cells = [" "] * BAR
    if row["ci"]:
        low, high = map(place, row["ci"])
        cells[low : high + 1] = "─" * (high + 1 - low)
    cells[BAR // 2] = "┼" if cells[BAR // 2] == "─" else "│"
    cells[place(row["diff"])] = "●"
    return "".join(cells)


def ruler(reach: float, metric: str) -> str:
    low, high = change(-reach, metric), change(reach, metric)
    return f"{low}{'0':^{BAR - len(low) - len(high)}}{high}"


def verdict(row: dict) -> str:
    return row["verdict"] or ("described only" if row["p"] is None else f"under {FEWEST} units")


def differences(rows: list[dict], metric: str, first: list[list[str]], header: list[str]) -> str:
    """Rows of differences after some first columns: difference, interval, bar, p-values, verdict."""
    reach = scale(rows)
    lines = [[*header, "B - A", "95 % interval", ruler(reach, metric), "p", "p adj.", "verdict"]]
    for cells, row in zip(first, rows):
        size = [change(row["diff"], metric), interval(row["ci"], change, metric), bar(row, reach)]
        lines.append([*cells, *size, p_value(row["p"]), p_value(row["p_adj"]), verdict(row)])
    return grid(lines, left=(0, len(lines[0]) - 1))


def show_pair(report: dict) -> str:
    """The comparison of two runs on the same probes."""
    rows, metric, alpha = report["rows"], report["metric"], report["alpha"]
    unit = "" if metric == "logprob" else " %"
    first = [[title(r["group"]), str(r["probes"]), mean(r["acc_a"], metric), mean(r["acc_b"], metric)] for r in rows]
    parts = [differences(rows, metric, first, ["", "probes", "A" + unit, "B" + unit])]
    lines = [["", "units", "only B right", "only A right", "Cohen's h", f"found at {alpha}", f"at {alpha}/rows"]]
    for row in rows:
        counts = ["" if row[key] is None else str(row[key]) for key in ("b_only", "a_only")]
        h = "" if row["h"] is None else f"{row['h']:+.2f}"
        mde = [found(row["mde"], metric), found(row["mde_rows"], metric)]
        lines.append([title(row["group"]), str(row["units"]), *counts, h, *mde])
    parts.append(grid(lines))
    if report["contrasts"]:
        first = [[row["contrast"], str(row["units"])] for row in report["contrasts"]]
        parts.append(differences(report["contrasts"], metric, first, ["is one change larger?", "units"]))
    return "\n\n".join(parts)


def left_out(label: str, ids: list[str]) -> list[str]:
    shown = ", ".join(ids[:5]) + (f", ... ({len(ids) - 5} more: --json)" if len(ids) > 5 else "")
    return [f"left out, only in {label}: {len(ids)} probes: {shown}"] if ids else []


def pair_footer(report: dict) -> list[str]:
    family, method = report["family"], ADJUSTMENTS[report["adjust"]]
    tested = [row for row in report["rows"] + report["contrasts"] if row["p"] is not None]
    error = max((row["p_se"] for row in tested), default=0)
    how = f"exact, or {FLIPS:,} random flips, s.e. at most {error:.4f}" if error else "exact, by convolution"
    lines = [
        "p: two-sided, the signs of whole units flipped (a unit is a dialogue, or a dialogue and its pair in another",
        f"   language); {how}",
        f"p adj.: {method} over {family} tests; the row over everything is by itself",
        f"interval: 95 %, percentile bootstrap over units, {BOOTSTRAPS:,} draws; none under {FEWEST} units",
        "found: the smallest true difference that a sample like this would show in 4 of 5 cases",
        "not measurable: even a change of medium size (Cohen's h = 0.5) would be missed more often than that",
    ]
    return [*lines, *left_out(report["a"], report["only_a"]), *left_out(report["b"], report["only_b"])]


SEEDS = "This speaks of other dialogues like these and of these very runs: another training seed may differ."


def ties(counts: dict[str, int]) -> list[str]:
    told = ", ".join(f"{label} {count}" for label, count in counts.items() if count)
    return [f"probes with tied best options (the first is taken): {told}"] if told else []


def pair(report: dict) -> str:
    head = f"A  {report['a']}\nB  {report['b']}"
    counts = {report["a"]: report["ties"][0], report["b"]: report["ties"][1]}
    footer = [*pair_footer(report), *ties(counts), *report["notes"], SEEDS]
    return "\n\n".join([head, show_pair(report), "\n".join(footer)])


def side_by_side(reports: list[dict]) -> str:
    """Differences of several pairs in one table: a column a pair, or a pair and language where --by ends in lang."""
    by, metric = reports[0]["by"], reports[0]["metric"]
    crossed = len(by) == 2 and by[-1] == "lang"
    cells, names, columns = {}, {}, {}
    for i, report in enumerate(reports, start=1):
        for row in report["rows"]:
            group = dict(row["group"])
            column = f"{i} {group.pop('lang')} " if crossed and group else f"{i} "
            if group or not crossed:
                columns[column] = True
            names[title(group)] = True
            cells[title(group), column] = change(row["diff"], metric) + MARKS[row["verdict"]]
    rows = [n for n in names if n != "overall"] + ["overall"] * (not crossed)
    lines = [["B - A", *columns], *([row, *(cells.get((row, column), "") for column in columns)] for row in rows)]
    if crossed:
        overall = "   ".join(f"{i}: {cells['overall', f'{i} ']}" for i in range(1, len(reports) + 1))
        return f"{grid(lines)}\noverall, in all languages   {overall}"
    return grid(lines)


def pairs(reports: list[dict]) -> str:
    """Several pairs: the table side by side, then each pair's own."""
    legend = [f"{i + 1}  {report['a']} -> {report['b']}" for i, report in enumerate(reports)]
    marks = "* significant after adjustment   ? not measurable   - no verdict (described only, or too few units)"
    parts = ["\n".join(legend), side_by_side(reports), marks]
    for i, report in enumerate(reports):
        parts += [f"{i + 1}  A {report['a']}   B {report['b']}", show_pair(report)]
    footer = pair_footer(reports[0] | {"only_a": [], "only_b": []})
    for report in reports:
        footer += left_out(report["a"], report["only_a"]) + left_out(report["b"], report["only_b"]) + report["notes"]
        footer += ties({report["a"]: report["ties"][0], report["b"]: report["ties"][1]})
    return "\n\n".join([*parts, "\n".join([*dict.fromkeys(footer), SEEDS])])


def samples(report: dict) -> str:
    """Two runs on different probes."""
    rows, metric = report["rows"], report["metric"]
    parts = [f"A  {report['a']}\nB  {report['b']}", show_samples(rows, metric, [title(row["group"]) for row in rows])]
    footer = [*sample_footer(report), *ties(dict(zip((report["a"], report["b"]), report["ties"])))]
    return "\n\n".join([*parts, "\n".join([*footer, *report["notes"], SEEDS])])


def show_samples(rows: list[dict], metric: str, labels: list[str]) -> str:
    first = [
        [label, f"{r['units_a']}, {r['units_b']}", mean(r["acc_a"], metric), mean(r["acc_b"], metric)]
        for label, r in zip(labels, rows)
    ]
    unit = "" if metric == "logprob" else " %"
    parts = [differences(rows, metric, first, ["all dialogues", "units A, B", "A" + unit, "B" + unit])]
    linked = [[label, row["pairs"]] for label, row in zip(labels, rows) if row["pairs"]]
    if linked:
        lines = [["pairs only", "pairs", "B - A", "95 % interval", "p"]]
        for label, row in linked:
            size = [change(row["diff"], metric), interval(row["ci"], change, metric), p_value(row["p"])]
            lines.append([label, str(row["pairs"]), *size])
        parts.append(grid(lines))
    return "\n\n".join(parts)


def sample_footer(report: dict) -> list[str]:
    return [
        f"p: two-sided, dialogues exchanged between A and B, studentised, {EXCHANGES:,} draws, seed {report['seed']}",
        "pairs only: dialogues that tell the same situation in both languages, the sign of each pair flipped",
        f"p adj.: {ADJUSTMENTS[report['adjust']]} over the rows; the row over everything is by itself",
    ]


def chance(report: dict) -> str:
    """One run against chance, and its languages."""
    metric = report["metric"]
    lines = [["", "probes", "units", "right %", "95 % interval", "chance %", "p", "p adj.", "verdict"]]
    for row in report["rows"]:
        cells = [title(row["group"]), str(row["probes"]), str(row["units"]), mean(row["acc"], metric)]
        cells += [interval(row["ci"], mean, metric), mean(row["chance"], metric)]
        lines.append([*cells, p_value(row["p"]), p_value(row["p_adj"]), verdict(row)])
    parts = [report["run"], grid(lines, left=(0, 8))]
    footer = [
        "p: one-sided, exact: how often keys drawn at random would be met so often, whatever the model's habits",
        f"p adj.: {ADJUSTMENTS[report['adjust']]} over the rows; the row over everything is by itself",
    ]
    if report["languages"]:
        labels = [f"A {row['a']}, B {row['b']}" for row in report["languages"]]
        parts.append(show_samples(report["languages"], metric, labels))
        footer += sample_footer(report)[:2]
    footer += ties({report["run"]: report["ties"]})
    return "\n\n".join([*parts, "\n".join([*footer, *report["notes"], SEEDS])])


def leaderboard(report: dict) -> str:
    """Runs side by side, the best first, each accuracy with the ranks that it may have."""
    labels, metric = report["runs"], report["metric"]
    lines = [["", "probes", "units", *(chr(ord("A") + i % 26) for i in range(len(labels)))]]
    for row in [report["rows"][-1], *report["rows"][:-1]]:
        cells = []
        for label in labels:
            low, high = row["rank"][label] if row["rank"] else (0, 0)
            ranks = "" if not row["rank"] else f" ({low})" if low == high else f" ({low}-{high})"
            cells.append(mean(row["acc"][label], metric) + ranks)
        lines.append([title(row["group"]), str(row["probes"]), str(row["units"]), *cells])
    parts = ["\n".join(f"{chr(ord('A') + i % 26)}  {label}" for i, label in enumerate(labels)), grid(lines)]
    equals = report["not_told_apart"]
    told = f"but not told apart from {', '.join(equals)}" if equals else "and better than every other run"
    parts.append(f"strongest: {report['strongest']}, {told}")
    footer = [
        "in brackets: the ranks a run may have, from sign-flip tests of every pair of runs on the same dialogues;",
        f"   {ADJUSTMENTS[report['adjust']]} over {report['family']} tests, all pairs x all rows",
        f"   none under {FEWEST} units; each pair's differences, intervals and p-values are in --json",
    ]
    if report["adjust"] == "bh":
        footer.append("   Benjamini-Hochberg bounds the share of wrong differences, not the chance that all ranks hold")
    for label, ids in report["left_out"].items():
        footer += left_out(label, ids)
    return "\n\n".join([*parts, "\n".join([*footer, *ties(report["ties"]), *report["notes"], SEEDS])])


def plot(reports: list[dict], path: Path) -> None:
    """Differences with their intervals, a panel a pair."""
    size = (1.5 + 4.5 * len(reports), 1 + 0.35 * max(len(report["rows"]) for report in reports))
    figure, axes = pyplot().subplots(1, len(reports), figsize=size, sharex=True, squeeze=False)
    percent = 1 if reports[0]["metric"] == "logprob" else 100
    for axis, report in zip(axes[0], reports):
        for place, row in enumerate(report["rows"]):
            if row["ci"]:
                axis.plot([percent * end for end in row["ci"]], [place, place], color="grey")
            axis.plot(
                percent * row["diff"], place, "o", color="black" if row["verdict"] != "not measurable" else "grey"
            )
        axis.axvline(0, color="lightgrey", zorder=0)
        axis.set_yticks(range(len(report["rows"])), [title(row["group"]) for row in report["rows"]])
        axis.set_title(f"{report['b']}\nminus {report['a']}", fontsize="small")
        axis.invert_yaxis()
        axis.set_xlabel("log-probability" if percent == 1 else "points")
    figure.tight_layout()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise InputError(f"--plot {path}: cannot be written ({error})") from None
