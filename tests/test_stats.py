"""The command as users meet it: which tests it makes of two run folders, what it says, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from scipy import stats as scipy_stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

import stats
from eicap import comparison, permutation, results, tables

LAYERS = ["foundational", "dimensional", "appraisal", "value", "social"]
IDENTITY = {"bench": {"en": "e" * 64, "ar": "a" * 64}, "format": "chat", "rotations": "all", "score": "letter"}


def make_row(dialogue: str, place: int, correct: bool, logprob: float = -0.5, pair: str | None = None) -> dict:
    answer = place % 4
    pred = answer if correct else (answer + 1) % 4
    scores = [-3.0, -3.1, -3.2, -3.3]
    scores[pred] = logprob
    return {
        "id": f"{dialogue}-{place}",
        "dialogue": dialogue,
        "lang": dialogue[:2],
        "culture": "gulf" if dialogue[:2] == "ar" else None,
        "layer": LAYERS[place % 5],
        "skill": ["tracking", "cause"][place % 2],
        "subcategory": f"sub-{place % 3}",
        "pair": pair,
        "answer": answer,
        "orders": [[0, 1, 2, 3]],
        "logprobs": [scores],
        "pred_plain": pred,
        "pred": pred,
        "correct_plain": correct,
        "correct": correct,
    }


def make_rows(seed: int, dialogues: int = 40, probes: int = 5, arabic: int = 0, paired: int = 0, lift=()) -> list[dict]:
    """Random answers; lift: {layer: probability to be right}. The first `paired` Arabic dialogues have a pair."""
    rng, rows = np.random.default_rng(seed), []
    for lang, other, count in (("en", "ar", dialogues), ("ar", "en", arabic)):
        for k in range(count):
            for place in range(probes):
                right = rng.random() < dict(lift).get(LAYERS[place % 5], 0.5)
                pair = f"{other}-{k:03d}" if k < paired else None
                rows.append(make_row(f"{lang}-{k:03d}", place, bool(right), -rng.random(), pair))
    return rows


def write_run(folder: Path, rows: list[dict], finished: bool = True, **identity) -> Path:
    """A run folder as evaluate.py leaves it."""
    folder.mkdir(parents=True)
    results.Part(folder, 0).append(rows)
    run = {"command": ["evaluate.py", "--ckpt", "some model"], "identity": IDENTITY | identity, "finished": finished}
    results.write_json(folder / "run.json", run)
    dialogues = dict.fromkeys(row["dialogue"] for row in rows)
    if finished:
        results.merge(folder, [(d, [row["id"] for row in rows if row["dialogue"] == d]) for d in dialogues])
    return folder


@pytest.fixture
def pair(tmp_path) -> list[Path]:
    """Two runs on 120 English and 60 Arabic dialogues, 40 of them language pairs; B is far better at appraisal."""
    a = make_rows(1, 120, arabic=60, paired=40)
    b = make_rows(2, 120, arabic=60, paired=40, lift={"appraisal": 0.85})
    return [write_run(tmp_path / "base", a), write_run(tmp_path / "tuned", b)]


def run(*arguments) -> int:
    return stats.main([str(argument) for argument in arguments])


def report(capsys, tmp_path, *arguments) -> tuple[dict, str]:
    """What --json wrote, and what the terminal showed."""
    assert run(*arguments, "--json", tmp_path / "out.json") == 0
    return json.loads((tmp_path / "out.json").read_text(encoding="utf-8")), capsys.readouterr().out


def refused(capsys, *arguments) -> str:
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("stats.py: ") and 1 <= len(error.splitlines()) <= 2 and "Traceback" not in error
    return error


def rows_of(folder: Path) -> list[dict]:
    return results.read_rows(folder / "probes.jsonl")


# Two runs


def test_the_paired_table_is_what_it_says(pair, capsys, tmp_path):
    found, text = report(capsys, tmp_path, *pair)
    assert [row["group"] for row in found["rows"]] == [*({"layer": layer} for layer in LAYERS), {}]
    a, b = rows_of(pair[0]), rows_of(pair[1])
    for row in found["rows"]:
        mine = [(x, y) for x, y in zip(a, b) if row["group"].get("layer", x["layer"]) == x["layer"]]
        unit = {}
        for x, y in mine:  # en-017 and ar-017 are one unit where both are there and linked
            name = x["dialogue"][3:] if x["pair"] else x["dialogue"]
            unit[name] = unit.get(name, 0) + int(y["correct"]) - int(x["correct"])
        theirs = scipy_stats.permutation_test(
            (list(unit.values()),), np.sum, permutation_type="samples", n_resamples=20_000, rng=1, vectorized=True
        ).pvalue
        assert row["p"] == pytest.approx(theirs, abs=0.015) and row["p_se"] == 0
        assert row["units"] == len(unit) == 140
        assert row["probes"] == len(mine) and row["dialogues"] == 180
        assert row["acc_a"] == pytest.approx(np.mean([x["correct"] for x, _ in mine]))
        assert row["acc_b"] == pytest.approx(np.mean([y["correct"] for _, y in mine]))
        assert row["diff"] == pytest.approx(row["acc_b"] - row["acc_a"])
        assert row["b_only"] - row["a_only"] == round(row["diff"] * len(mine))
        assert row["ci"][0] < row["diff"] < row["ci"][1] and 0 < row["mde"] <= row["mde_rows"] < 1
        assert (row["mde"] == row["mde_rows"]) == (not row["group"])  # the last row stands by itself
    verdicts = {row["group"].get("layer"): row["verdict"] for row in found["rows"]}
    assert verdicts["appraisal"] == "improves" and verdicts["value"] == "no difference found"
    assert "improves" in text and "●" in text and "another training seed" in text


def test_one_probe_a_dialogue_is_mcnemar_from_the_command_too(capsys, tmp_path):
    a, b = make_rows(1, 150, probes=1), make_rows(2, 150, probes=1)
    found, _ = report(capsys, tmp_path, write_run(tmp_path / "a", a), write_run(tmp_path / "b", b))
    x, y = (np.array([row["correct"] for row in rows]) for rows in (a, b))
    table = [[(x & y).sum(), (x & ~y).sum()], [(~x & y).sum(), (~x & ~y).sum()]]
    assert found["rows"][-1]["p"] == pytest.approx(mcnemar(table, exact=True).pvalue, abs=1e-12)


@pytest.mark.parametrize("method, theirs", [("holm", "holm"), ("bh", "fdr_bh")])
def test_adjustment_is_over_the_layers_and_equals_statsmodels(pair, capsys, tmp_path, method, theirs):
    found, _ = report(capsys, tmp_path, *pair, "--adjust", method)
    layers, overall = found["rows"][:-1], found["rows"][-1]
    expected = multipletests([row["p"] for row in layers], method=theirs)[1]
    assert [row["p_adj"] for row in layers] == pytest.approx(expected.tolist(), abs=1e-12)
    assert overall["p_adj"] is None and found["family"] == 5


def test_max_t_is_between_p_and_holm(pair, capsys, tmp_path):
    found, _ = report(capsys, tmp_path, *pair, "--adjust", "maxt")
    holm, _ = report(capsys, tmp_path, *pair)
    for row, other in zip(found["rows"][:-1], holm["rows"][:-1]):
        assert row["p"] - 0.01 <= row["p_adj"] <= other["p_adj"] + 0.01 and row["p_adj_se"] < 0.002


def test_only_the_changed_layer_stands_out_in_the_contrasts(pair, capsys, tmp_path):
    found, _ = report(capsys, tmp_path, *pair)
    contrasts = {row["contrast"]: row for row in found["contrasts"]}
    diffs = {row["group"]["layer"]: row["diff"] for row in found["rows"][:-1]}
    for layer in LAYERS:
        others = np.mean([diffs[other] for other in LAYERS if other != layer])
        assert contrasts[f"{layer} minus the others"]["diff"] == pytest.approx(diffs[layer] - others)
    assert contrasts["appraisal minus the others"]["verdict"] == "more"
    assert contrasts["ar minus en"]["verdict"] == "no difference found"
    by_lang, _ = report(capsys, tmp_path, *pair, "--by", "lang")
    en, ar = by_lang["rows"][:2]
    assert (en["group"], ar["group"]) == ({"lang": "en"}, {"lang": "ar"})
    assert contrasts["ar minus en"]["diff"] == pytest.approx(ar["diff"] - en["diff"])
    assert [row["contrast"] for row in by_lang["contrasts"]] == ["ar minus en"]


def exactly(d) -> float:
    """scipy's p-value by full enumeration."""
    return scipy_stats.permutation_test((d,), np.sum, permutation_type="samples", n_resamples=2 ** len(d)).pvalue


def test_a_contrast_of_rows_of_unequal_size_equals_enumeration(tmp_path, capsys):
    keep = [i for i in range(11 * 5) if i not in (2, 7, 14, 19)]
    a, b = ([make_rows(seed, 11)[i] for i in keep] for seed in (1, 2))
    found, _ = report(capsys, tmp_path, write_run(tmp_path / "a", a), write_run(tmp_path / "b", b))
    sizes = {layer: sum(row["layer"] == layer for row in a) for layer in LAYERS}
    for layer, contrast in zip(LAYERS, found["contrasts"]):
        z = {}
        for x, y in zip(a, b):
            weight = (1 if x["layer"] == layer else -0.25) / sizes[x["layer"]]
            z[x["dialogue"]] = z.get(x["dialogue"], 0) + weight * (int(y["correct"]) - int(x["correct"]))
        whole = np.rint(np.array(list(z.values())) * 4 * 11 * 9)  # sizes are 11 and 9
        assert contrast["p"] == pytest.approx(exactly(whole), abs=1e-12) and contrast["p_se"] == 0


def test_crossing_with_languages_contrasts_them_layer_by_layer(pair, capsys, tmp_path):
    found, text = report(capsys, tmp_path, *pair, "--by", "layer,lang")
    assert len(found["rows"]) == 11 and found["rows"][1]["group"] == {"layer": "foundational", "lang": "ar"}
    diffs = {(row["group"].get("layer"), row["group"].get("lang")): row["diff"] for row in found["rows"]}
    contrasts = {row["contrast"]: row["diff"] for row in found["contrasts"]}
    assert contrasts["value: ar minus en"] == pytest.approx(diffs["value", "ar"] - diffs["value", "en"])
    assert "value / ar" in text


@pytest.mark.parametrize("facet, count", [("skill", 2), ("culture", 2), ("lang", 2), ("skill,culture", 4)])
def test_other_facets(pair, capsys, tmp_path, facet, count):
    found, text = report(capsys, tmp_path, *pair, "--by", facet)
    assert len(found["rows"]) == count + 1 and found["by"] == facet.split(",")
    assert "(none)" in text or "culture" not in facet


def test_subcategories_are_described_only(pair, capsys, tmp_path):
    found, text = report(capsys, tmp_path, *pair, "--by", "subcategory")
    assert all(row["p"] is None and row["p_adj"] is None and row["verdict"] is None for row in found["rows"][:-1])
    assert found["rows"][-1]["p"] is not None and "described only" in text
    assert [row["contrast"] for row in found["contrasts"]] == ["ar minus en"]


def test_plain_and_rotated_correctness_are_different_metrics(tmp_path, capsys):
    a, b = make_rows(1), make_rows(2)
    for row in b:  # the choice survives no rotation: wrong as written, right on average
        row |= {"pred_plain": (row["answer"] + 2) % 4, "correct_plain": False}
    folders = [write_run(tmp_path / "a", a), write_run(tmp_path / "b", b)]
    plain, _ = report(capsys, tmp_path, *folders, "--metric", "correct_plain")
    rotated, _ = report(capsys, tmp_path, *folders)
    assert plain["rows"][-1]["acc_b"] == 0 and rotated["rows"][-1]["acc_b"] > 0.4


def test_log_probability_is_tested_by_random_flips(pair, capsys, tmp_path):
    found, text = report(capsys, tmp_path, *pair, "--metric", "logprob")
    a, b = rows_of(pair[0]), rows_of(pair[1])
    right = [[row["logprobs"][0][row["answer"]] for row in rows] for rows in (a, b)]
    row = found["rows"][-1]
    assert (row["acc_a"], row["acc_b"]) == pytest.approx(tuple(np.mean(right, axis=1)))
    assert 0 < row["p_se"] < 0.002 and row["h"] is None and row["b_only"] is None
    again, _ = report(capsys, tmp_path, *pair, "--metric", "logprob")
    other, _ = report(capsys, tmp_path, *pair, "--metric", "logprob", "--seed", "5")
    assert found == again and other["rows"][-1]["p"] != row["p"]
    assert "random flips" in text


def test_log_probability_is_averaged_over_the_rotations():
    row = make_row("en-000", 1, True) | {
        "orders": [[0, 1, 2], [1, 2, 0]],
        "logprobs": [[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]],
    }
    assert comparison.scores([row], "logprob").tolist() == [-3.0]  # option 1: -2 at place 1, then -4 at place 0


def test_no_difference_at_all_is_p_one_and_no_error(tmp_path, capsys):
    rows = make_rows(1, 80)
    found, text = report(capsys, tmp_path, write_run(tmp_path / "a", rows), write_run(tmp_path / "b", rows))
    for row in found["rows"] + found["contrasts"]:
        assert row["p"] == 1 and row["diff"] == 0 and row["verdict"] == "no difference found"
    assert "no difference found" in text
    same, _ = report(capsys, tmp_path, tmp_path / "a", tmp_path / "a", "--adjust", "maxt")
    assert all(row["p_adj"] == 1 for row in same["rows"][:-1])


def test_few_units_have_no_interval_and_no_verdict(tmp_path, capsys):
    for units, judged in ((19, False), (20, True)):
        a, b = make_rows(1, units), make_rows(2, units, lift=dict.fromkeys(LAYERS, 1.0))
        folders = [write_run(tmp_path / f"a{units}", a), write_run(tmp_path / f"b{units}", b)]
        found, text = report(capsys, tmp_path, *folders)
        assert all((row["ci"] is not None) == judged == (row["verdict"] is not None) for row in found["rows"])
        assert found["rows"][-1]["p"] < 0.01 and text.splitlines()[9].endswith("under 20 units") != judged


def test_a_small_sample_is_called_not_measurable(tmp_path, capsys):
    folders = [write_run(tmp_path / name, make_rows(seed, 22)) for seed, name in ((1, "a"), (2, "b"))]
    found, _ = report(capsys, tmp_path, *folders)
    assert {row["verdict"] for row in found["rows"][:-1]} == {"not measurable"}
    assert all(row["mde_rows"] > 0.2 for row in found["rows"][:-1])


def test_medium_sized_changes_decide_what_is_measurable():
    row = {"acc_a": 0.5, "mde_rows": 0.23}
    assert comparison.measurable(row, "correct") and not comparison.measurable(row | {"mde_rows": 0.25}, "correct")
    assert not comparison.measurable(row | {"mde_rows": "unreachable"}, "correct")
    assert not comparison.measurable({"acc_a": 0.5, "mde_rows": 0.6}, "correct")  # beyond 0 and 100 %


def test_what_only_one_run_has_is_counted_and_named(tmp_path, capsys):
    rows = make_rows(1)
    a, b = write_run(tmp_path / "a", rows[:100]), write_run(tmp_path / "b", rows[50:])
    found, text = report(capsys, tmp_path, a, b)
    assert found["only_a"] == [row["id"] for row in rows[:50]] and found["only_b"] == [row["id"] for row in rows[100:]]
    assert found["rows"][-1]["probes"] == 50
    assert (
        "only in a: 50 probes: en-000-0, en-000-1, en-000-2, en-000-3, en-000-4, ..." in text
        and "(45 more: --json)" in text
        and "only in b: 100 probes" in text
    )


def test_ties_are_counted_and_reported(tmp_path, capsys):
    rows, tied = make_rows(1), make_rows(1)
    for row in tied[:7]:
        row |= {"logprobs": [[-1.0] * 4], "pred": 0, "pred_plain": 0}
        row |= {"correct": row["answer"] == 0, "correct_plain": row["answer"] == 0}
    found, text = report(capsys, tmp_path, write_run(tmp_path / "a", rows), write_run(tmp_path / "b", tied))
    assert found["ties"] == [0, 7] and "b 7" in text


def test_other_settings_are_warned_of_in_the_footer(tmp_path, capsys):
    a = write_run(tmp_path / "a", make_rows(1))
    b = write_run(tmp_path / "b", make_rows(2), format="plain", rotations="1")
    found, text = report(capsys, tmp_path, a, b)
    assert len(found["notes"]) == 2 and "differ in format too: a: chat, b: plain" in text and "rotations" in text


def test_the_order_of_the_rows_does_not_matter(pair, capsys, tmp_path):
    rows = rows_of(pair[1])
    shuffled = write_run(
        tmp_path / "other" / "tuned", [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    )
    straight, _ = report(capsys, tmp_path, *pair)
    mixed, _ = report(capsys, tmp_path, pair[0], shuffled)
    assert straight == mixed


def test_units_are_linked_dialogues_where_both_are_here():
    rows = [
        make_row(d, 0, True, pair=p) for d, p in (("en-0", "ar-0"), ("ar-0", "en-0"), ("en-1", "ar-1"), ("en-2", None))
    ]
    names = comparison.units(rows)
    assert names[0] == names[1] and len(set(names)) == 3
    one_way = [
        make_row("en-0", 0, True, pair="ar-0"),
        make_row("ar-0", 0, True),
        make_row("fr-0", 0, True, pair="ar-0"),
    ]
    assert len(set(comparison.units(one_way))) == 1 == len(set(comparison.units(one_way[::-1])))


# One run, other probes, many runs


def test_one_run_is_tested_against_chance(pair, capsys, tmp_path):
    found, text = report(capsys, tmp_path, pair[1])
    rows = rows_of(pair[1])
    for row in found["rows"]:
        mine = [r["correct"] for r in rows if row["group"].get("layer", r["layer"]) == r["layer"]]
        expected = scipy_stats.binomtest(sum(mine), len(mine), 0.25, alternative="greater").pvalue
        assert row["p"] == pytest.approx(expected, abs=1e-12) and row["chance"] == 0.25
        assert row["verdict"] == "above chance" and row["ci"][0] < row["acc"] < row["ci"][1]
    assert "above chance" in text


def test_languages_of_a_run_are_compared_on_pairs_first_then_on_everything(pair, capsys, tmp_path):
    found, text = report(capsys, tmp_path, pair[0])
    (row,) = found["languages"]
    rows = rows_of(pair[0])
    right = {}
    for r in rows:
        right[r["dialogue"]] = right.get(r["dialogue"], 0) + r["correct"]
    d = [right[f"ar-{k:03d}"] - right[f"en-{k:03d}"] for k in range(40)]
    theirs = scipy_stats.permutation_test(
        (d,), np.sum, permutation_type="samples", n_resamples=50_000, rng=1, vectorized=True
    ).pvalue
    assert row["pairs"]["pairs"] == 40 and row["pairs"]["p"] == pytest.approx(theirs, abs=0.01)
    assert row["pairs"]["p_se"] == 0 and row["pairs"]["diff"] == pytest.approx(np.mean(d) / 5)
    assert (row["a"], row["b"], row["units_a"], row["units_b"]) == ("en", "ar", 120, 60)
    assert 0 < row["p"] <= 1 and row["p_se"] > 0 and "pairs only" in text


def test_pairs_of_unequal_length_weigh_each_dialogues_mean():
    rng = np.random.default_rng(3)
    a, b, means = [], [], []
    for k in range(10):
        right = rng.random(2 + k % 2) < 0.4, rng.random(3) < 0.7
        a += [make_row(f"en-{k}", i, bool(hit), pair=f"ar-{k}") for i, hit in enumerate(right[0])]
        b += [make_row(f"ar-{k}", i, bool(hit), pair=f"en-{k}") for i, hit in enumerate(right[1])]
        means.append(right[1].mean() - right[0].mean())
    found = comparison.linked_pairs(a, b, "correct", np.random.default_rng(0))
    assert found["diff"] == pytest.approx(np.mean(means)) and found["pairs"] == 10
    assert found["p"] == pytest.approx(exactly(np.rint(6 * np.array(means))), abs=1e-12)


def test_runs_on_other_probes_are_compared_unpaired(tmp_path, capsys):
    a = write_run(tmp_path / "a", make_rows(1, 60))
    b = write_run(tmp_path / "b", make_rows(2, 0, arabic=50, paired=30, lift=dict.fromkeys(LAYERS, 0.8)))
    found, text = report(capsys, tmp_path, "--unpaired", a, b)
    overall = found["rows"][-1]
    assert overall["verdict"] == "higher" and (overall["units_a"], overall["units_b"]) == (60, 50)
    assert overall["p"] < 0.001 and 0 < overall["mde"] < 0.2 and overall["pairs"] is None
    expected = multipletests([row["p"] for row in found["rows"][:-1]], method="holm")[1]
    assert [row["p_adj"] for row in found["rows"][:-1]] == pytest.approx(expected.tolist())
    assert "studentised" in text


def test_three_runs_make_a_leaderboard(tmp_path, capsys):
    chances = {"worst": 0.3, "middle": 0.55, "twin": 0.56, "best": 0.95}
    folders = [
        write_run(tmp_path / name, make_rows(seed, 60, lift=dict.fromkeys(LAYERS, p)))
        for seed, (name, p) in enumerate(chances.items())
    ]
    found, text = report(capsys, tmp_path, *folders)
    overall = found["rows"][-1]
    assert found["runs"][0] == "best" and found["runs"][-1] == "worst" and found["strongest"] == "best"
    assert overall["rank"] == {"best": [1, 1], "middle": [2, 3], "twin": [2, 3], "worst": [4, 4]}
    assert found["not_told_apart"] == [] and "strongest: best, and better than every other run" in text
    assert found["family"] == 6 * 6 and len(found["pairs"]) == 6
    every = [row for pair in found["pairs"] for row in pair["rows"]]
    expected = multipletests([row["p"] for row in every], method="holm")[1]
    assert [row["p_adj"] for row in every] == pytest.approx(expected.tolist(), abs=1e-12)


def test_a_leaderboard_of_equals_names_no_winner(tmp_path, capsys):
    rows = make_rows(1)
    folders = [write_run(tmp_path / name, rows[: 200 - 5 * i]) for i, name in enumerate("abc")]
    found, text = report(capsys, tmp_path, *folders, "--adjust", "maxt")
    assert set(map(tuple, found["rows"][-1]["rank"].values())) == {(1, 3)} and len(found["not_told_apart"]) == 2
    assert "not told apart from" in text and found["rows"][-1]["probes"] == 190
    assert "only in a: 10 probes" in text


def test_pairs_side_by_side_share_one_family(pair, capsys, tmp_path):
    third = write_run(tmp_path / "third", make_rows(7, 120, arabic=60, paired=40))
    found, text = report(capsys, tmp_path, "--pairs", *pair, pair[0], third, "--by", "layer,lang")
    assert [(p["a"], p["b"]) for p in found["pairs"]] == [("base", "tuned"), ("base", "third")]
    every = [row for p in found["pairs"] for row in p["rows"][:-1]]
    expected = multipletests([row["p"] for row in every], method="holm")[1]
    assert [row["p_adj"] for row in every] == pytest.approx(expected.tolist(), abs=1e-12)
    header, *lines = text.split("\n\n")[1].splitlines()
    assert header.split() == ["B", "-", "A", "1", "en", "1", "ar", "2", "en", "2", "ar"]
    appraisal = next(line for line in lines if line.startswith("appraisal"))
    assert appraisal.count("*") == 2 and appraisal.index("*") < len(appraisal) / 2  # the first pair, both languages


# What is refused


def test_a_folder_without_results(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    a = write_run(tmp_path / "a", make_rows(1))
    assert "no results here" in refused(capsys, tmp_path / "empty", a)
    assert "no results here" in refused(capsys, a, tmp_path / "nowhere")
    assert "cannot be read" in refused(capsys, a, a / "probes.jsonl")
    (a / "probes.jsonl").unlink()
    assert "no row of results" in refused(capsys, a)


def test_an_unfinished_run_says_how_to_complete_it(tmp_path, capsys):
    a = write_run(tmp_path / "a", make_rows(1, 40))
    b = write_run(tmp_path / "b", make_rows(2, 30), finished=False)
    with open(b / "part-0.jsonl", "a") as part:
        part.write('{"id": "en-030-0", "dial')  # killed while it wrote
    error = refused(capsys, a, b)
    assert "unfinished" in error and "python evaluate.py --ckpt 'some model'" in error
    before = sorted((path.name, path.read_bytes()) for path in b.iterdir())
    found, text = report(capsys, tmp_path, a, b, "--partial")
    assert found["unfinished"] == ["b"] and "unfinished" in text and found["rows"][-1]["probes"] == 150
    assert before == sorted((path.name, path.read_bytes()) for path in b.iterdir())


def test_no_common_probes(tmp_path, capsys):
    a, b = write_run(tmp_path / "a", make_rows(1)), write_run(tmp_path / "b", make_rows(2, 0, arabic=20))
    assert "no probe in common" in refused(capsys, a, b)


def test_other_contents_under_the_same_ids(tmp_path, capsys):
    a = write_run(tmp_path / "a", make_rows(1))
    b = write_run(tmp_path / "b", make_rows(2), bench={"en": "f" * 64, "ar": "a" * 64})
    assert "other bench contents" in refused(capsys, a, b) and "other bench contents" in refused(capsys, a, a, b)
    c = write_run(tmp_path / "c", make_rows(2), bench={"en": "e" * 64, "ar": "f" * 64})  # Arabic is not compared
    assert run(a, c) == 0


@pytest.mark.parametrize("field, value", [("answer", 3), ("layer", "social"), ("pair", "ar-009"), ("dialogue", "en-1")])
def test_a_probe_that_is_not_the_same_in_both(tmp_path, capsys, field, value):
    rows = make_rows(2)
    rows[1] |= {field: value}
    rows[1] |= {"correct": rows[1]["pred"] == rows[1]["answer"], "correct_plain": rows[1]["pred"] == rows[1]["answer"]}
    error = refused(capsys, write_run(tmp_path / "a", make_rows(1)), write_run(tmp_path / "b", rows))
    assert rows[1]["id"] in error and field in error


def test_one_dialogue_only(tmp_path, capsys):
    folders = [write_run(tmp_path / name, make_rows(seed, 1)) for seed, name in ((1, "a"), (2, "b"))]
    assert "one dialogue" in refused(capsys, *folders)


GARBLED = {
    "not json": lambda row: "{oops",
    "a number": lambda row: "3",
    "no id": lambda row: json.dumps({k: v for k, v in row.items() if k != "id"}),
    "no answer": lambda row: json.dumps({k: v for k, v in row.items() if k != "answer"}),
    "no layer": lambda row: json.dumps({k: v for k, v in row.items() if k != "layer"}),
    "wrong correct": lambda row: json.dumps(row | {"correct": not row["correct"]}),
    "correct as text": lambda row: json.dumps(row | {"correct": "yes"}),
    "not a number": lambda row: json.dumps(row | {"logprobs": [[float("nan")] * 4]}),
    "too few logprobs": lambda row: json.dumps(row | {"logprobs": [[-1.0, -2.0]]}),
    "no orders": lambda row: json.dumps(row | {"orders": [], "logprobs": []}),
    "an order that is none": lambda row: json.dumps(row | {"orders": [[0, 0, 1, 2]]}),
    "answer beyond the options": lambda row: json.dumps(row | {"answer": 4}),
    "a number too large": lambda row: json.dumps(row | {"logprobs": [[-(10**400), -1, -2, -3]]}),
    "culture as a list": lambda row: json.dumps(row | {"culture": ["gulf"]}),
}


@pytest.mark.parametrize("kind", GARBLED)
def test_a_garbled_row_is_named_by_file_and_line(tmp_path, capsys, kind):
    a, b = (write_run(tmp_path / name, make_rows(1)) for name in "ab")
    lines = (b / "probes.jsonl").read_text(encoding="utf-8").splitlines()
    lines[6] = GARBLED[kind](json.loads(lines[6]))
    (b / "probes.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert f"{b / 'probes.jsonl'}, line 7" in refused(capsys, a, b)


def test_a_cut_or_repeated_row_is_an_error(tmp_path, capsys):
    a, b = (write_run(tmp_path / name, make_rows(1)) for name in "ab")
    whole = (b / "probes.jsonl").read_bytes()
    (b / "probes.jsonl").write_bytes(whole[:-30])
    assert "line 200: the line is cut" in refused(capsys, a, b)
    (b / "probes.jsonl").write_bytes(whole + whole.splitlines(keepends=True)[0])
    assert "line 201" in refused(capsys, a, b)


@pytest.mark.parametrize("text", ["{", "[]", '{"identity": 3}', '{"identity": {"bench": 3}, "finished": true}'])
def test_a_garbled_run_json(tmp_path, capsys, text):
    a = write_run(tmp_path / "a", make_rows(1))
    (a / "run.json").write_text(text)
    assert "run.json" in refused(capsys, a)


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["a", "b", "c", "--pairs"], "two by two"),
        (["a", "b", "c", "--unpaired"], "two runs"),
        (["a", "b", "--unpaired"], "share 40 dialogues"),
        (["a", "--adjust", "maxt"], "same probes"),
        (["a", "--metric", "logprob"], "no chance level"),
        (["a", "b", "c", "--plot", "x.png"], "--pairs"),
        (["a", "b", "--json", "no/such/folder/x.json"], "cannot be written"),
        (["a", "text", "--metric", "logprob"], "letter"),
    ],
)
def test_a_wrong_argument_is_a_clear_error(tmp_path, capsys, monkeypatch, arguments, word):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("abc"):
        write_run(Path(name), make_rows(seed))
    write_run(Path("text"), make_rows(4), score="text")
    assert word in refused(capsys, *arguments)


@pytest.mark.parametrize("facets", ["colour", "layer,layer", "layer,lang,skill", ""])
def test_an_unknown_facet_or_seed_is_refused(facets, capsys):
    with pytest.raises(SystemExit):
        run("a", "b", "--seed", "-1")
    assert "0 or more" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        run("a", "b", "--by", facets)
    assert stopped.value.code == 2 and "layer" in capsys.readouterr().err


# The terminal and the picture


def test_bars_show_sign_and_interval():
    assert tables.scale([{"diff": 0.10, "ci": [0.05, 0.15]}]) == 0.2
    assert tables.bar({"diff": 0.10, "ci": [0.05, 0.15]}, 0.2) == "          │ ───●───  "
    assert tables.bar({"diff": -0.12, "ci": [-0.24, 0.06]}, 0.3) == "  ────●───┼──        "
    assert tables.bar({"diff": 0.0, "ci": None}, 0.1) == " " * 10 + "●" + " " * 10


def test_small_p_values_are_not_written_as_zero():
    assert [tables.p_value(p) for p in (None, 0.0, 9e-5, 1e-4, 0.4)] == ["", "<0.0001", "<0.0001", "0.0001", "0.4000"]


def test_the_plot_is_drawn_where_matplotlib_is_there(pair, tmp_path, monkeypatch, capsys):
    assert run("--pairs", *pair, pair[0], pair[0], "--plot", tmp_path / "out.png") == 0
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"
    assert "cannot be written" in refused(capsys, *pair, "--plot", tmp_path / "no" / "out.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    capsys.readouterr()
    assert "pip install matplotlib" in refused(capsys, *pair, "--plot", tmp_path / "other.png")


def test_stats_starts_without_torch_and_permutation_with_numpy_alone():
    script = (
        "import sys, stats; print(sorted({'torch', 'scipy', 'matplotlib', 'tokenizers', 'tqdm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n"
    source = Path(permutation.__file__).read_text(encoding="utf-8")
    imported = {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imported == {"math", "collections", "statistics", "numpy"}


def test_the_process_ends_with_status_and_without_traceback(pair):
    command = [sys.executable, "stats.py"]
    done = subprocess.run([*command, *pair], capture_output=True, cwd=ROOT, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and b"appraisal" in done.stdout
    done = subprocess.run([*command, "nowhere"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_help_teaches():
    done = subprocess.run([sys.executable, "stats.py", "--help"], capture_output=True, text=True, cwd=ROOT)
    for word in ("--by", "--metric", "--adjust", "--pairs", "--unpaired", "--partial", "--seed", "--json", "--plot",
                 "improves", "worsens", "no difference found", "not measurable"):  # fmt: skip
        assert word in done.stdout
