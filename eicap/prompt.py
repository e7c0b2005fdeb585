"""A probe and its dialogue become messages, the messages text, the text ids.

    chat    the turns are chat turns in the checkpoint's own template; the probe is the last user turn
    plain   "User: …" and "Assistant: …" lines, a blank line, the probe, "Answer:"

With letter scoring every probe is asked once per cyclic rotation of its options, each under its letter.
With text scoring the prompt is the question alone, and each option is read as a continuation.
All wording is in data/prompts.json, by language. Nothing here looks at a turn that the probe must not see.
"""

from dataclasses import dataclass
from pathlib import Path

from eicap import InputError
from eicap.bench import LETTERS, Dialogue, Probe
from eicap.checkpoint import read_json
from eicap.tokenizer import Tokenizer

PROMPTS = Path(__file__).parent.parent / "data" / "prompts.json"


@dataclass(frozen=True)
class Prompt:
    """One prompt of a probe, as the model reads it."""

    probe: Probe
    order: tuple[int, ...]  # order[j] is the option shown at place j
    text: str
    ids: list[int]
    continuations: list[list[int]]  # per place: the ids of its letter, or of its text


def read_wording() -> dict[str, dict[str, str]]:
    """data/prompts.json: per language the labels of the speakers, the instruction and the answer's label."""
    return read_json(PROMPTS)


def rotations(options: int, which: str) -> list[tuple[int, ...]]:
    """The orders in which a probe's options are shown: all cyclic rotations ("all"), or as written ("1")."""
    count = options if which == "all" else 1
    return [tuple((start + place) % options for place in range(options)) for start in range(count)]


def _body(probe: Probe, order: tuple[int, ...], wording: dict[str, str], score: str) -> str:
    if score == "text":
        return probe.question
    lines = [f"{LETTERS[place]}. {probe.options[option]}" for place, option in enumerate(order)]
    return "\n".join([probe.question, *lines, wording["instruction"]])


def chat_messages(dialogue: Dialogue, probe: Probe, body: str) -> list[dict[str, str]]:
    """The turns seen so far and the probe, as a chat. A last turn of the user's and the probe are one message."""
    messages = [{"role": role, "content": content} for role, content in dialogue.turns[: probe.after]]
    if messages[-1]["role"] == "user":
        messages[-1]["content"] += "\n\n" + body
    else:
        messages.append({"role": "user", "content": body})
    return messages


def plain_text(dialogue: Dialogue, probe: Probe, body: str, wording: dict[str, str]) -> str:
    """The turns seen so far and the probe, as a transcript."""
    lines = [wording[role] + content for role, content in dialogue.turns[: probe.after]]
    return "\n".join([*lines, "", body, wording["answer"]])


def prompts(
    dialogue: Dialogue, tokenizer: Tokenizer, wording: dict, format: str, score: str, rotate: str
) -> list[Prompt]:
    """Every prompt of a dialogue: its probes in order, each in all its rotations.

    format: "chat" or "plain"; score: "letter" or "text"; rotate: "all" or "1". Raises InputError where the
    language has no wording, where the template refuses the turns, or where an option does not follow its
    prompt cleanly: encode(prompt + separator + option) must be encode(prompt) and then the option's ids, and
    for a letter exactly one id.
    """
    if dialogue.lang not in wording:
        raise InputError(f"dialogue {dialogue.id}: {PROMPTS} has no wording for language {dialogue.lang}; add it")
    words, separator = wording[dialogue.lang], " " if format == "plain" else ""
    drafts = []  # (probe, order, text, what follows at each place)
    for probe in dialogue.probes:
        for order in rotations(len(probe.options), rotate if score == "letter" else "1"):
            body = _body(probe, order, words, score)
            if format == "plain":
                text = plain_text(dialogue, probe, body, words)
            else:
                try:
                    text = tokenizer.chat(chat_messages(dialogue, probe, body))
                except InputError as error:
                    raise InputError(f"dialogue {dialogue.id}: {error}") from None
            follow = LETTERS[: len(order)] if score == "letter" else probe.options
            drafts.append((probe, order, text, follow))

    texts = [text + end for _, _, text, follow in drafts for end in ("", *(separator + f for f in follow))]
    encoded = iter(tokenizer.encode(texts, special=format == "plain"))
    found = []
    for probe, order, text, follow in drafts:
        ids = next(encoded)
        continuations = []
        for option in follow:
            whole = next(encoded)
            continuations.append(whole[len(ids) :])
            if whole[: len(ids)] != ids or not continuations[-1]:
                raise InputError(
                    f"probe {probe.id}: {option!r} after the prompt changes how the tokenizer of {tokenizer.folder} "
                    f"reads the prompt\nThe prompt ends in {text[-20:]!r}; try the other --format."
                )
            if score == "letter" and len(continuations[-1]) != 1:
                pieces = tokenizer.pieces(continuations[-1])
                raise InputError(
                    f"probe {probe.id}: the tokenizer of {tokenizer.folder} writes {separator + option!r} as {pieces}, "
                    "not as one token\nTry the other --format, or --score text."
                )
        found.append(Prompt(probe, order, text, ids, continuations))
    return found
