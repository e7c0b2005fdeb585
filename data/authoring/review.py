"""Blind readings of the bench: sheets for the readers, and what they found.

    python data/authoring/review.py sheets a en OUT     a sheet a reader: text to read, and where the answers go
    python data/authoring/review.py collect OUT final   add their answers to data/review/LANG.csv, as pass "final"
    python data/authoring/review.py figures             agreement per language, layer and skill; kappa

Readings: a, the dialogue up to the question; b, question and options alone; c, the last two turns, for probes that
depend on earlier ones. No sheet holds two probes of one dialogue, and a reader gets one sheet. Answers are JSON Lines
beside the sheet: {"id": …, "answer": "A" … "D"}, and in reading a also "subcategory", the reader's own.
"""

import argparse
import csv
import hashlib
import json
import random
from collections import Counter, defaultdict
from pathlib import Path

DATA = Path(__file__).parent.parent
SIZE = {"a": 25, "b": 50, "c": 30}  # probes a sheet, at the most
COLUMNS = ["probe", "pass", "reading", "reader", "answer", "agreed", "subcategory", "digest"]


def probes(lang: str) -> dict[str, tuple[dict, dict]]:
    """id: (dialogue, probe) of a language."""
    lines = (DATA / "bench" / f"{lang}.jsonl").read_text(encoding="utf-8").splitlines()
    return {probe["id"]: (dialogue, probe) for dialogue in map(json.loads, lines) for probe in dialogue["probes"]}


def reaches_back(probe: dict) -> bool:
    """Whether it needs a turn before the last two that it is shown."""
    return min(probe["depends_on"]) < probe["after"] - 2


def deal(items: list[tuple[dict, dict]], size: int, rng: random.Random) -> list[list[tuple[dict, dict]]]:
    """Items in batches of about `size`, no two of one dialogue in a batch."""
    by_dialogue = defaultdict(list)
    for dialogue, probe in items:
        by_dialogue[dialogue["id"]].append((dialogue, probe))
    for mine in by_dialogue.values():
        rng.shuffle(mine)
    batches = []
    order = sorted(by_dialogue)
    rng.shuffle(order)
    for item in (item for id in sorted(order, key=lambda id: -len(by_dialogue[id])) for item in by_dialogue[id]):
        free = [
            batch
            for batch in batches
            if len(batch) < size and all(dialogue["id"] != item[0]["id"] for dialogue, _ in batch)
        ]
        (min(free, key=len) if free else batches.append([]) or batches[-1]).append(item)
    for batch in batches:
        rng.shuffle(batch)
    return batches


def sheet(reading: str, batch: list[tuple[dict, dict]]) -> str:
    lines = []
    for dialogue, probe in batch:
        after = probe["after"]
        shown = {"a": dialogue["turns"][:after], "b": [], "c": dialogue["turns"][after - 2 : after]}[reading]
        lines += [f"=== {probe['id']}", *(["[earlier turns are not shown]"] if reading == "c" else [])]
        lines += [f"{turn['role'].upper()}: {turn['content']}" for turn in shown]
        lines += ["", f"QUESTION: {probe['question']}"]
        lines += [f"  {letter}. {option}" for letter, option in zip("ABCD", probe["options"])] + [""]
    return "\n".join(lines)


def digest(reading: str, dialogue: dict, probe: dict) -> str:
    """Of what this reading shows of a probe, so that an answer is known to be to this very wording."""
    return hashlib.sha256(sheet(reading, [(dialogue, probe)]).encode()).hexdigest()[:12]


def write_sheets(reading: str, lang: str, out: Path) -> None:
    items = [item for item in probes(lang).values() if reading != "c" or reaches_back(item[1])]
    out.mkdir(parents=True, exist_ok=True)
    for number, batch in enumerate(deal(items, SIZE[reading], random.Random(f"{reading} {lang} {out.name}")), start=1):
        path = out / f"{lang}-{reading}-{number:02d}.sheet.txt"
        path.write_text(sheet(reading, batch), encoding="utf-8")
        print(path, len(batch))


def collect(out: Path, which: str) -> None:
    for lang in ("en", "ar"):
        known, path = probes(lang), DATA / "review" / f"{lang}.csv"
        rows = list(csv.DictReader(path.open(encoding="utf-8"))) if path.is_file() else []
        rows = [row for row in rows if row["pass"] != which]
        for file in sorted(out.glob(f"{lang}-?-*.answers.jsonl")):
            reader = file.name.split(".")[0]
            for answer in map(json.loads, filter(None, file.read_text(encoding="utf-8").splitlines())):
                dialogue, probe = known[answer["id"]]
                letter = answer["answer"]
                values = [probe["id"], which, reader[3], reader, letter, int("ABCD".index(letter) == probe["answer"])]
                values += [answer.get("subcategory", ""), digest(reader[3], dialogue, probe)]
                rows.append(dict(zip(COLUMNS, values)))
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(
                sorted(rows, key=lambda row: [row[name] for name in ("pass", "reading", "probe", "reader")])
            )


def kappa(pairs: list[tuple[str, str]]) -> float:
    """Cohen 1960: agreement of two raters over what chance would give."""
    left, right = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    agreed = sum(a == b for a, b in pairs) / len(pairs)
    chance = sum(left[name] * right[name] for name in left) / len(pairs) ** 2
    return (agreed - chance) / (1 - chance)


def figures(lang: str, which: str) -> dict:
    """{reading: {"all" or a layer or a skill: (agreed, of)}, "kappa": …} of a pass."""
    known, found, subcategories = probes(lang), defaultdict(lambda: defaultdict(lambda: [0, 0])), []
    for row in csv.DictReader((DATA / "review" / f"{lang}.csv").open(encoding="utf-8")):
        if row["pass"] == which:
            _, probe = known[row["probe"]]
            for facet in ("all", f"layer {probe['layer']}", f"skill {probe['skill']}"):
                found[row["reading"]][facet][0] += int(row["agreed"])
                found[row["reading"]][facet][1] += 1
            if row["subcategory"]:
                subcategories.append((probe["subcategory"], row["subcategory"]))
    return {**{reading: dict(facets) for reading, facets in found.items()}, "kappa": kappa(subcategories)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("sheets")
    add.add_argument("reading", choices=SIZE)
    add.add_argument("lang", choices=["en", "ar"])
    add.add_argument("out", type=Path)
    add = commands.add_parser("collect")
    add.add_argument("out", type=Path)
    add.add_argument("pass_", metavar="PASS")
    commands.add_parser("figures")
    args = parser.parse_args()
    if args.command == "sheets":
        write_sheets(args.reading, args.lang, args.out)
    elif args.command == "collect":
        collect(args.out, args.pass_)
    else:
        for lang in ("en", "ar"):
            rows = csv.DictReader((DATA / "review" / f"{lang}.csv").open(encoding="utf-8"))
            for which in sorted({row["pass"] for row in rows}):
                found = figures(lang, which)
                print(f"{lang}, {which} pass: kappa of the subcategory {found.pop('kappa'):.2f}")
                for reading, facets in sorted(found.items()):
                    shares = [f"{name} {a / n:.1%} of {n}" for name, (a, n) in sorted(facets.items())]
                    print(f"  {reading}: " + ", ".join(shares))


if __name__ == "__main__":
    main()
