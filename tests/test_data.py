"""The rules that every file of data/bench keeps, so that its numbers mean what they say."""

import json
import re
import unicodedata
from collections import Counter
from statistics import mean

import draw
import plan as planned
import pytest
import shortcuts
from conftest import BENCH, ROOT
from sklearn.feature_extraction.text import CountVectorizer

from eicap import bench

AUTHORING = ROOT / "data" / "authoring"

TAXONOMY = json.loads((ROOT / "data" / "taxonomy.json").read_text(encoding="utf-8"))
FILES = sorted(BENCH.glob("*.jsonl"))
QUOTAS = planned.SKILLS  # percent of a layer's probes
SCRIPTS = {"ar": "ARABIC", "en": "LATIN"}
DIALOGUE_KEYS = {"id", "lang", "culture", "topic", "pair", "turns", "probes"}
PROBE_KEYS = {"id", "after", "layer", "skill", "subcategory", "question", "options", "answer", "depends_on"}


def all_probes(dialogues):
    return [probe for dialogue in dialogues for probe in dialogue.probes]


def texts(dialogue):
    yield from (content for _, content in dialogue.turns)
    for probe in dialogue.probes:
        yield from (probe.question, *probe.options)


def near_duplicates(texts: list[str], limit: float) -> list[tuple[int, int]]:
    """Pairs whose sets of character 5-grams have a Jaccard similarity over the limit."""
    flat = [re.sub(r"\W+", " ", shortcuts.plain(text)) for text in texts]
    grams = CountVectorizer(analyzer="char", ngram_range=(5, 5), binary=True, dtype="int32").fit_transform(flat)
    sizes = grams.sum(axis=1).A1
    shared = (grams @ grams.T).tocoo()
    return [
        (i, j)
        for i, j, n in zip(shared.row, shared.col, shared.data)
        if i < j and n > limit * (sizes[i] + sizes[j] - n)
    ]


@pytest.fixture(scope="module", params=FILES, ids=lambda file: file.name)
def file(request):
    return request.param


@pytest.fixture(scope="module")
def dialogues(file):
    return bench.read(file)


@pytest.fixture(scope="module")
def whole_bench():
    return bench.read(BENCH)


@pytest.fixture
def enough(dialogues):
    """Skips what a small file cannot show."""
    count = len(all_probes(dialogues))
    if count < shortcuts.ENOUGH:
        pytest.skip(f"{count} probes, judged from {shortcuts.ENOUGH} up")


def test_taxonomy_has_the_five_layers_four_skills_and_24_subcategories():
    assert set(TAXONOMY["layers"]) == set(QUOTAS)
    assert set(TAXONOMY["skills"]) == {"tracking", "cause", "appraisal", "response"}
    assert len(TAXONOMY["subcategories"]) == 24
    assert {entry["layer"] for entry in TAXONOMY["subcategories"].values()} == set(QUOTAS)


def test_lines_have_exactly_the_keys_of_the_schema(file):
    for line in file.read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        assert item.keys() == DIALOGUE_KEYS, item["id"]
        assert all(turn.keys() == {"role", "content"} for turn in item["turns"]), item["id"]
        assert all(probe.keys() == PROBE_KEYS for probe in item["probes"]), item["id"]


def test_texts_have_no_space_around_or_doubled(dialogues):
    for dialogue in dialogues:
        for text in texts(dialogue):
            assert text == " ".join(text.split()), dialogue.id


def test_file_holds_the_language_it_is_named_for(file, dialogues):
    assert {dialogue.lang for dialogue in dialogues} == {file.stem}


def test_ids_are_unique_over_all_files(whole_bench):
    ids = [dialogue.id for dialogue in whole_bench] + [probe.id for probe in all_probes(whole_bench)]
    assert len(ids) == len(set(ids))


def test_texts_are_in_the_script_of_their_language(dialogues):
    for dialogue in dialogues:
        for text in texts(dialogue):
            letters = [letter for letter in text if letter.isalpha()]
            foreign = [x for x in letters if not unicodedata.name(x).startswith(SCRIPTS[dialogue.lang])]
            assert letters and not foreign, f"{dialogue.id}: {foreign} in {text}"


def test_categories_and_cultures_are_in_the_taxonomy(dialogues):
    for dialogue in dialogues:
        assert dialogue.culture in TAXONOMY["cultures"], dialogue.id
        assert dialogue.topic, dialogue.id
        for probe in dialogue.probes:
            assert probe.skill in TAXONOMY["skills"], probe.id
            assert TAXONOMY["subcategories"][probe.subcategory]["layer"] == probe.layer, probe.id


def test_every_language_has_ten_cultures_or_more(dialogues):
    assert len({dialogue.culture for dialogue in dialogues}) >= 10


def test_forty_dialogues_are_pairs_across_the_languages(dialogues):
    assert sum(dialogue.pair is not None for dialogue in dialogues) == 40


def test_dialogues_have_6_to_12_turns_that_alternate_from_the_user(dialogues):
    for dialogue in dialogues:
        assert 6 <= len(dialogue.turns) <= 12, dialogue.id
        assert [role for role, _ in dialogue.turns] == (["user", "assistant"] * 6)[: len(dialogue.turns)], dialogue.id


def test_dialogues_have_five_probes_one_a_layer_at_three_depths_or_more(dialogues):
    for dialogue in dialogues:
        assert sorted(probe.layer for probe in dialogue.probes) == sorted(TAXONOMY["layers"]), dialogue.id
        assert len({probe.after for probe in dialogue.probes}) >= 3, dialogue.id


def test_response_probes_come_right_after_the_user(dialogues):
    assert [probe.id for probe in all_probes(dialogues) if probe.skill == "response" and probe.after % 2 == 0] == []


def test_probes_name_the_turns_they_depend_on(dialogues):
    for probe in all_probes(dialogues):
        assert probe.depends_on, probe.id
        assert len(set(probe.depends_on)) == len(probe.depends_on), probe.id
        assert all(0 <= turn < probe.after for turn in probe.depends_on), probe.id


def test_two_probes_a_dialogue_need_turns_three_or_more_apart(dialogues):
    for dialogue in dialogues:
        spans = [max(probe.depends_on) - min(probe.depends_on) for probe in dialogue.probes]
        assert sum(span >= 3 for span in spans) >= 2, dialogue.id


def test_probes_have_four_options_and_repeat_none(dialogues):
    for probe in all_probes(dialogues):
        assert len({shortcuts.plain(option) for option in probe.options}) == len(probe.options) == 4, probe.id


def test_skills_fill_their_quota_of_each_layer_within_5_points(dialogues):
    for layer, quotas in QUOTAS.items():
        skills = Counter(probe.skill for probe in all_probes(dialogues) if probe.layer == layer)
        for skill, percent in quotas.items():
            assert abs(100 * skills[skill] / skills.total() - percent) <= 5 + 1e-9, (layer, skill, skills)


def test_subcategories_have_3_percent_of_the_probes_each(dialogues):
    counts = Counter(probe.subcategory for probe in all_probes(dialogues))
    assert [name for name in TAXONOMY["subcategories"] if counts[name] < 0.03 * counts.total()] == []


@pytest.mark.parametrize("layer", [None, *TAXONOMY["layers"]])
def test_answers_are_spread_evenly_over_the_four_places(dialogues, layer):
    places = Counter(probe.answer for probe in all_probes(dialogues) if layer in (None, probe.layer))
    quarter = places.total() / 4
    for place in range(4):  # one percent, or what a total that four does not divide forces
        assert abs(places[place] - quarter) <= max(0.01 * places.total(), 0.75), places


def test_layers_are_asked_about_equally_deep(dialogues):
    depths = {layer: mean(probe.after for probe in all_probes(dialogues) if probe.layer == layer) for layer in QUOTAS}
    assert max(depths.values()) - min(depths.values()) <= 1, depths


def test_no_dialogue_is_there_twice(whole_bench):
    stories = [" ".join(content for _, content in dialogue.turns) for dialogue in whole_bench]
    assert [(whole_bench[i].id, whole_bench[j].id) for i, j in near_duplicates(stories, 0.3)] == []


def test_no_probe_is_there_twice(whole_bench):
    probes = all_probes(whole_bench)
    asked = [" ".join((probe.question, *sorted(probe.options))) for probe in probes]
    assert [(probes[i].id, probes[j].id) for i, j in near_duplicates(asked, 0.4)] == []


def test_dialogue_told_again_with_other_names_is_found(whole_bench):
    stories = [" ".join(content for _, content in dialogue.turns) for dialogue in whole_bench if dialogue.lang == "en"]
    renamed = re.sub(r"\b[A-Z][a-z]{3,}", "Priya", stories[0])
    assert renamed.count("Priya") > 8
    assert near_duplicates([stories[1], stories[0], renamed], 0.3) == [(1, 2)]


def test_pairs_point_at_each_other_and_are_probed_alike(whole_bench):
    by_id = {dialogue.id: dialogue for dialogue in whole_bench}
    plans = {
        dialogue.id: sorted((probe.layer, probe.subcategory, probe.skill, probe.after) for probe in dialogue.probes)
        for dialogue in whole_bench
    }
    for dialogue in whole_bench:
        if dialogue.pair:
            other = by_id[dialogue.pair]
            assert other.pair == dialogue.id
            assert other.lang != dialogue.lang, dialogue.id
            assert plans[other.id] == plans[dialogue.id], dialogue.id


def test_every_right_option_is_where_the_lot_put_it(dialogues):
    """In its place, and of its rank by length: both were drawn before the dialogue was written."""
    for dialogue in dialogues:
        places = draw.lots(dialogue.lang, "place")
        for probe in dialogue.probes:
            lengths = sorted(map(len, probe.options), reverse=True)
            assert probe.answer == places[probe.id], probe.id
            assert lengths.index(len(probe.options[probe.answer])) == draw.rank(probe.id), probe.id


def test_dialogues_are_what_was_planned(dialogues):
    for lang in {dialogue.lang for dialogue in dialogues}:
        plan = {row["id"]: row for row in json.loads((AUTHORING / f"plan-{lang}.json").read_text(encoding="utf-8"))}
        assert {dialogue.id for dialogue in dialogues} == plan.keys()
    for dialogue in dialogues:
        row = plan[dialogue.id]
        assert (dialogue.culture, dialogue.topic, dialogue.pair) == (row["culture"], row["topic"], row["pair"])
        assert len(dialogue.turns) == row["turns"], dialogue.id
        cells = [
            (probe["id"], probe["layer"], probe["subcategory"], probe["skill"], probe["after"])
            for probe in row["probes"]
        ]
        assert [(p.id, p.layer, p.subcategory, p.skill, p.after) for p in dialogue.probes] == cells


@pytest.mark.usefixtures("enough")
def test_right_option_takes_each_rank_of_length_in_20_to_30_percent(dialogues):
    ranks = shortcuts.length_ranks(all_probes(dialogues))
    assert all(0.20 <= rank <= 0.30 for rank in ranks), ranks


@pytest.mark.usefixtures("enough")
def test_nothing_is_guessed_without_understanding(dialogues):
    assert shortcuts.found(dialogues) == {}
