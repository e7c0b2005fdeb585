"""The bench: dialogues, the probes that branch off them, and the checks that a file is what it says.

A bench file is JSON Lines, one dialogue a line (the schema is in data/README.md). A probe shows the turns
before `after` and asks a question with 2 to 26 options, one of which is right. Layers, skills and
subcategories are those of data/taxonomy.json; a bench of your own may name others.
"""

import hashlib
import json
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


class _Problem(ValueError):
    """What is wrong with one field."""


def _field(item: dict, name: str, kind: type, optional: bool = False):
    """item[name], checked: strings are not empty, optional ones may be missing or null."""
    value = item.get(name)
    if value is None and optional:
        return None
    if name not in item:
        raise _Problem(f"{name} is missing")
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = {str: "a string", int: "a whole number", list: "a list"}
        raise _Problem(f"{name} is not {kinds[kind]}")
    if kind is str:
        _check_text(name, value)
    return value


def _check_text(name: str, text: str) -> None:
    if not text.strip():
        raise _Problem(f"{name} is empty")
    if any("\ud800" <= character <= "\udfff" for character in text):  # JSON can write them, UTF-8 cannot
        raise _Problem(f"{name} holds half a surrogate pair")


def _objects(item: dict, name: str) -> list[dict]:
    values = _field(item, name, list)
    if not values or not all(isinstance(value, dict) for value in values):
        raise _Problem(f"{name} must be a list of one or more objects")
    return values


def _probe(item: dict, turns: int) -> Probe:
    after, answer = _field(item, "after", int), _field(item, "answer", int)
    options = _field(item, "options", list)
    if not 2 <= len(options) <= len(LETTERS):
        raise _Problem(f"{len(options)} option{'s' * (len(options) != 1)}, where 2 to {len(LETTERS)} are expected")
    for i, option in enumerate(options):
        if not isinstance(option, str):
            raise _Problem(f"option {i} is not a string")
        _check_text(f"option {i}", option)
    if not 1 <= after <= turns:
        raise _Problem(f"after is {after}, but the dialogue has {turns} turns")
    if not 0 <= answer < len(options):
        raise _Problem(f"answer is {answer}, but there are {len(options)} options")
    depends_on = _field(item, "depends_on", list, optional=True) or []
    if not all(type(turn) is int and 0 <= turn < after for turn in depends_on):
        raise _Problem(f"depends_on must name turns from 0 to {after - 1}")
    return Probe(
        id=_field(item, "id", str),
        after=after,
        layer=_field(item, "layer", str),
        skill=_field(item, "skill", str),
        subcategory=_field(item, "subcategory", str, optional=True),
        question=_field(item, "question", str),
        options=tuple(options),
        answer=answer,
        depends_on=tuple(depends_on),
    )


def parse(line: str) -> Dialogue:
    """One line of a bench file. Raises ValueError that says which field is wrong."""
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise _Problem(f"not valid JSON ({error})") from None
    except RecursionError:
        raise _Problem("nested too deeply") from None
    if not isinstance(item, dict):
        raise _Problem("a JSON object is expected")
    turns = []
    for i, turn in enumerate(_objects(item, "turns")):
        try:
            turns.append((_field(turn, "role", str), _field(turn, "content", str)))
            if turns[-1][0] not in ("user", "assistant"):
                raise _Problem("role is neither user nor assistant")
        except _Problem as problem:
            raise _Problem(f"turn {i}: {problem}") from None
    probes = []
    for i, probe in enumerate(_objects(item, "probes")):
        try:
            probes.append(_probe(probe, len(turns)))
        except _Problem as problem:
            raise _Problem(f"probe {probe.get('id', i)}: {problem}") from None
    return Dialogue(
        id=_field(item, "id", str),
        lang=_field(item, "lang", str),
        culture=_field(item, "culture", str, optional=True),
        topic=_field(item, "topic", str, optional=True),
        pair=_field(item, "pair", str, optional=True),
        turns=tuple(turns),
        probes=tuple(probes),
    )


def read(path: Path) -> list[Dialogue]:
    """All dialogues of a file, or of every *.jsonl file of a folder in the order of their names.

    Raises InputError with file and line for the first thing that is wrong.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path}: no *.jsonl file in this folder")
    dialogues, seen = [], {}
    for file in files:
        for number, line in enumerate(_lines(file), start=1):
            if not line.strip():
                continue
            try:
                dialogue = parse(line)
            except ValueError as problem:
                raise InputError(f"{file}, line {number}: {problem}") from None
            for id in (("dialogue", dialogue.id), *(("probe", probe.id) for probe in dialogue.probes)):
                if id in seen:
                    raise InputError(f"{file}, line {number}: {id[0]} id {id[1]} is already used in {seen[id]}")
                seen[id] = f"{file}, line {number}"
            dialogues.append(dialogue)
    if not dialogues:
        raise InputError(f"{path}: no dialogue in it")
    return dialogues


def _lines(file: Path) -> list[str]:
    try:
        return file.read_bytes().decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise InputError(f"{file}, line {line}: not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); give a bench file or folder") from None


def fingerprint(dialogues: list[Dialogue]) -> dict[str, str]:
    """sha256 of the dialogues of each language, whatever their order, files or JSON formatting."""
    digests = {}
    for lang in sorted({dialogue.lang for dialogue in dialogues}):
        mine = sorted(json.dumps(asdict(dialogue)) for dialogue in dialogues if dialogue.lang == lang)
        digests[lang] = hashlib.sha256("\n".join(mine).encode()).hexdigest()
    return digests
