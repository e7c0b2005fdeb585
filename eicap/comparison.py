"""What runs say about each other: rows of results in, tables of numbers out (plain values, as --json writes them).

A table has a row for each group of probes (a layer, a language, ...) and a last one over everything, whose group is
empty. All tests are in eicap/permutation.py; this file decides what is compared with what.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from eicap import InputError
from eicap import permutation as tests
from eicap.report import count_ties
from eicap.results import option_means, read_run_and_rows

FACETS = {
    "layer": ["foundational", "dimensional", "appraisal", "value", "social"],
    "skill": ["tracking", "cause", "appraisal", "response"],
    "subcategory": [],
    "lang": ["en"],
    "culture": [],
}
ALPHA = 0.05
FEWEST = 20  # units, for an interval and a verdict
MEDIUM = 0.5  # Cohen's h
FLIPS = 100_000
EXCHANGES = 10_000
BOOTSTRAPS = 10_000


@dataclass(frozen=True)
class Run:
    label: str
    folder: Path
    run: dict  # run.json
    rows: dict[str, dict]  # by probe id


def read(folders: list[Path], partial: bool) -> list[Run]:
    """The runs, each labelled by its folder's name, or the whole path where two have one name."""
    names = [folder.resolve().name for folder in folders]
    places = {name: {folder.resolve() for folder in folders if folder.resolve().name == name} for name in names}
    labels = [name if len(places[name]) == 1 else str(folder) for name, folder in zip(names, folders)]
    return [Run(label, folder, *read_run_and_rows(folder, partial)) for label, folder in zip(labels, folders)]


# Which probes are compared


def common(runs: list[Run]) -> tuple[list[str], dict[str, list[str]]]:
    """Probes that every run has, in the first one's order, and the others, by the label of a run that has them.

    InputError where there are none, or where they are not the same probes under the same ids.
    """
    shared = set.intersection(*(set(run.rows) for run in runs))
    if not shared:
        raise InputError(
            f"{' and '.join(str(run.folder) for run in runs)}: no probe in common\n"
            "Runs on different benches or languages are compared by --unpaired."
        )
    for run in runs[1:]:
        _check_same_bench(runs[0], run, shared)
    left = {run.label: [id for id in run.rows if id not in shared] for run in runs}
    return [id for id in runs[0].rows if id in shared], left


def _check_same_bench(a: Run, b: Run, shared: set[str]) -> None:
    for lang in sorted({a.rows[id]["lang"] for id in shared}):
        if a.run["identity"]["bench"].get(lang) != b.run["identity"]["bench"].get(lang):
            raise InputError(
                f"{a.folder} and {b.folder}: same probe ids, other bench contents ({lang}, by fingerprint)\n"
                "Score both on the same bench files."
            )
    for id in shared:
        x, y = a.rows[id], b.rows[id]
        for field in ("answer", "dialogue", "pair", *FACETS):
            if x[field] != y[field] or len(x["orders"][0]) != len(y["orders"][0]):
                raise InputError(f"{a.folder} and {b.folder}: probe {id} is not the same in both ({field})")


def check_metric(runs: list[Run], metric: str) -> None:
    """Log-probabilities of letters and of whole options are not the same scale."""
    kinds = {run.run["identity"].get("score") for run in runs}
    if metric == "logprob" and len(kinds) > 1:
        told = ", ".join(f"{run.folder}: {run.run['identity'].get('score')}" for run in runs)
        raise InputError(f"--metric logprob: the runs scored different things ({told}); compare correct instead")


def settings_that_differ(runs: list[Run]) -> list[str]:
    """What else differs than the model: a line for each setting, for the table's footer."""
    lines = []
    for name in ("format", "rotations", "score", "prompts", "dtype"):
        values = [str(run.run["identity"].get(name)) for run in runs]
        if len(set(values)) > 1:
            shown = [f"{run.label}: {value[:12]}" for run, value in zip(runs, values)]
            lines.append(f"the runs differ in {name} too: {', '.join(shown)}")
    return lines


def units(rows: list[dict]) -> list[str]:
    """The unit of each row: its dialogue, or, where both members of a language pair are here, the pair."""
    present = {row["dialogue"] for row in rows}
    first: dict[str, str] = {}  # dialogue -> another of its unit, up to the one that names the unit

    def name(dialogue: str) -> str:
        while dialogue in first:
            dialogue = first[dialogue]
        return dialogue

    for row in rows:
        if row["pair"] in present and name(row["dialogue"]) != name(row["pair"]):
            first[name(row["pair"])] = name(row["dialogue"])
    return [name(row["dialogue"]) for row in rows]


def groups(rows: list[dict], by: list[str]) -> list[tuple[dict, np.ndarray]]:
    """(group, which rows) for every group that occurs, in the taxonomy's order, then everything as group {}."""
    found: dict[tuple, list[int]] = {}
    for i, row in enumerate(rows):
        found.setdefault(tuple(row[facet] for facet in by), []).append(i)

    def place(values: tuple):
        return [_place(facet, value) for facet, value in zip(by, values)]

    made = [(dict(zip(by, values)), np.array(found[values])) for values in sorted(found, key=place)]
    return [*made, ({}, np.arange(len(rows)))]


def _place(facet: str, value: str | None) -> tuple:
    order = FACETS[facet]
    return (order.index(value) if value in order else len(order), value is None, value or "")


def scores(rows: list[dict], metric: str) -> np.ndarray:
    """(rows,) integers 0 and 1, or for `logprob` the right option's log-probability, mean over rotations."""
    if metric == "logprob":
        return np.array([option_means(row["orders"], row["logprobs"])[row["answer"]] for row in rows])
    return np.array([row[metric] for row in rows], dtype=np.int64)


# Tables before adjustment


@dataclass(frozen=True)
class Part:
    """Rows that are tested together, and what the flips of max-T act on."""

    rows: list[dict]
    names: list[str]  # of the units
    d: np.ndarray  # (units, rows)


def sums_over_units(values: np.ndarray, unit: list[str], members: list[np.ndarray]) -> tuple[list[str], ...]:
    """Names of the units, and (units, groups): the sum of each unit's values in each group, and their number."""
    names, index = np.unique(unit, return_inverse=True)
    d = [np.bincount(index[rows], values[rows], len(names)) for rows in members]
    n = [np.bincount(index[rows], minlength=len(names)) for rows in members]
    return names.tolist(), np.stack(d, 1).astype(values.dtype), np.stack(n, 1)


def title(group: dict) -> str:
    return " / ".join(value or "(none)" for value in group.values()) or "overall"


def described_only(by: list[str]) -> bool:
    """Subcategories hold too few probes each for a test."""
    return "subcategory" in by


def flip_p(d: np.ndarray, rng: np.random.Generator) -> tuple[list[float], list[float]]:
    """Sign-flip p-values of the columns of d, exact for integers, and their standard errors."""
    if np.issubdtype(d.dtype, np.integer):
        return [float(tests.sign_flip(column)) for column in d.T], [0.0] * d.shape[1]
    p, error = tests.random_flips(d, FLIPS, rng)
    return p.tolist(), error.tolist()


def interval(draws: np.ndarray, units: int) -> list[float] | None:
    """The middle 95 % of bootstrap draws; none for few units.

    The plain percentile interval: it needs no formula for contrasts, and held the truth in 94 to 95 % of simulated
    samples from 20 dialogues up (benchmarks/calibration.py).
    """
    return np.quantile(draws, [ALPHA / 2, 1 - ALPHA / 2]).tolist() if units >= FEWEST else None


def compare(
    a: list[dict], b: list[dict], by: list[str], metric: str, family: int, overall: bool, rng: np.random.Generator
) -> tuple[Part, list[Part]]:
    """Two runs on the same probes: the table (a row a group, the last over everything), and families of contrasts.

    a, b: rows of results, aligned; family: how many tests will be adjusted together; overall: the last row too.
    """
    x, y = scores(a, metric), scores(b, metric)
    made, langs = groups(a, by), groups(a, ["lang"])[:-1]
    names, d, n = sums_over_units(y - x, units(a), [rows for _, rows in made + langs])
    draws = tests.bootstrap(d, n, BOOTSTRAPS, rng)
    table = []
    for g, ((group, rows), p, error) in enumerate(zip(made, *flip_p(d[:, : len(made)], rng))):
        count = np.count_nonzero(n[:, g]).item()
        row = {"group": group, "probes": len(rows), "dialogues": len({a[i]["dialogue"] for i in rows}), "units": count}
        row |= {"acc_a": x[rows].mean().item(), "acc_b": y[rows].mean().item(), "diff": (y - x)[rows].mean().item()}
        row |= {"ci": interval(draws[:, g], count)}
        row |= {"p": p, "p_se": error, "p_adj": None}
        if group and described_only(by):
            row |= {"p": None, "p_se": None}
        row |= _size(x[rows], y[rows], d[:, g], n[:, g], family if group or overall else 1, metric)
        table.append(row)
    by_rows, by_langs = slice(0, len(made) - 1), slice(len(made), None)
    families = [(contrast_weights([group for group, _ in made[:-1]]), by_rows)]
    if by != ["lang"]:
        families.append((contrast_weights([group for group, _ in langs]), by_langs))
    parts = [_contrasts(w, names, d[:, part], n[:, part], draws[:, part], rng) for w, part in families if w]
    return Part(table, names, d[:, : len(made)]), parts


def _size(x: np.ndarray, y: np.ndarray, d: np.ndarray, n: np.ndarray, family: int, metric: str) -> dict:
    """Discordant probes, effect size, and the smallest difference that would be found, at alpha and alpha / rows."""
    least = tests.detectable_real if metric == "logprob" else tests.detectable
    at = {level: least(d, n, level) for level in (ALPHA, ALPHA / family)}
    at = {level: "unreachable" if math.isinf(value) else float(value) for level, value in at.items()}
    found = {"b_only": None, "a_only": None, "h": None}
    if metric != "logprob":
        found = {"b_only": int((y > x).sum()), "a_only": int((x > y).sum()), "h": tests.cohens_h(x.mean(), y.mean())}
    return found | {"mde": at[ALPHA], "mde_rows": at[ALPHA / family]}


def contrast_weights(found: list[dict]) -> dict[str, np.ndarray]:
    """Which groups' mean differences are set against which: name -> a weight a group.

    One facet: each group against the mean of the others; of two groups, the second against the first. A facet
    crossed with languages: within each of its groups, the second language against the first.
    """
    facets, m = list(found[0]), len(found)
    if described_only(facets) or m == 1:
        return {}
    if len(facets) == 1:
        labels = [title(group) for group in found]
        if m == 2:
            return {f"{labels[1]} minus {labels[0]}": np.array([-1.0, 1.0])}
        return {f"{name} minus the others": row for name, row in zip(labels, (m * np.eye(m) - 1) / (m - 1))}
    weights, first = {}, {}
    for j, group in enumerate(found if "lang" in facets else []):
        other = title({facet: value for facet, value in group.items() if facet != "lang"})
        i = first.setdefault(other, j)
        if i != j:
            weights[f"{other}: {group['lang']} minus {found[i]['lang']}"] = np.eye(m)[j] - np.eye(m)[i]
    return weights


def _contrasts(weights: dict, names: list[str], d, n, draws: np.ndarray, rng: np.random.Generator) -> Part:
    """The family of these contrasts. d, n: (units, groups); draws: (draws, groups), bootstrapped mean differences."""
    total, rows, parts = n.sum(0), [], []
    for name, weight in weights.items():
        used = np.flatnonzero(weight)
        z = (d / total) @ weight
        whole = None
        if np.issubdtype(d.dtype, np.integer):
            whole = tests.on_lattice(z, math.lcm(*total[used].tolist()) * max(1, len(total) - 1))
        (p,), (error,) = flip_p((z if whole is None else whole)[:, None], rng)
        fewest = np.count_nonzero(n, axis=0)[used].min().item()
        ci = interval(draws @ weight, fewest)
        row = {"contrast": name, "units": fewest, "diff": z.sum().item(), "ci": ci}
        rows.append(row | {"p": p, "p_se": error, "p_adj": None})
        parts.append(z)
    return Part(rows, names, np.stack(parts, 1))


def unpaired_rows(a: list[dict], b: list[dict], by: list[str], metric: str, rng: np.random.Generator) -> list[dict]:
    """Two different sets of probes: a row a group that both have, the last over everything.

    Where dialogues of b are the pairs of dialogues of a, "pairs" compares these by sign flips. The unpaired test of
    everything takes no account of them; that errs on the safe side, since members of a pair tend to be alike.
    """
    in_a, in_b = ({tuple(g.items()): rows for g, rows in groups(side, by)} for side in (a, b))
    table = []
    for key in in_a:
        if key not in in_b:
            continue
        x, y = [a[i] for i in in_a[key]], [b[i] for i in in_b[key]]
        row = {"group": dict(key), "pairs": linked_pairs(x, y, metric, rng)}
        table.append(row | _two_samples(x, y, metric, rng, describe=bool(key) and described_only(by)))
    return table


def _two_samples(a: list[dict], b: list[dict], metric: str, rng: np.random.Generator, describe: bool) -> dict:
    sides = []
    for rows in (a, b):
        _, d, n = sums_over_units(scores(rows, metric), units(rows), [np.arange(len(rows))])
        sides.append((d[:, 0], n[:, 0], tests.bootstrap(d, n, BOOTSTRAPS, rng)[:, 0]))
    (y_a, n_a, draws_a), (y_b, n_b, draws_b) = sides
    fewest = min(len(n_a), len(n_b))
    mean_a, mean_b = y_a.sum() / n_a.sum(), y_b.sum() / n_b.sum()
    row = {"probes_a": len(a), "probes_b": len(b), "units_a": len(n_a), "units_b": len(n_b), "units": fewest}
    row |= {"acc_a": float(mean_a), "acc_b": float(mean_b), "diff": float(mean_b - mean_a)}
    row |= {"ci": interval(draws_b - draws_a, fewest), "p": None, "p_se": None, "p_adj": None}
    row |= {"h": None if metric == "logprob" else tests.cohens_h(mean_a, mean_b), "mde": "unreachable"}
    if fewest >= 2:
        error = math.hypot(tests.ratio_mean(y_a, n_a)[1], tests.ratio_mean(y_b, n_b)[1])
        row["mde"] = tests.detectable_normal(error, ALPHA)
    if fewest >= 2 and not describe:
        is_b = np.arange(len(n_a) + len(n_b)) >= len(n_a)
        y, n = np.concatenate([y_a, y_b]), np.concatenate([n_a, n_b])
        row["p"], row["p_se"] = tests.exchange(y, n, is_b, EXCHANGES, rng)
    return row


def linked_pairs(a: list[dict], b: list[dict], metric: str, rng: np.random.Generator) -> dict | None:
    """The dialogues of a whose pair is in b: each pair's difference of mean scores, its sign flipped."""
    means_a, means_b = _dialogue_means(a, metric), _dialogue_means(b, metric)
    partner = {row["dialogue"]: row["pair"] for row in a}
    linked = [(x, partner[x]) for x in means_a if partner[x] in means_b]
    if not linked:
        return None
    z = np.array([means_b[y][0] - means_a[x][0] for x, y in linked])
    whole = None
    if metric != "logprob":
        whole = tests.on_lattice(z, math.lcm(*(side[1] for x, y in linked for side in (means_a[x], means_b[y]))))
    (p,), (error,) = flip_p((z if whole is None else whole)[:, None], rng)
    draws = tests.bootstrap(z[:, None], np.ones((len(z), 1)), BOOTSTRAPS, rng)[:, 0]
    return {"pairs": len(z), "diff": z.mean().item(), "ci": interval(draws, len(z)), "p": p, "p_se": error}


def _dialogue_means(rows: list[dict], metric: str) -> dict[str, tuple[float, int]]:
    """Dialogue -> (mean score of its probes, their number)."""
    names, d, n = sums_over_units(scores(rows, metric), [row["dialogue"] for row in rows], [np.arange(len(rows))])
    return {name: (total / count, int(count)) for name, total, count in zip(names, d[:, 0], n[:, 0])}


def chance_rows(rows: list[dict], by: list[str], metric: str, rng: np.random.Generator) -> list[dict]:
    """One run against chance: a row a group, the last over everything. p is one-sided."""
    x, chance = scores(rows, metric), np.array([1 / len(row["orders"][0]) for row in rows])
    made = groups(rows, by)
    _, d, n = sums_over_units(x, units(rows), [members for _, members in made])
    draws, table = tests.bootstrap(d, n, BOOTSTRAPS, rng), []
    for g, (group, members) in enumerate(made):
        count = np.count_nonzero(n[:, g]).item()
        row = {"group": group, "probes": len(members), "units": count, "acc": x[members].mean().item()}
        row |= {"ci": interval(draws[:, g], count), "chance": chance[members].mean().item()}
        describe = group and described_only(by)
        row |= {"p": None if describe else float(tests.above_chance(x[members], chance[members])), "p_adj": None}
        table.append(row)
    return table


# Many tests at once


def adjust(parts: list[Part], method: str, rng: np.random.Generator) -> None:
    """Write p_adj and its standard error into the rows of all parts, which are one family."""
    rows = [row for part in parts for row in part.rows]
    if not rows:
        return
    error = np.zeros(len(rows))
    if method == "maxt":
        adjusted, error = tests.max_t(_beside(parts), FLIPS, rng)
    else:
        correct = {"holm": tests.holm, "bh": tests.benjamini_hochberg}[method]
        adjusted = correct(np.array([row["p"] for row in rows]))
    for row, p, se in zip(rows, adjusted.tolist(), error.tolist()):
        row |= {"p_adj": p, "p_adj_se": se}


def _beside(parts: list[Part]) -> np.ndarray:
    """The parts' columns over the units of all: (units, rows). A unit that a part lacks adds nothing to its rows."""
    place = {name: i for i, name in enumerate(sorted({name for part in parts for name in part.names}))}
    columns = []
    for part in parts:
        whole = np.zeros((len(place), part.d.shape[1]), part.d.dtype)
        whole[[place[name] for name in part.names]] = part.d
        columns.append(whole)
    return np.hstack(columns)


VERDICTS = {  # by what only such a row has: where B is better, where it is worse
    "contrast": ("more", "less"),
    "units_a": ("higher", "lower"),
    "acc": ("above chance", "above chance"),
    "mde_rows": ("improves", "worsens"),
}


def judge(row: dict, metric: str) -> None:
    """Write the row's verdict; none where it is only described or has too few units."""
    p = row["p"] if row["p_adj"] is None else row["p_adj"]
    kind = next(key for key in VERDICTS if key in row)
    if p is None or row["units"] < FEWEST:
        row["verdict"] = None
    elif p <= ALPHA:
        row["verdict"] = VERDICTS[kind][row.get("diff", 1) < 0]
    elif kind == "acc":
        row["verdict"] = "not above chance"
    else:
        row["verdict"] = "no difference found" if measurable(row, metric) else "not measurable"


def measurable(row: dict, metric: str) -> bool:
    """Would a difference of medium size (Cohen's h = 0.5, 24 points around 50 %) have been found with 80 % power?"""
    mde = row.get("mde_rows", row.get("mde"))
    if mde is None or metric == "logprob":
        return True
    if mde == "unreachable":
        return False
    up, down = row["acc_a"] + mde, row["acc_a"] - mde
    sizes = [abs(tests.cohens_h(row["acc_a"], there)) for there in (up, down) if 0 <= there <= 1]
    return min(sizes, default=math.inf) <= MEDIUM


# Whole reports


def align(a: Run, b: Run) -> tuple[list[dict], list[dict], dict[str, list[str]]]:
    """The rows of the common probes, in one order, and what only one run has. InputError for one unit only."""
    ids, left = common([a, b])
    x, y = ([run.rows[id] for id in ids] for run in (a, b))
    if len(set(units(x))) < 2:
        raise InputError(
            f"{a.folder} and {b.folder}: the common probes are of one dialogue (or of one language pair) only\n"
            "Dialogues are what is exchanged: score more of them."
        )
    return x, y, left


def in_family(part: Part, overall: bool) -> Part:
    """The rows of a table that are adjusted: those that are tested, and the one over everything only if asked."""
    columns = [g for g, row in enumerate(part.rows) if row["p"] is not None and (row["group"] or overall)]
    return Part([part.rows[g] for g in columns], part.names, part.d[:, columns])


def compare_pairs(
    pairs: list[tuple[Run, Run]], by: list[str], metric: str, method: str, seed: int, overall: bool = False
) -> list[dict]:
    """Each pair's whole comparison, adjusted over the rows of all pairs; overall: the last rows are in the family."""
    rng = np.random.default_rng(seed)
    aligned = [align(a, b) for a, b in pairs]
    rows = [0 if described_only(by) else len(groups(x, by)) - 1 for x, _, _ in aligned]
    family = max(1, sum(rows) + overall * len(pairs))
    compared = [compare(x, y, by, metric, family, overall, rng) for x, y, _ in aligned]
    adjust([in_family(table, overall) for table, _ in compared], method, rng)
    reports = []
    for (a, b), (x, y, left), (table, contrasts) in zip(pairs, aligned, compared):
        for part in contrasts:
            adjust([part], method, rng)
        for row in [row for part in [table, *contrasts] for row in part.rows]:
            judge(row, metric)
        report = {"a": a.label, "b": b.label, "by": by, "metric": metric, "adjust": method, "alpha": ALPHA}
        report |= {"family": family, "seed": seed, "rows": table.rows}
        report |= {"contrasts": [row for part in contrasts for row in part.rows]}
        report |= {"only_a": left[a.label], "only_b": left[b.label], "ties": [count_ties(x), count_ties(y)]}
        reports.append(report | {"notes": settings_that_differ([a, b])})
    return reports


def compare_samples(a: Run, b: Run, by: list[str], metric: str, method: str, seed: int) -> dict:
    """Two runs on different probes, such as two languages."""
    rng = np.random.default_rng(seed)
    x, y = list(a.rows.values()), list(b.rows.values())
    if both := {row["dialogue"] for row in x} & {row["dialogue"] for row in y}:
        raise InputError(f"{a.folder} and {b.folder}: share {len(both)} dialogues; compare them without --unpaired")
    rows = unpaired_rows(x, y, by, metric, rng)
    _adjust_and_judge(rows, metric, method, rng)
    report = {"a": a.label, "b": b.label, "unpaired": True, "by": by, "metric": metric, "adjust": method}
    report |= {"alpha": ALPHA, "seed": seed, "rows": rows, "ties": [count_ties(x), count_ties(y)]}
    return report | {"notes": settings_that_differ([a, b])}


def against_chance(run: Run, by: list[str], metric: str, method: str, seed: int) -> dict:
    """One run against chance, and its languages against the first of them."""
    rng = np.random.default_rng(seed)
    rows = list(run.rows.values())
    table = chance_rows(rows, by, metric, rng)
    _adjust_and_judge(table, metric, method, rng)
    spoken = [(group["lang"], [rows[i] for i in members]) for group, members in groups(rows, ["lang"])[:-1]]
    languages = []
    for lang, there in spoken[1:]:
        (row,) = unpaired_rows(spoken[0][1], there, [], metric, rng)
        languages.append({"a": spoken[0][0], "b": lang} | row | {"group": {"lang": lang}})
    _adjust_and_judge(languages, metric, method, rng)
    report = {"run": run.label, "by": by, "metric": metric, "adjust": method, "alpha": ALPHA, "seed": seed}
    return report | {"rows": table, "languages": languages, "ties": count_ties(rows), "notes": []}


def _adjust_and_judge(rows: list[dict], metric: str, method: str, rng: np.random.Generator) -> None:
    adjust([Part([row for row in rows if row["group"] and row["p"] is not None], [], np.empty((0, 0)))], method, rng)
    for row in rows:
        judge(row, metric)


def leaderboard(runs: list[Run], by: list[str], metric: str, method: str, seed: int) -> dict:
    """Three runs or more on the probes that all have: accuracies with rank intervals, and every pair's comparison.

    A run's rank is at best one more than the number of runs that are significantly better, and at worst the number
    of runs less those significantly worse; the tests of all pairs and rows are one family, so that with Holm or
    max-T all intervals hold together with 95 % (Mogstad, Romano, Shaikh and Wilhelm 2024, Rev. Econ. Stud. 91).
    """
    ids, left = common(runs)
    runs = [replace(run, rows={id: run.rows[id] for id in ids}) for run in runs]
    means = {run.label: scores(list(run.rows.values()), metric).mean() for run in runs}
    runs.sort(key=lambda run: -means[run.label])
    pairs = [(weaker, stronger) for i, stronger in enumerate(runs) for weaker in runs[i + 1 :]]
    compared = compare_pairs(pairs, by, metric, method, seed, overall=True)
    labels, table = [run.label for run in runs], []
    for g, (group, members) in enumerate(groups(list(runs[0].rows.values()), by)):
        tested = [(report["a"], report["b"], report["rows"][g]) for report in compared]
        row = {"group": group, "probes": len(members), "units": tested[0][2]["units"]}
        row["acc"] = {run.label: scores(list(run.rows.values()), metric)[members].mean().item() for run in runs}
        judged = row["units"] >= FEWEST and tested[0][2]["p"] is not None
        table.append(row | {"rank": _ranks(labels, tested) if judged else None})
    equals = [
        r["a"] for r in compared if r["b"] == labels[0] and r["rows"][-1]["verdict"] not in ("improves", "worsens")
    ]
    report = {"runs": labels, "by": by, "metric": metric, "adjust": method, "alpha": ALPHA, "seed": seed}
    report |= {"family": compared[0]["family"], "rows": table, "strongest": labels[0], "not_told_apart": equals}
    report |= {"pairs": compared, "left_out": left, "notes": settings_that_differ(runs)}
    return report | {"ties": {run.label: count_ties(list(run.rows.values())) for run in runs}}


def _ranks(labels: list[str], tested: list[tuple[str, str, dict]]) -> dict[str, list[int]]:
    ranks = {label: [1, len(labels)] for label in labels}
    for a, b, row in tested:
        if row["verdict"] in ("improves", "worsens"):
            better, worse = (b, a) if row["diff"] > 0 else (a, b)
            ranks[worse][0] += 1
            ranks[better][1] -= 1
    return ranks
