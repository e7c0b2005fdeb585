"""The right answer of every probe, drawn by lot.

A skeleton holds, for each probe, its question and four options that could all be true. Only then is it drawn which of
them is right and in which order they stand; the dialogue is written after that, to make it so. So nothing in a question
and its options can say which option is right, whoever reads them: they were there before it was decided.

The lots: over a layer's hundred probes, the right option is the longest, second, third, shortest 25 times each, and
stands in each place 25 times. Lots are fixed by language and probe id; a probe that was replaced keeps its place and
gets a new rank.

    python draw.py skeletons.jsonl drawn.jsonl
"""

import argparse
import hashlib
import json
import random
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
AGAIN = {"en-050-2": 1, "en-070-1": 1}  # probes that were written anew after a draw, and how often


@cache
def lots(lang: str, purpose: str) -> dict[str, int]:
    """For each probe id of a language a number from 0 to 3, each 25 times a layer."""
    probes = [probe for row in json.loads((HERE / f"plan-{lang}.json").read_text()) for probe in row["probes"]]
    drawn = {}
    for layer in sorted({probe["layer"] for probe in probes}):
        ids = [probe["id"] for probe in probes if probe["layer"] == layer]
        numbers = [i % 4 for i in range(len(ids))]
        random.Random(f"{lang} {layer} {purpose}").shuffle(numbers)
        drawn |= dict(zip(ids, numbers))
    return drawn


def seed(id: str) -> str:
    return hashlib.sha256(f"{id} {AGAIN.get(id, 0)}".encode()).hexdigest()


def rank(id: str) -> int:
    """Which option by length is right: 0 the longest, 3 the shortest."""
    return random.Random(seed(id)).randrange(4) if id in AGAIN else lots(id[:2], "rank")[id]


def draw(probe: dict) -> dict:
    """The probe with its options in their final order and `answer`, the index of the right one."""
    place = lots(probe["id"][:2], "place")[probe["id"]]
    by_length = sorted(probe["options"], key=len, reverse=True)
    if len({len(option) for option in by_length}) < 4:
        raise SystemExit(f"{probe['id']}: options of equal length; change one by a character or two")
    if len(by_length[0]) > 1.35 * len(by_length[3]):
        lengths = [len(option) for option in by_length]
        raise SystemExit(f"{probe['id']}: lengths {lengths}: the longest may be 1.35 x the shortest")
    right = by_length.pop(rank(probe["id"]))
    random.Random(seed(probe["id"])).shuffle(by_length)
    by_length.insert(place, right)
    labels = {k: [probe[k][probe["options"].index(o)] for o in by_length] for k in ("strategies",) if k in probe}
    return {**probe, "options": by_length, **labels, "answer": place}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("skeletons", type=Path)
    parser.add_argument("drawn", type=Path)
    args = parser.parse_args()
    output = []
    for line in args.skeletons.read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        output.append(json.dumps({**item, "probes": [draw(probe) for probe in item["probes"]]}, ensure_ascii=False))
    args.drawn.write_text("\n".join(output) + "\n", encoding="utf-8")
    print(f"{args.drawn}: {len(output)} dialogues")
