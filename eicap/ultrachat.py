"""Chat dialogues in UltraChat's formats become packed training batches.

    {"id": …, "data": [user, assistant, user, …]}             UltraChat as released
    {"messages": [{"role": …, "content": …}, …]}               as most chat sets are

Notable:
- a file of 1.5 million dialogues is never in memory: what is kept is where each line begins;
- loss is on what the assistant says and on the token that ends its turn, and on nothing else;
- dialogues are packed whole, in shuffled order, as a forest of chains (forest.py): no padding, no dialogue sees
  another. All that a restart needs to know is the number of the next dialogue.

UltraChat: Ding et al. 2023, arXiv 2305.14233.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from eicap import InputError
from eicap.forest import Forest, chain, pack
from eicap.tokenizer import Tokenizer

HELD_OUT = 20  # every 20th dialogue is never trained on


# Files


class Dialogues(Sequence):
    """The dialogues of several JSON Lines files, by number; a line is read when it is asked for.

    Every line is checked once, when the object is made. Raises InputError with file and line for one that is not a
    dialogue, and for a file that is empty. Attribute `fingerprint`: the sha256 of the files' contents.
    """

    def __init__(self, paths: list[Path]):
        self.paths, self.offsets, files = paths, [], []
        digest = hashlib.sha256()
        for path in paths:
            self.offsets.append(_index(path, digest))
            files.append(len(self.offsets[-1]))
        self.firsts = np.cumsum([0, *files])  # the number of each file's first dialogue
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def file_of(self, number: int) -> int:
        """Which file the dialogue of this number is in, counted from 0."""
        return int(np.searchsorted(self.firsts, number, side="right")) - 1

    def __getitem__(self, number: int) -> list[dict[str, str]]:
        file = self.file_of(number)
        line = number - int(self.firsts[file])
        with open(self.paths[file], "rb") as source:
            source.seek(int(self.offsets[file][line]))
            return parse(source.readline(), f"{self.paths[file]}, line {line + 1}")


def _index(path: Path, digest) -> np.ndarray:
    """Where each line of a file begins, in bytes: (lines,) int64. Every line is checked on the way."""
    offsets, at = [], 0
    try:
        with (
            open(path, "rb") as file,
            tqdm(
                total=path.stat().st_size, unit="B", unit_scale=True, desc=f"reading {path.name}", leave=False, delay=1
            ) as bar,
        ):
            for line in file:
                parse(line, f"{path}, line {len(offsets) + 1}")
                digest.update(line)
                offsets.append(at)
                at += len(line)
                bar.update(len(line))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if not offsets:
        raise InputError(f"{path}: the file is empty; a dialogue a line is expected")
    return np.array(offsets, dtype=np.int64)


def parse(line: bytes, where: str) -> list[dict[str, str]]:
    """A line as messages: perhaps a system message, then user and assistant in turns, the assistant last.

    A dialogue ends before a turn that is empty, and a last turn of the user's is left out: nothing in it is
    learned. Raises InputError, beginning with `where`, for what is no dialogue.
    """
    try:
        row = json.loads(line.decode("utf-8"))
    except ValueError as error:
        raise InputError(f"{where}: not JSON in UTF-8 ({error})") from None
    if isinstance(row, dict) and isinstance(row.get("data"), list):
        turns = [("user" if i % 2 == 0 else "assistant", content) for i, content in enumerate(row["data"])]
    elif isinstance(row, dict) and isinstance(row.get("messages"), list):
        if not all(isinstance(message, dict) for message in row["messages"]):
            raise InputError(f"{where}: a message without role and content")
        turns = [(message.get("role"), message.get("content")) for message in row["messages"]]
    else:
        raise InputError(f"{where}: neither a list `data` nor a list `messages`")
    for number, (role, content) in enumerate(turns, start=1):
        if not isinstance(content, str) or role not in ("system", "user", "assistant"):
            raise InputError(f"{where}: turn {number} lacks a role (user or assistant) or a text")
    start = 1 if turns and turns[0][0] == "system" else 0
    for number, (role, _) in enumerate(turns[start:]):
        if role != ("user", "assistant")[number % 2]:
            raise InputError(f"{where}: turn {start + number + 1} is the {role}'s; user and assistant must alternate")
    full = next((i for i, (_, content) in enumerate(turns) if not content.strip()), len(turns))
    full -= (full - start) % 2
    if full - start < 2:
        raise InputError(f"{where}: an empty dialogue; a user's and an assistant's turn are the least")
    return [{"role": role, "content": content} for role, content in turns[:full]]


# Text


@dataclass(frozen=True)
class Example:
    """A dialogue as the model reads it: ids, and which of them carry loss (as what is to be predicted)."""

    ids: list[int]
    loss: list[bool]
    cut: bool = False  # turns at its end were left out

    def __len__(self) -> int:
        return len(self.ids)


def spans(messages: list[dict[str, str]], tokenizer: Tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """A dialogue in the checkpoint's chat template, and from where to where in it the assistant speaks.

    A span begins where generation would begin, and ends with the end-of-turn token, before the newline after it.
    """
    whole, found = tokenizer.chat(messages, add_generation_prompt=False), []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.chat(messages[:i], add_generation_prompt=True)
            after = tokenizer.chat(messages[: i + 1], add_generation_prompt=False).rstrip()
            if not (whole.startswith(before) and whole.startswith(after) and len(before) < len(after)):
                raise InputError(
                    f"{tokenizer.folder}: the chat template writes a turn differently when others follow, so that "
                    "what the assistant says cannot be told\nUse --format plain."
                )
            found.append((len(before), len(after)))
    return whole, found


def transcript(messages: list[dict[str, str]], words: dict[str, str]) -> tuple[str, list[tuple[int, int]]]:
    """A dialogue as "User: …" and "Assistant: …" lines, and the assistant's spans, from its label to its newline."""
    text, found = "", []
    for message in messages:
        label = words.get(message["role"], "")  # a system message has no label
        start = len(text) + len(label.rstrip())
        text += label + message["content"] + "\n"
        if message["role"] == "assistant":
            found.append((start, len(text)))
    return text, found


def render(messages, tokenizer: Tokenizer, format: str, words: dict[str, str], most: int) -> Example:
    """A dialogue as an Example of at most `most` tokens.

    A longer one ends after the last of the assistant's turns that fits; where not even the first does, the Example
    is empty. In plain format the last turn ends in the end-of-text token, which carries loss too.
    """
    chat = format == "chat"
    text, found = spans(messages, tokenizer) if chat else transcript(messages, words)
    ids, starts = tokenizer.encode_at(text, special=not chat)
    end_of_text = [] if chat else tokenizer.end_of_text
    loss, at, stop, kept = [False] * len(ids), 0, 0, 0
    for first, last in found:
        while at < len(ids) and starts[at] < first:
            at += 1
        begin = at
        while at < len(ids) and starts[at] < last:
            at += 1
        if at + len(end_of_text) > most:
            break
        loss[begin:at] = [True] * (at - begin)
        stop, kept = at, kept + 1
    if not kept:
        return Example([], [], cut=True)
    cut = kept < len(found)
    if chat and not cut and len(ids) <= most:
        stop = len(ids)  # the newline after the last turn, where the template writes one
    return Example(ids[:stop] + end_of_text, loss[:stop] + [True] * len(end_of_text), cut)


# Batches


def held_out(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the dialogues that are trained on, and of those that are not: every HELD_OUT-th."""
    numbers = np.arange(count)
    out = numbers % HELD_OUT == HELD_OUT - 1
    return numbers[~out], numbers[out]


def order(numbers: np.ndarray, seed: int, start: int) -> Iterator[tuple[int, int]]:
    """(cursor, number) of dialogues for ever, every epoch in an order of its own, from the cursor `start` on."""
    cursor = start
    while True:
        epoch, place = divmod(cursor, len(numbers))
        shuffled = np.random.default_rng([seed, epoch]).permutation(numbers)
        for number in shuffled[place:]:
            yield cursor, int(number)
            cursor += 1


def packs(examples: Iterator[tuple[int, Example]], tokens: int) -> Iterator[tuple[int, list[Example]]]:
    """Whole dialogues in batches of at most `tokens` tokens, each with the cursor of the dialogue that comes next."""
    waiting: list[Example] = []
    for cursor, example in examples:
        if waiting and sum(map(len, waiting)) + len(example) > tokens:
            yield cursor, waiting
            waiting = []
        waiting.append(example)
    if waiting:
        yield cursor + 1, waiting


def batch(examples: list[Example], multiple: int = 1) -> tuple[Forest, torch.Tensor, torch.Tensor]:
    """A forest of chains, and what is learned from it: the tokens that are read (R,) and what follows each (R,)."""
    examples = [example for example in examples if len(example)]
    forest, starts = pack([chain(example.ids) for example in examples], multiple=multiple)
    read = [
        start + i - 1 for start, example in zip(starts, examples) for i, carries in enumerate(example.loss) if carries
    ]
    read = torch.tensor(read)
    return forest, read, forest.tokens[read + 1]
