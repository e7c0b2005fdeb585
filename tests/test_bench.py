"""Reading a bench: what is accepted, and that everything else is an error with file and line."""

import json
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace

import pytest
from conftest import ROOT

from eicap import InputError, bench


def item(name: str = "d1") -> dict:
    return {
        "id": name,
        "lang": "en",
        "culture": "gulf",
        "topic": "work",
        "pair": None,
        "turns": [
            {"role": "user", "content": "They gave Nadia my desk."},
            {"role": "assistant", "content": "Since when?"},
            {"role": "user", "content": "Monday. Nobody said a word."},
        ],
        "probes": [
            {
                "id": f"{name}-{n}",
                "after": after,
                "layer": "value",
                "skill": "cause",
                "subcategory": "need",
                "question": "What is missing?",
                "options": ["a word", "a desk", "a Monday", "a raise"],
                "answer": 1,
                "depends_on": [0],
            }
            for n, after in [(1, 1), (2, 3)]
        ],
    }


def write(path, *items, **dumps):
    path.write_text("".join(json.dumps(item, **dumps) + "\n" for item in items), encoding="utf-8")
    return path


def put(item: dict, where: str, value) -> dict:
    """A copy of item with the field at a path such as probes.0.answer set, or removed where value is None."""
    item = deepcopy(item)
    *path, last = [int(key) if key.isdigit() else key for key in where.split(".")]
    inner = item
    for key in path:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return item


REQUIRED = ["id", "lang", "turns", "probes", "turns.0.role", "turns.0.content"]
REQUIRED += [f"probes.0.{name}" for name in ("id", "after", "layer", "skill", "question", "options", "answer")]
WRONG = [
    ("probes.0.answer", 4, "answer is 4, but there are 4 options"),
    ("probes.0.answer", -1, "answer is -1"),
    ("probes.0.answer", "B", "answer is not a whole number"),
    ("probes.0.answer", True, "answer is not a whole number"),
    ("probes.0.after", 4, "after is 4, but the dialogue has 3 turns"),
    ("probes.0.after", 0, "after is 0"),
    ("probes.0.options", ["only"], "1 option, where 2 to 26 are expected"),
    ("probes.0.options", [f"option {n}" for n in range(27)], "27 options, where 2 to 26 are expected"),
    ("probes.0.options", ["a", 2], "option 1 is not a string"),
    ("probes.0.options", ["a", " "], "option 1 is empty"),
    ("probes.0.options", "abcd", "options is not a list"),
    ("probes.0.question", "", "question is empty"),
    ("probes.0.id", "", "id is empty"),
    ("probes.0.layer", "", "layer is empty"),
    ("probes.0.skill", " ", "skill is empty"),
    ("id", "", "id is empty"),
    ("lang", "", "lang is empty"),
    ("turns.1.content", "\n", "turn 1: content is empty"),
    ("turns.1.content", "half \ud83d", "turn 1: content holds half a surrogate pair"),
    ("probes.0.question", "half \ude00", "question holds half a surrogate pair"),
    ("probes.0.options.2", "\udc00", "option 2 holds half a surrogate pair"),
    ("probes.0.options", ["a", "b", "a"], "option 2 repeats option 0"),
    ("turns.1.role", "system", "turn 1: role is neither user nor assistant"),
    ("turns", [], "turns must be a list of one or more objects"),
    ("turns", ["hello"], "turns must be a list of one or more objects"),
    ("probes", [], "probes must be a list of one or more objects"),
    ("probes.0.depends_on", [1], "depends_on must name turns from 0 to 0"),  # probe 0 sees one turn
    ("probes.1.depends_on", [-1], "depends_on must name turns from 0 to 2"),
    ("probes.1.depends_on", ["0"], "depends_on must name turns from 0 to 2"),
]


def test_reads_every_field(tmp_path):
    dialogue = bench.read(write(tmp_path / "b.jsonl", item()))[0]
    assert (dialogue.id, dialogue.lang, dialogue.culture, dialogue.topic, dialogue.pair) == (
        "d1", "en", "gulf", "work", None,
    )  # fmt: skip
    assert dialogue.turns[1] == ("assistant", "Since when?")
    assert dialogue.probes[1] == bench.Probe(
        id="d1-2",
        after=3,
        layer="value",
        skill="cause",
        subcategory="need",
        question="What is missing?",
        options=("a word", "a desk", "a Monday", "a raise"),
        answer=1,
        depends_on=(0,),
    )


@pytest.mark.parametrize("name", ["culture", "topic", "pair", "probes.0.subcategory", "probes.0.depends_on"])
def test_optional_field_may_be_left_out(tmp_path, name):
    assert len(bench.read(write(tmp_path / "b.jsonl", put(item(), name, None)))) == 1


@pytest.mark.parametrize("options", [2, 26])
def test_two_to_26_options_are_read(tmp_path, options):
    wide = put(item(), "probes.0.options", [f"option {n}" for n in range(options)])
    assert len(bench.read(write(tmp_path / "b.jsonl", wide))[0].probes[0].options) == options


def test_folder_is_read_in_the_order_of_its_names(tmp_path):
    write(tmp_path / "b.jsonl", item("d1"))
    write(tmp_path / "a.jsonl", item("d3"), item("d2"))
    (tmp_path / "notes.txt").write_text("not a bench")
    assert [dialogue.id for dialogue in bench.read(tmp_path)] == ["d3", "d2", "d1"]


@pytest.mark.parametrize("name", REQUIRED)
def test_missing_field_is_an_error_with_file_and_line(tmp_path, name):
    path = write(tmp_path / "b.jsonl", item("d1"), put(item("d2"), name, None))
    with pytest.raises(InputError) as error:
        bench.read(path)
    assert f"{path}, line 2: " in str(error.value)
    assert str(error.value).endswith(f"{name.split('.')[-1]} is missing")


@pytest.mark.parametrize(("name", "value", "words"), WRONG)
def test_wrong_value_is_an_error_with_file_and_line(tmp_path, name, value, words):
    path = write(tmp_path / "b.jsonl", item("d1"), put(item("d2"), name, value))
    with pytest.raises(InputError) as error:
        bench.read(path)
    assert f"{path}, line 2: " in str(error.value)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"id": "caf\xe9"}', "not UTF-8"),
        (b'{"id": "d2",', "not valid JSON"),
        (b"[1, 2]", "a JSON object is expected"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_line_that_cannot_be_decoded_is_an_error_with_file_and_line(tmp_path, line, words):
    path = write(tmp_path / "b.jsonl", item("d1"))
    path.write_bytes(path.read_bytes() + b"\n" + line + b"\n")
    with pytest.raises(InputError) as error:
        bench.read(path)
    assert f"{path}, line 3: " in str(error.value)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (item("d1"), "dialogue id d1 is already used"),
        (put(item("d2"), "probes.0.id", "d1-2"), "probe id d1-2 is already used"),
    ],
)
def test_id_used_twice_is_an_error_that_names_both_places(tmp_path, second, words):
    one = write(tmp_path / "one.jsonl", item("d0"), item("d1"), second)
    with pytest.raises(InputError) as error:
        bench.read(one)
    assert str(error.value) == f"{one}, line 3: {words} in {one}, line 2"

    folder = tmp_path / "folder"
    folder.mkdir()
    a, b = write(folder / "a.jsonl", item("d0"), item("d1")), write(folder / "b.jsonl", second)
    with pytest.raises(InputError) as error:
        bench.read(folder)
    assert str(error.value) == f"{b}, line 1: {words} in {a}, line 2"


def test_probe_id_used_twice_in_one_dialogue_is_an_error(tmp_path):
    path = write(tmp_path / "b.jsonl", put(item(), "probes.1.id", "d1-1"))
    with pytest.raises(InputError, match="line 1: probe id d1-1 is already used"):
        bench.read(path)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_file_without_a_dialogue_is_an_error_that_names_it(tmp_path, content):
    path = tmp_path / "b.jsonl"
    path.write_text(content)
    with pytest.raises(InputError) as error:
        bench.read(path)
    assert str(error.value) == f"{path}: no dialogue in it"


def test_folder_without_a_bench_and_missing_file_are_errors_that_name_them(tmp_path):
    (tmp_path / "bench.json").write_text(json.dumps(item()))
    with pytest.raises(InputError) as error:
        bench.read(tmp_path)
    assert str(error.value) == f"{tmp_path}: no *.jsonl file in this folder"
    with pytest.raises(InputError) as error:
        bench.read(tmp_path / "none.jsonl")
    assert str(error.value).startswith(f"{tmp_path / 'none.jsonl'}: cannot be read (No such file or directory)")


def check(*paths) -> tuple[int, list[str]]:
    """The command in a process of its own: exit status, and what it printed."""
    command = [sys.executable, "-m", "eicap.bench", "check", *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def test_check_reports_everything_that_is_wrong_with_file_and_line(tmp_path):
    path = tmp_path / "b.jsonl"
    lines = [json.dumps(item("d0")).encode()]
    for number, (name, value, _) in enumerate(WRONG, start=2):
        lines.append(json.dumps(put(item(f"d{number}"), name, value)).encode())
    lines += [b'{"id": "caf\xe9"}', b'{"id": "d2",', b"[1]", json.dumps(item("d0")).encode()]
    path.write_bytes(b"\n".join(lines) + b"\n")
    status, printed = check(path)
    assert status == 2
    for number, (_, _, words) in enumerate(WRONG, start=2):
        assert any(line.startswith(f"{path}, line {number}: ") and words in line for line in printed), (number, words)
    last = len(WRONG) + 2
    for number, words in zip(range(last, last + 3), ("not UTF-8", "not valid JSON", "a JSON object is expected")):
        assert any(line.startswith(f"{path}, line {number}: {words}") for line in printed), words
    twice = [line for line in printed if line.startswith(f"{path}, line {last + 3}: ")]
    assert len(twice) == 3 and all(f"is already used in {path}, line 1" in line for line in twice)
    assert printed[-1] == f"{path}: {len(printed) - 1} problems"


def test_check_finds_several_problems_in_one_line(tmp_path):
    bad = put(put(put(item(), "probes.0.answer", 7), "probes.0.after", 9), "probes.1.question", "")
    bad = put(put(bad, "lang", None), "turns.2.role", "narrator")
    path = write(tmp_path / "b.jsonl", bad)
    status, printed = check(path)
    assert status == 2
    assert sorted(line.removeprefix(f"{path}, line 1: ") for line in printed[:-1]) == [
        "lang is missing",
        "probe d1-1: after is 9, but the dialogue has 3 turns",
        "probe d1-1: answer is 7, but there are 4 options",
        "probe d1-2: question is empty",
        "turn 2: role is neither user nor assistant",
    ]


def test_check_says_what_a_sound_file_holds_and_looks_at_every_path(tmp_path):
    sound = write(tmp_path / "b.jsonl", item("d1"), item("d2"))
    status, printed = check(sound)
    assert status == 0
    assert printed[0] == f"{sound}: 2 dialogues, 4 probes, nothing wrong"
    assert "  layer:       value 4" in printed
    status, printed = check(sound, tmp_path / "none.jsonl")
    assert status == 2
    assert printed[-1].startswith(f"{tmp_path / 'none.jsonl'}: cannot be read")


def test_fingerprint_does_not_depend_on_order_files_or_json_formatting(tmp_path):
    first, second, arabic = item("d1"), put(item("d2"), "topic", "été"), put(item("d3"), "lang", "ar")
    one = write(tmp_path / "one.jsonl", first, second, arabic)
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "a.jsonl", arabic, ensure_ascii=False)
    write(folder / "b.jsonl", second, first, ensure_ascii=False, sort_keys=True, separators=(" ,", " : "))
    prints = bench.fingerprint(bench.read(one))
    assert prints == bench.fingerprint(bench.read(folder))
    assert list(prints) == ["ar", "en"]
    assert all(len(digest) == 64 for digest in prints.values())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("id", "d9"),
        ("culture", "iraqi"),
        ("topic", "money"),
        ("pair", "d7"),
        ("turns.1.role", "user"),
        ("turns.1.content", "Since when? "),
        ("turns.2", None),
        ("probes.0.id", "d9-9"),
        ("probes.0.after", 2),
        ("probes.0.layer", "social"),
        ("probes.0.skill", "response"),
        ("probes.0.subcategory", "self_worth"),
        ("probes.0.question", "what is missing?"),
        ("probes.0.options", ["a desk", "a word", "a Monday", "a raise"]),
        ("probes.0.options.3", None),
        ("probes.0.answer", 2),
        ("probes.0.depends_on", []),
        ("probes.1", None),
    ],
)
def test_fingerprint_changes_with_any_content_and_only_in_its_language(tmp_path, name, value):
    changed = put(put(item(), "probes.1.after", 2), name, value)  # so that turn 2 can go
    arabic = put(item("d3"), "lang", "ar")
    before = bench.read(write(tmp_path / "a.jsonl", put(item(), "probes.1.after", 2), arabic))
    after = bench.read(write(tmp_path / "b.jsonl", changed, arabic))
    assert bench.fingerprint(before)["en"] != bench.fingerprint(after)["en"]
    assert bench.fingerprint(before)["ar"] == bench.fingerprint(after)["ar"]


def test_fingerprint_is_filed_under_the_language(tmp_path):
    (dialogue,) = bench.read(write(tmp_path / "b.jsonl", item()))
    assert list(bench.fingerprint([replace(dialogue, lang="sw")])) == ["sw"]
