"""What can be guessed about a bench without understanding it.

A guess scores the options of a probe; the best-scored one is its pick. Its share is how often that is the right
one, over the probes whose options it tells apart at all; options tied for the best share the credit.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from scipy import sparse
from scipy.stats import binom
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from eicap.bench import Dialogue, Probe

LIMITS = {
    "longest": 0.32,
    "shortest": 0.32,
    "most punctuation": 0.32,
    "odd one out": 0.32,
    "most like the others": 0.32,
    "most like the question": 0.32,
    "most digits": 0.32,
    "most first person": 0.32,
    "most second person": 0.32,
    "most give-away words": 0.32,
    "words shared with the dialogue": 0.35,
    "words shared with the last turn": 0.35,
    "characters shared with the last turn": 0.35,
    "fewest words shared with the dialogue": 0.35,
    "fewest words shared with the last turn": 0.35,
    "classifier on words": 0.335,
    "classifier on characters": 0.335,
}
GROUP_LIMIT = 0.44  # within one layer or one skill
ENOUGH = 300  # probes; fewer say too little

ENGLISH_PIECES = """
    didn don doesn isn wasn weren couldn wouldn shouldn hasn haven hadn aren does did ll ve re
"""  # of didn't, we'll, ...
ARABIC_STOP_WORDS = """
    ا ان انا انت انتي انتم نحن هو هي هم هن هذا هذه ذلك تلك هؤلاء الذي التي الذين ما ماذا لماذا من منه
    منها عن عنه عنها في فيه فيها على عليه عليها الى اليه اليها مع معه معها بين عند عنده عندها لدى له لها
    لهم لي لك به بها بي كل بعض غير او ام ثم بل لكن لكنه لكنها حتى اذا اذ لو لان لانه لانها كي لا لم لن
    ليس ليست قد لقد كان كانت يكون تكون كما مثل كيف متى اين اي اية هنا هناك الان بعد قبل منذ حين عندما حيث
    فقط ايضا نفس نفسه نفسها يا نعم وهو وهي بلا دون فوق تحت امام خلف اللي مش مو بس لسه كده كدا جذي هيك هاد
    هيدا دا ده دي دول احنا انتو علشان عشان لما شو ايش وش ليش ليه فين وين الحين هلق
"""
FIRST_PERSON = {
    "en": "i me my mine myself we us our ours ourselves m ve",
    "ar": "انا اني انني نحن لي عندي معي مني عني لدي لنا عندنا معنا نفسي انفسنا",
}
SECOND_PERSON = {"en": "you your yours yourself", "ar": "انت انتي انتم لك لكم عندك معك منك عنك عليك اليك بك نفسك"}
GIVE_AWAY = {  # hedges, and words that weigh two sides or look beneath: what careful answers are made of
    "en": """perhaps maybe might may seems seem somewhat rather partly almost both though although yet still while
        even despite beneath underneath under behind deeper quietly mixed also without really truly""",
    "ar": """ربما قد لعل لعله لعلها كان يبدو تبدو بعض قليل قليلا شيء معا رغم لكن لكنه لكنها مع ذلك تحت خلف وراء
        حتى ايضا حقا فعلا في العمق دون بلا""",
}
PROCLITICS = ("وال", "فال", "بال", "كال", "لل", "ال", "و", "ف", "ب", "ك", "ل", "س")
ENCLITICS = ("هما", "كما", "هم", "هن", "كم", "كن", "ها", "نا", "ني", "ه", "ك", "ي", "ا")  # the last is left of a tanwin


def plain(text: str) -> str:
    """Lower case, without diacritics (so أ is ا) and without tatweel."""
    letters = unicodedata.normalize("NFD", text.lower().replace("\u0640", ""))
    return "".join(letter for letter in letters if unicodedata.category(letter) != "Mn")


def without_clitics(word: str) -> str:
    """An Arabic word without article, conjunctions, prepositions and pronouns, as long as three letters stay.

    Single letters of a root go too, but from every form of the word alike, which is all that counting needs.
    """
    word = word.replace("ة", "ت").replace("ى", "ي")
    while True:
        shorter = next((word[len(p) :] for p in PROCLITICS if word.startswith(p) and len(word) - len(p) >= 3), word)
        shorter = next(
            (shorter[: -len(e)] for e in ENCLITICS if shorter.endswith(e) and len(shorter) - len(e) >= 3), shorter
        )
        if shorter == word:
            return word
        word = shorter


STOP_WORDS = {
    "en": ENGLISH_STOP_WORDS | set(plain(ENGLISH_PIECES).split()),
    "ar": frozenset(plain(ARABIC_STOP_WORDS).split()),
}


def words(text: str, lang: str) -> set[str]:
    """The words that carry meaning: no stop words, no single letters; Arabic ones without clitics."""
    found = {word for word in re.findall(r"[^\W_]+", plain(text)) if len(word) > 1}
    found -= STOP_WORDS.get(lang, frozenset())
    return {without_clitics(word) for word in found} if lang == "ar" else found


def count(text: str, listed: str) -> int:
    """How many words of a (plain) text are in a list."""
    return sum(word in listed.split() for word in re.findall(r"[^\W_]+", text))


def grams(text: str) -> set[str]:
    """Its four-letter pieces, across words."""
    flat = re.sub(r"\W+", " ", text)
    return {flat[i : i + 4] for i in range(len(flat) - 3)}


def alike(a: set[str], b: set[str]) -> float:
    """Jaccard similarity."""
    return len(a & b) / len(a | b) if a | b else 0.0


def surface(dialogue: Dialogue, probe: Probe) -> dict[str, list[float]]:
    """The options' scores under each guess that is not trained."""
    options = [plain(option) for option in probe.options]
    bags = [words(option, dialogue.lang) for option in probe.options]
    question = words(probe.question, dialogue.lang)
    turns = [words(content, dialogue.lang) for _, content in dialogue.turns[: probe.after]]
    last = grams(plain(dialogue.turns[probe.after - 1][1]))
    likeness = [sum(alike(bag, other) for other in bags) - alike(bag, bag) for bag in bags]
    return {
        "longest": [len(option) for option in options],
        "shortest": [-len(option) for option in options],
        "most punctuation": [sum(unicodedata.category(c)[0] == "P" for c in option) for option in options],
        "odd one out": [-score for score in likeness],
        "most like the others": likeness,
        "most like the question": [alike(bag, question) for bag in bags],
        "most digits": [sum(character.isdigit() for character in option) for option in options],
        "most first person": [count(option, FIRST_PERSON.get(dialogue.lang, "")) for option in options],
        "most second person": [count(option, SECOND_PERSON.get(dialogue.lang, "")) for option in options],
        "most give-away words": [count(option, GIVE_AWAY.get(dialogue.lang, "")) for option in options],
        "words shared with the dialogue": [len(bag & set().union(*turns)) for bag in bags],
        "words shared with the last turn": [len(bag & turns[-1]) for bag in bags],
        "fewest words shared with the dialogue": [-len(bag & set().union(*turns)) for bag in bags],
        "fewest words shared with the last turn": [-len(bag & turns[-1]) for bag in bags],
        "characters shared with the last turn": [len(grams(option) & last) / len(grams(option)) for option in options],
    }


def learned(items: list[tuple[Dialogue, Probe]], vectorizer: TfidfVectorizer) -> list[list[float]]:
    """The options' scores by logistic regression on the options alone, each dialogue scored by a fit on others.

    An option is described by how it differs from the mean of its probe's options: what they share is no cue.
    """
    texts = [option for _, probe in items for option in probe.options]
    right = np.array([i == probe.answer for _, probe in items for i in range(len(probe.options))])
    sizes = [len(probe.options) for _, probe in items]
    group = np.repeat([dialogue.id for dialogue, _ in items], sizes)
    mean = sparse.block_diag([np.full((size, size), 1 / size) for size in sizes], format="csr")
    scores = np.zeros(len(texts))
    for train, test in GroupKFold(5).split(texts, groups=group):
        features = vectorizer.fit([texts[i] for i in train]).transform(texts)
        features = (features - mean @ features).tocsr()
        fit = LogisticRegression(C=10, solver="liblinear").fit(features[train], right[train])
        scores[test] = fit.decision_function(features[test])
    return [part.tolist() for part in np.split(scores, np.cumsum(sizes)[:-1])]


def guesses(items: list[tuple[Dialogue, Probe]], trained: bool = True) -> dict[str, list[list[float]]]:
    """By guess: for each item, the scores of its options. All items are of one language. Trained ones take seconds."""
    scores = defaultdict(list)
    for dialogue, probe in items:
        for guess, values in surface(dialogue, probe).items():
            scores[guess].append(values)
    if not trained:
        return dict(scores)
    lang = items[0][0].lang
    by_words = TfidfVectorizer(analyzer=lambda text: sorted(words(text, lang)))
    by_characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), preprocessor=plain, min_df=2)
    scores["classifier on words"] = learned(items, by_words)
    scores["classifier on characters"] = learned(items, by_characters)
    return dict(scores)


def share(scores: Iterable[list[float]], answers: Iterable[int]) -> tuple[float, int]:
    """How often the best-scored option is the right one, and over how many items (those with unequal scores)."""
    credit, count = 0.0, 0
    for values, answer in zip(scores, answers, strict=True):
        values = np.round(values, 9)  # sums in another order are still ties
        if values.min() < values.max():
            best = values == values.max()
            credit += best[answer] / best.sum()
            count += 1
    return (credit / count if count else 0.0), count


def allowed(limit: float, count: int) -> float:
    """The limit as it stands from 300 items up; where a cue separates fewer, what guessing exceeds in 1 of 5,000 cases.

    Of the cues and groups more than a hundred separate fewer: an honest bench fails one of them in about 2 % of cases.
    """
    return limit if count >= ENOUGH else max(limit, binom.isf(0.0002, count, 0.25) / count if count else 1.0)


def found(dialogues: list[Dialogue], trained: bool = True) -> dict[tuple[str, str], str]:
    """The guesses that beat their limits: {(guess, "all" or a layer or a skill): what was measured}."""
    items = [(dialogue, probe) for dialogue in dialogues for probe in dialogue.probes]
    groups = {"all": list(range(len(items)))}
    for i, (_, probe) in enumerate(items):
        for facet in (f"layer {probe.layer}", f"skill {probe.skill}"):
            groups.setdefault(facet, []).append(i)
    beaten = {}
    for guess, scores in guesses(items, trained).items():
        for group, members in groups.items():
            right, count = share([scores[i] for i in members], [items[i][1].answer for i in members])
            limit = LIMITS[guess] if group == "all" else GROUP_LIMIT
            if right > allowed(limit, count) + 1e-9:
                beaten[guess, group] = f"right in {right:.1%} of {count} probes, at most {allowed(limit, count):.1%}"
    return beaten


def length_ranks(probes: Iterable[Probe]) -> list[float]:
    """How often the right option is the longest, the second, ... (characters); ties share the ranks they take."""
    ranks, total = defaultdict(float), 0
    for probe in probes:
        lengths = [len(option) for option in probe.options]
        longer = sum(length > lengths[probe.answer] for length in lengths)
        ties = lengths.count(lengths[probe.answer])
        for rank in range(longer, longer + ties):
            ranks[rank] += 1 / ties
        total += 1
    return [ranks[rank] / total for rank in range(len(lengths))]
