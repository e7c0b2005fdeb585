"""The bench: dialogues, the probes that branch off them, and the checks that a file is what it says.

A bench file is JSON Lines, one dialogue a line (the schema is in data/README.md). A probe shows the turns
before `after` and asks a question with 2 to 26 options, one of which is right. Layers, skills and
subcategories are those of data/taxonomy.json; a bench of your own may name others.

    python -m eicap.bench check my.jsonl        everything that is wrong with a file, or what it holds
"""

import argparse
import hashlib
import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from eicap import InputError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Probe:
    id: str
    after: int  # how many turns the model has seen
    layer: str
    skill: str
    subcategory: str | None
    question: str
    options: tuple[str, ...]
    answer: int  # index into options
    depends_on: tuple[int, ...]  # the turns needed to answer


@dataclass(frozen=True)
class Dialogue:
    id: str
    lang: str
    culture: str | None
    topic: str | None
    pair: str | None  # the same situation in another language
    turns: tuple[tuple[str, str], ...]  # (role, content), role "user" or "assistant"
    probes: tuple[Probe, ...]


class _Fields:
    """An object of the file, read field by field. What is wrong with it is added to `problems`, and read as None."""

    def __init__(self, item: dict, where: str, problems: list[str]):
        self.item, self.where, self.problems = item, where, problems

    def wrong(self, what: str) -> None:
        self.problems.append(self.where + what)

    def text(self, name: str, text: str) -> None:
        """Note what is wrong with a text: neither empty, nor something that UTF-8 cannot write."""
        if not text.strip():
            self.wrong(f"{name} is empty")
        elif any("\ud800" <= character <= "\udfff" for character in text):  # JSON can write them
            self.wrong(f"{name} holds half a surrogate pair")

    def get(self, name: str, kind: type, optional: bool = False):
        value = self.item.get(name)
        if value is None and optional:
            return None
        if name not in self.item:
            self.wrong(f"{name} is missing")
        elif not isinstance(value, kind) or isinstance(value, bool):
            kinds = {str: "a string", int: "a whole number", list: "a list"}
            self.wrong(f"{name} is not {kinds[kind]}")
        else:
            if kind is str:
                self.text(name, value)
            return value

    def objects(self, name: str, label: str) -> list["_Fields"]:
        """A list of objects; where each is: its label and number, or its probe's id."""
        values = self.get(name, list)
        if values is None:
            return []
        if not values or not all(isinstance(value, dict) for value in values):
            self.wrong(f"{name} must be a list of one or more objects")
            return []
        names = [value.get("id", i) if label == "probe" else i for i, value in enumerate(values)]
        return [_Fields(value, f"{label} {i}: ", self.problems) for i, value in zip(names, values)]


def _turn(turn: _Fields) -> tuple[str, str]:
    role, content = turn.get("role", str), turn.get("content", str)
    if role and role not in ("user", "assistant"):
        turn.wrong("role is neither user nor assistant")
    return role, content


def _probe(probe: _Fields, turns: int) -> Probe:
    after, answer = probe.get("after", int), probe.get("answer", int)
    options, depends_on = probe.get("options", list), probe.get("depends_on", list, optional=True)
    if options is not None:
        if not 2 <= len(options) <= len(LETTERS):
            plural = "s" * (len(options) != 1)
            probe.wrong(f"{len(options)} option{plural}, where 2 to {len(LETTERS)} are expected")
        for i, option in enumerate(options):
            if not isinstance(option, str):
                probe.wrong(f"option {i} is not a string")
            elif option in options[:i]:
                probe.wrong(f"option {i} repeats option {options.index(option)}")
            else:
                probe.text(f"option {i}", option)
        if answer is not None and not 0 <= answer < len(options):
            probe.wrong(f"answer is {answer}, but there are {len(options)} options")
    if after is not None:
        if turns and not 1 <= after <= turns:
            probe.wrong(f"after is {after}, but the dialogue has {turns} turns")
        elif not all(type(turn) is int and 0 <= turn < after for turn in depends_on or []):
            probe.wrong(f"depends_on must name turns from 0 to {after - 1}")
    return Probe(
        id=probe.get("id", str),
        after=after,
        layer=probe.get("layer", str),
        skill=probe.get("skill", str),
        subcategory=probe.get("subcategory", str, optional=True),
        question=probe.get("question", str),
        options=tuple(options or ()),
        answer=answer,
        depends_on=tuple(depends_on or ()),
    )


def _parse(line: bytes) -> tuple[Dialogue | None, list[str]]:
    """One line of a bench file, and everything that is wrong with it."""
    try:
        item = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return None, [f"not UTF-8 (byte {error.start} of the line); save the file as UTF-8"]
    except json.JSONDecodeError as error:
        return None, [f"not valid JSON ({error})"]
    except RecursionError:
        return None, ["nested too deeply"]
    if not isinstance(item, dict):
        return None, ["a JSON object is expected"]
    problems = []
    fields = _Fields(item, "", problems)
    turns = [_turn(turn) for turn in fields.objects("turns", "turn")]
    dialogue = Dialogue(
        id=fields.get("id", str),
        lang=fields.get("lang", str),
        culture=fields.get("culture", str, optional=True),
        topic=fields.get("topic", str, optional=True),
        pair=fields.get("pair", str, optional=True),
        turns=tuple(turns),
        probes=tuple(_probe(probe, len(turns)) for probe in fields.objects("probes", "probe")),
    )
    return dialogue, problems


def _read(path: Path) -> tuple[list[Dialogue], list[str]]:
    """All dialogues of a file or folder, and everything that is wrong with it, by file and line."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path}: no *.jsonl file in this folder")
    dialogues, problems, seen = [], [], {}
    for file in files:
        try:
            lines = file.read_bytes().split(b"\n")
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({error.strerror}); give a bench file or folder") from None
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            dialogue, wrong = _parse(line)
            where = f"{file}, line {number}"
            if dialogue:
                dialogues.append(dialogue)
                for kind, id in [("dialogue", dialogue.id), *(("probe", probe.id) for probe in dialogue.probes)]:
                    if id and (kind, id) in seen:
                        wrong.append(f"{kind} id {id} is already used in {seen[kind, id]}")
                    seen.setdefault((kind, id), where)
            problems += [f"{where}: {what}" for what in wrong]
    if not dialogues and not problems:
        raise InputError(f"{path}: no dialogue in it")
    return dialogues, problems


def read(path: Path) -> list[Dialogue]:
    """All dialogues of a file, or of every *.jsonl file of a folder in the order of their names.

    Raises InputError with file and line for the first thing that is wrong.
    """
    dialogues, problems = _read(path)
    if problems:
        raise InputError(problems[0])
    return dialogues


def fingerprint(dialogues: list[Dialogue]) -> dict[str, str]:
    """sha256 of the dialogues of each language, whatever their order, files or JSON formatting."""
    digests = {}
    for lang in sorted({dialogue.lang for dialogue in dialogues}):
        mine = sorted(json.dumps(asdict(dialogue)) for dialogue in dialogues if dialogue.lang == lang)
        digests[lang] = hashlib.sha256("\n".join(mine).encode()).hexdigest()
    return digests


def check(path: Path) -> int:
    """Print everything that is wrong with a bench, or what it holds. Returns the exit status: 0 or 2."""
    try:
        dialogues, problems = _read(path)
    except InputError as error:
        print(error)
        return 2
    if problems:
        print(*problems, f"{path}: {len(problems)} problem{'s' * (len(problems) > 1)}", sep="\n")
        return 2
    probes = [probe for dialogue in dialogues for probe in dialogue.probes]
    print(f"{path}: {len(dialogues)} dialogues, {len(probes)} probes, nothing wrong")
    facets = {"lang": [dialogue.lang for dialogue in dialogues], "culture": [d.culture for d in dialogues]}
    facets |= {name: [getattr(probe, name) for probe in probes] for name in ("layer", "skill", "subcategory")}
    for name, values in facets.items():
        counts = Counter(value or "none" for value in values).most_common()
        print(f"  {name + ':':<13}" + ", ".join(f"{value} {count}" for value, count in counts))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m eicap.bench", description=__doc__.split("\n\n")[0])
    command = parser.add_subparsers(required=True, metavar="check").add_parser(
        "check",
        help="read a bench; print everything that is wrong with it, line by line (exit status 2), or what it holds",
    )
    command.add_argument("path", nargs="+", type=Path, help="a *.jsonl file, or a folder of them")
    return max(check(path) for path in parser.parse_args().path)


if __name__ == "__main__":
    sys.exit(main())
