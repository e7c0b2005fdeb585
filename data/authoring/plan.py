"""The cells of the bench, planned before a word is written.

For every dialogue: turns, culture, topic, pair; for every probe: layer, subcategory, skill, depth and, for replies, the
four strategies on offer. Both languages get the same cells, so that they are compared on like for like; dialogues 1 to
40 are pairs, the same situation in both. Where the right answer goes is not planned here: it is drawn by lot (draw.py)
when the options are written.

    python plan.py            # writes plan-en.json and plan-ar.json beside itself
"""

import itertools
import json
import random
from pathlib import Path

HERE = Path(__file__).parent
DIALOGUES, PAIRS = 100, 40
SKILLS = {  # probes of each skill in a layer's hundred
    "foundational": {"tracking": 50, "cause": 20, "appraisal": 10, "response": 20},
    "dimensional": {"tracking": 55, "cause": 15, "appraisal": 15, "response": 15},
    "appraisal": {"tracking": 10, "cause": 30, "appraisal": 45, "response": 15},
    "value": {"tracking": 5, "cause": 40, "appraisal": 35, "response": 20},
    "social": {"tracking": 15, "cause": 25, "appraisal": 20, "response": 40},
}
SUBCATEGORIES = {
    "foundational": ["basic_emotion", "intensity", "mixed_emotion", "masked_emotion", "emotion_shift"],
    "dimensional": ["valence", "arousal", "power", "affect_dynamics"],
    "appraisal": ["goal_congruence", "accountability", "expectedness", "coping_potential", "reappraisal"],
    "value": ["moral_concern", "personal_value", "cultural_value", "need", "self_worth"],
    "social": ["perspective_taking", "relational_norms", "display_rule", "support_strategy", "conflict_repair"],
}
UNFIT = {  # skills that make no question of a subcategory
    "basic_emotion": {"appraisal"},
    "intensity": {"cause"},
    "emotion_shift": {"appraisal"},
    "valence": {"cause"},
    "arousal": {"appraisal"},
    "affect_dynamics": {"response"},
    "goal_congruence": {"tracking", "response"},
    "accountability": {"tracking"},
    "expectedness": {"response", "tracking"},
    "moral_concern": {"tracking"},
    "cultural_value": {"tracking"},
    "perspective_taking": {"response"},
    "display_rule": {"response", "tracking"},
    "support_strategy": {"tracking", "cause"},
    "conflict_repair": {"tracking"},
}
STRATEGIES = ["validate", "ask", "advise", "distract", "reframe", "share"]
DEPTHS = [0.35, 0.5, 0.65, 0.85, 1.0]  # of the dialogue's turns
TOPICS = [
    "family", "work", "study", "illness", "grief", "friendship", "love", "money",
    "migration", "faith", "parenting", "success", "shame", "conflict", "loneliness", "small daily things",
]  # fmt: skip
VOICES = ["terse", "chatty", "wry", "formal", "hurried", "rambling", "plain-spoken", "lively"]
AGES = ["17 to 22", "23 to 30", "31 to 45", "46 to 60", "over 60"]
CULTURES = {
    "en": {
        "north_american": 7, "british_irish": 7, "west_african": 7, "east_african": 7, "south_asian": 7,
        "east_asian": 7, "southeast_asian": 7, "latin_american": 7, "northern_european": 7, "southern_european": 7,
        "eastern_european": 7, "oceanian": 7, "arab_diaspora": 4, "gulf": 3, "levantine": 3, "egyptian": 3,
        "maghrebi": 3,
    },
    "ar": {
        "gulf": 10, "levantine": 10, "egyptian": 10, "maghrebi": 10, "iraqi": 10, "sudanese": 10, "yemeni": 10,
        "arab_diaspora": 10, "west_african": 6, "east_african": 6, "south_asian": 4, "southeast_asian": 4,
    },
}  # fmt: skip
SITUATIONS = [  # topic and one line, re-imagined in each language
    ("work", "passed over for a post that goes to someone the person trained; a card or greeting has to be written"),
    ("family", "a sibling borrows the savings that were meant for a course and pays back in favours"),
    ("grief", "clearing out a grandparent's shop; a drawer holds things kept with a name on each"),
    ("friendship", "an old friend went quiet after a joke at dinner; a message is drafted again and again"),
    ("study", "a result to be told at a table where a cousin failed the same exam"),
    ("illness", "a parent's test result is known to one child, who was asked to keep it until after a feast"),
    ("love", "an engagement ring comes back in an envelope without a letter"),
    ("money", "a shared shop till is short for the third month and the partner is a childhood friend"),
    ("migration", "a visa arrives on the day the flat at home is finally painted"),
    ("faith", "a promise made in prayer during an operation falls due"),
    ("parenting", "a teenager's drawing wins a prize for a picture that shows the family"),
    ("success", "a first published recipe carries the family name and leaves out who invented it"),
    ("shame", "a neighbour saw the person return goods that had not been paid for by mistake"),
    ("conflict", "two brothers speak only through the person about a wall between their yards"),
    ("loneliness", "the only one in a new town who knows the person's name is the baker, who is moving"),
    ("small daily things", "the last bus driver on the route no longer waits the usual half minute"),
    ("work", "a night shift swapped as a favour turns out to be the night that everyone was praised for"),
    ("family", "the person is asked to give the speech that the elder sister always gave"),
    ("grief", "a late husband's phone still rings at the hour his friend used to call"),
    ("friendship", "two friends open the same kind of stall on the same street"),
    ("study", "a scholarship letter says yes to one of two twins"),
    ("illness", "recovering at home, the person is not allowed near the kitchen they ran for years"),
    ("love", "a former love becomes the new teacher of the person's child"),
    ("money", "a lottery-sized inheritance is split by a list in the aunt's handwriting"),
    ("migration", "the mother abroad asks each week what the garden looks like; the garden was sold"),
    ("faith", "the person fasts or keeps a vow for the first time alone, far from the shared table"),
    ("parenting", "a daughter calls the child-minder by the word kept for mother"),
    ("success", "the team wins the match in which the person was taken off"),
    ("shame", "an accent slips at a job interview and the interviewer turns out to be from the same village"),
    ("conflict", "a letter to the landlord was signed by all the neighbours but one"),
    ("loneliness", "a retired teacher gets a call by mistake from a child and hopes it happens again"),
    ("small daily things", "the good cup of the house breaks and nobody says who did it"),
    ("work", "a young colleague corrects the person in front of a client and is right"),
    ("family", "the house key is to be handed to the brother's new wife"),
    ("friendship", "a friend's wedding list has the person at the table of the old neighbours"),
    ("study", "going back to class at fifty beside one's own former pupil"),
    ("love", "a long marriage, and one of them has learned to drive in secret"),
    ("parenting", "a son leaves for service or for sea and packs everything but the gift"),
    ("success", "the first pay is spent on something the father refuses to use"),
    ("conflict", "an apology arrives through a third person, in a box of fruit"),
]
ANCHORS = [  # something for the dialogues that are nobody's pair to turn on
    "a borrowed coat", "a bus ticket", "a broken fridge", "a school photograph", "a dented pot", "a rented suit",
    "a voice message", "a spare key", "a wedding list", "a stopped clock", "a sewing machine", "a roof leak",
    "a football shirt", "a garden fence", "a packed lunch", "a hospital bracelet", "an old radio", "a bicycle",
    "a name on a door", "a train platform", "a library card", "a fishing net", "a family recipe", "a video call",
    "a lost dog", "a paint tin", "a choir rehearsal", "a late parcel", "a market stall", "a swimming lesson",
    "a power cut", "a tailor's measure", "a hearing aid", "a driving test", "a guest room", "a seed packet",
    "a debt book", "a birthday cake", "a language class", "a torn letter", "a phone contract", "a prayer rug or candle",
    "a pair of glasses", "a theatre ticket", "a neighbour's lamp", "a job badge", "a chess board", "a water tank",
    "a graduation gown", "a kitchen knife", "a taxi ride", "a haircut", "a winter heater", "a photo album",
    "a moving van", "a report card", "a beehive", "a museum visit", "a shared umbrella", "a cup of tea",
]  # fmt: skip


def cells(layer: str, rng: random.Random) -> list[tuple[str, str]]:
    """A hundred (subcategory, skill) of a layer: quotas of both exact, no unfit pair."""
    names = SUBCATEGORIES[layer]
    subcategories = names * (DIALOGUES // len(names))
    skills = [skill for skill, count in SKILLS[layer].items() for _ in range(count)]
    rng.shuffle(skills)
    while bad := [i for i in range(DIALOGUES) if skills[i] in UNFIT.get(subcategories[i], ())]:
        i, j = rng.choice(bad), rng.randrange(DIALOGUES)
        if skills[j] not in UNFIT.get(subcategories[i], ()) and skills[i] not in UNFIT.get(subcategories[j], ()):
            skills[i], skills[j] = skills[j], skills[i]
    both = list(zip(subcategories, skills))
    rng.shuffle(both)
    return both


def shape(rng: random.Random) -> list[dict]:
    """Turns and probes of the hundred dialogues, the same in both languages."""
    table = {layer: cells(layer, rng) for layer in SKILLS}
    lengths = [6 + i % 7 for i in range(DIALOGUES)]
    rng.shuffle(lengths)
    offers = itertools.cycle(rng.sample(list(itertools.combinations(STRATEGIES, 4)), 15))
    dialogues = []
    for d, turns in enumerate(lengths):
        probes = []
        for j, layer in enumerate(SKILLS):
            subcategory, skill = table[layer][d]
            wanted = turns * DEPTHS[(2 * j + d) % 5]
            depths = [after for after in range(3, turns + 1) if skill != "response" or after % 2]
            probe = {
                "layer": layer,
                "subcategory": subcategory,
                "skill": skill,
                "after": min(depths, key=lambda after: (abs(after - wanted), after)),
            }
            if skill == "response":
                probe["strategies"] = list(next(offers))
            probes.append(probe)
        while len({probe["after"] for probe in probes}) < 3:  # three depths or more
            probe = rng.choice([probe for probe in probes if probe["skill"] != "response"])
            probe["after"] = rng.randint(3, turns)
        dialogues.append({"turns": turns, "probes": sorted(probes, key=lambda probe: probe["after"])})
    return dialogues


def spread(values: dict[str, int] | list[str], rng: random.Random) -> list[str]:
    """A hundred values, by count or in equal shares, shuffled."""
    if isinstance(values, dict):
        hundred = [value for value, count in values.items() for _ in range(count)]
    else:
        hundred = [values[i % len(values)] for i in range(DIALOGUES)]
    rng.shuffle(hundred)
    return hundred


def plan(lang: str, dialogues: list[dict]) -> list[dict]:
    rng = random.Random(f"plan {lang}")
    other = {"en": "ar", "ar": "en"}[lang]
    columns = [spread(values, rng) for values in (CULTURES[lang], TOPICS, VOICES, AGES, ["woman", "man"])]
    anchors = rng.sample(ANCHORS, DIALOGUES - PAIRS)
    rows = []
    for d, dialogue in enumerate(dialogues):
        culture, topic, voice, age, gender = (column[d] for column in columns)
        number = f"{d + 1:03d}"
        row = {"id": f"{lang}-{number}", "lang": lang, "culture": culture, "topic": topic, "pair": None}
        if d < PAIRS:
            row |= {"topic": SITUATIONS[d][0], "pair": f"{other}-{number}", "situation": SITUATIONS[d][1]}
        else:
            row |= {"situation": f"your own; something in it turns on {anchors[d - PAIRS]}"}
        row |= {"person": f"{gender}, {age}, {voice}", "turns": dialogue["turns"]}
        row["probes"] = [{"id": f"{lang}-{number}-{i}", **probe} for i, probe in enumerate(dialogue["probes"], start=1)]
        rows.append(row)
    return rows


if __name__ == "__main__":
    shared = shape(random.Random("eicap bench"))
    for lang in ("en", "ar"):
        rows = plan(lang, shared)
        (HERE / f"plan-{lang}.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
