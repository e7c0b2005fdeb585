"""The guesses of shortcuts.py, on made-up benches where it is known what can be guessed."""

import random
from dataclasses import replace

import pytest
import shortcuts

from eicap.bench import Dialogue, Probe

LAYERS = ["foundational", "dimensional", "appraisal", "value", "social"]
SKILLS = ["tracking", "cause", "appraisal", "response"]
MARKS = {"en": ["7", "I", "you", "perhaps"], "ar": ["٧", "أنا", "لك", "ربما"]}
SYLLABLES = {"en": "badokilumenaporisatuvazo", "ar": "بادونيرسميطاقوحرشمفلزيعب"}  # two letters each


def made_up(lang: str = "en", seed: int = 0) -> list[Dialogue]:
    """70 dialogues of random words with 350 probes whose answers are drawn by lot."""
    rng = random.Random(seed)
    syllables = [SYLLABLES[lang][i : i + 2] for i in range(0, 24, 2)]
    vocabulary = ["".join(rng.choices(syllables, k=3)) for _ in range(500)]

    def sentence(words, low, high):
        text = rng.choices(words, k=rng.randint(low, high))
        marked = [rng.choice(MARKS[lang]) if rng.random() < 0.1 else word for word in text]
        return " ".join(word + rng.choice(["", "", "", ","]) for word in marked)

    dialogues = []
    for d in range(70):
        mine = rng.sample(vocabulary, 60)
        turns = tuple((["user", "assistant"][t % 2], sentence(mine, 10, 25)) for t in range(8))
        probes = []
        for layer in LAYERS:
            after, question = rng.randint(3, 8), sentence(mine, 6, 10)
            options = tuple(sentence(mine, 4, 9) for _ in range(4))
            name = f"{d}-{layer}"
            probes.append(Probe(name, after, layer, rng.choice(SKILLS), None, question, options, rng.randrange(4), ()))
        dialogues.append(Dialogue(str(d), lang, None, None, None, turns, tuple(probes)))
    return dialogues


def change(dialogues, make, rate, layer=None, seed=1):
    """The bench with make(dialogue, probe) in place of a share of its probes."""
    rng = random.Random(seed)
    return [
        replace(
            dialogue,
            probes=tuple(
                make(dialogue, probe) if layer in (None, probe.layer) and rng.random() < rate else probe
                for probe in dialogue.probes
            ),
        )
        for dialogue in dialogues
    ]


def answer_is_best(guess):
    def make(dialogue, probe):
        scores = shortcuts.surface(dialogue, probe)[guess]
        return replace(probe, answer=scores.index(max(scores)))

    return make


def answer_says(word):
    def make(dialogue, probe):
        options = list(probe.options)
        options[probe.answer] += f" {word}"
        return replace(probe, options=tuple(options))

    return make


@pytest.mark.parametrize("lang", ["en", "ar"])
def test_honest_bench_is_not_flagged(lang):
    assert shortcuts.found(made_up(lang)) == {}


@pytest.mark.parametrize("guess", [name for name in shortcuts.LIMITS if "classifier" not in name])
def test_planted_guess_is_found(guess):
    assert (guess, "all") in shortcuts.found(change(made_up(), answer_is_best(guess), rate=0.25), trained=False)


@pytest.mark.parametrize(("lang", "word"), [("en", "quietly"), ("ar", "بهدوء")])
def test_word_that_marks_the_right_option_is_found_by_both_classifiers(lang, word):
    found = shortcuts.found(change(made_up(lang), answer_says(word), rate=0.25))
    assert {("classifier on words", "all"), ("classifier on characters", "all")} <= found.keys()


def test_stop_word_that_marks_the_right_option_is_found_by_its_characters():
    found = shortcuts.found(change(made_up(), answer_says("but"), rate=0.25))
    assert ("classifier on characters", "all") in found
    assert ("classifier on words", "all") not in found


def test_shortcut_of_one_layer_is_found_there():
    found = shortcuts.found(change(made_up(), answer_is_best("shortest"), rate=0.4, layer="value"), trained=False)
    assert ("shortest", "layer value") in found
    assert ("shortest", "layer social") not in found


def test_layer_may_be_guessed_more_often_than_the_whole_bench():
    """In 28 of 70 probes (40 %): too often for a whole bench, by chance not rare enough in one of many groups."""
    dialogues = change(made_up(), answer_is_best("shortest"), rate=0.2, layer="value")
    items = [(dialogue, probe) for dialogue in dialogues for probe in dialogue.probes if probe.layer == "value"]
    scores = [shortcuts.surface(dialogue, probe)["shortest"] for dialogue, probe in items]
    assert shortcuts.share(scores, [probe.answer for _, probe in items]) == (pytest.approx(0.4), 70)
    assert shortcuts.LIMITS["shortest"] < 0.4 < shortcuts.GROUP_LIMIT
    assert shortcuts.found(dialogues) == {}


def test_words_of_a_dialogue_are_no_shortcut_across_dialogues():
    """A name in the right options of one dialogue only: the classifiers must not meet it in training."""

    def named(dialogue, probe):
        name = dialogue.id.translate(str.maketrans("0123456789", "bcdfghjklm"))
        return answer_says(f"{name}qx")(dialogue, probe)

    found = shortcuts.found(change(made_up(), named, rate=1))
    assert ("classifier on words", "all") not in found


def test_share_counts_only_items_told_apart_and_splits_ties():
    scores = [[3, 1, 1, 0], [2, 2, 0, 1], [5, 5, 5, 5], [0, 0, 0, 1], [0.1 + 0.2, 0.3, 0, 0]]
    assert shortcuts.share(scores, [0, 1, 2, 0, 0]) == (pytest.approx((1 + 1 / 2 + 0 + 1 / 2) / 4), 4)
    assert shortcuts.share([[1, 1, 1, 1]], [0]) == (0, 0)


def test_guesses_on_one_probe():
    turns = (
        ("user", "Rana sold the green boat in spring"),
        ("assistant", "Who bought it?"),
        ("user", "A carpenter from the harbour"),
    )
    options = ("boat, spring, harbour!", "green boat spring", "carpenter harbour", "my 12 violins, perhaps your voice")
    probe = Probe("p", 3, "value", "cause", None, "What does the carpenter mean?", options, 0, ())
    dialogue = Dialogue("d", "en", None, None, None, turns, (probe,))
    assert shortcuts.surface(dialogue, probe) == {
        "longest": [22, 17, 17, 33],
        "shortest": [-22, -17, -17, -33],
        "most punctuation": [3, 0, 0, 1],
        "odd one out": pytest.approx([-0.75, -0.5, -0.25, 0]),  # {boat, spring} of 4, {harbour} of 4
        "most like the others": pytest.approx([0.75, 0.5, 0.25, 0]),
        "most like the question": pytest.approx([0, 0, 1 / 3, 0]),  # {carpenter, mean} and {carpenter, harbour}
        "most digits": [0, 0, 0, 2],
        "most first person": [0, 0, 0, 1],
        "most second person": [0, 0, 0, 1],
        "most give-away words": [0, 0, 0, 1],
        "words shared with the dialogue": [3, 3, 2, 0],
        "words shared with the last turn": [1, 0, 2, 0],
        "fewest words shared with the dialogue": [-3, -3, -2, 0],
        "fewest words shared with the last turn": [-1, 0, -2, 0],
        "characters shared with the last turn": pytest.approx([5 / 17, 0, 12 / 14, 0]),
    }


def test_guesses_do_not_read_later_turns():
    turns = (("user", "Rana sold the boat"), ("assistant", "violin lessons"), ("user", "violin lessons"))
    probe = Probe("p", 1, "value", "cause", None, "Why?", ("boat", "violin lessons"), 0, ())
    scores = shortcuts.surface(Dialogue("d", "en", None, None, None, turns, (probe,)), probe)
    assert scores["words shared with the dialogue"] == scores["words shared with the last turn"] == [1, 0]


def test_arabic_words_are_compared_without_diacritics_tatweel_and_clitics():
    forms = ["مكتب", "المَكْتَب", "والمكتب", "بالمكتب", "للمكتب", "مكتبهم", "مكتبها", "وبمكتبه", "مـكـتـب", "مكتبًا"]
    assert {tuple(shortcuts.words(form, "ar")) for form in forms} == {("مكتب",)}
    assert shortcuts.words("السيارة", "ar") == shortcuts.words("سيارتها", "ar")
    assert shortcuts.words("أخت", "ar") == shortcuts.words("اخت", "ar") != shortcuts.words("أخ", "ar")


def test_stop_words_are_dropped():
    assert shortcuts.words("She didn't say that to the neighbours; he'll wait", "en") == {"say", "neighbours", "wait"}
    assert shortcuts.words("لماذا كان هذا البيت على حتى الآن", "ar") == {"بيت"}


def test_rank_of_the_right_option_by_length_shares_ties():
    def probe(options, answer):
        return Probe("p", 1, "value", "cause", None, "?", options, answer, ())

    probes = [probe(("aaaa", "aaa", "aa", "a"), 1), probe(("aa", "a", "aa", "a"), 0)]
    assert shortcuts.length_ranks(probes) == [0.25, 0.75, 0, 0]


def test_limits_hold_as_written_from_300_items_and_widen_below():
    assert shortcuts.allowed(0.32, 300) == 0.32
    assert shortcuts.allowed(0.32, 5) == 1  # all five right: by chance once in a thousand
    assert shortcuts.allowed(0.32, 8) == 7 / 8
    assert 0.43 < shortcuts.allowed(0.32, 75) < 0.45
