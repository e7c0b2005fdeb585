"""Dialogues into training batches: files, what carries loss, packing."""

import itertools
import json
import os

import pytest
import sentencepiece
from conftest import CHATML, GEMMA, LLAMA3, ROOT
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from eicap import InputError, prompt, ultrachat
from eicap.checkpoint import find
from eicap.tokenizer import Tokenizer

SAMPLES = ROOT / "data" / "ultrachat"
WORDS = prompt.read_wording()
TALK = [
    "Hi there! How are you?",
    "Fine.\nAnd you?",
    "Tell me a joke, please.",
    "No :-) — ثلاث نكات: 1, 2, 3",
    "Bye",
    "So long.",
]


def messages(turns=TALK):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def write(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


# Files


def test_both_formats_say_the_same(tmp_path):
    file = write(tmp_path / "a.jsonl", {"id": "1", "data": TALK}, {"messages": messages()})
    dialogues = ultrachat.Dialogues([file])
    assert len(dialogues) == 2 and dialogues[0] == dialogues[1] == messages()


def test_a_system_message_stays_a_trailing_user_turn_and_what_follows_an_empty_turn_go(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    file = write(
        tmp_path / "a.jsonl",
        {"messages": [system, *messages()]},
        {"data": TALK[:3]},
        {"data": [*TALK[:2], "And then?", " ", *TALK]},
    )
    found = list(ultrachat.Dialogues([file]))
    assert found == [[system, *messages()], messages(TALK[:2]), messages(TALK[:2])]


def test_dialogues_of_several_files_are_numbered_through_and_read_from_disk(tmp_path):
    files = [
        write(tmp_path / f"{name}.jsonl", *({"data": [f"{name}{i} ü", "answer " * i or "x"]} for i in range(count)))
        for name, count in (("a", 3), ("b", 1), ("c", 5))
    ]
    dialogues = ultrachat.Dialogues(files)
    assert len(dialogues) == 9
    assert [d[0]["content"] for d in dialogues] == [
        f"{n}{i} ü" for n, c in (("a", 3), ("b", 1), ("c", 5)) for i in range(c)
    ]
    assert [dialogues.file_of(i) for i in range(9)] == [0, 0, 0, 1, 2, 2, 2, 2, 2]
    files[1].write_bytes(files[1].read_bytes().replace(b"b0", b"B9"))  # what is read is what is on disk now
    assert dialogues[3][0]["content"] == "B9 ü"


def test_of_a_large_file_only_the_offsets_are_in_memory(tmp_path):
    line = json.dumps({"data": ["question " * 100, "answer " * 500]}) + "\n"
    file = tmp_path / "large.jsonl"
    file.write_text(line * 5000)
    before = resident()
    dialogues = ultrachat.Dialogues([file])
    assert file.stat().st_size > 20e6 and len(dialogues) == 5000
    assert resident() - before < 5e6
    assert dialogues.offsets[0].nbytes == 8 * 5000 and dialogues[4999][1]["content"].startswith("answer")


def resident() -> int:
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ('["a", "b"]', "neither"),
        ('{"text": "a"}', "neither"),
        ('{"data": []}', "empty dialogue"),
        ('{"data": ["only a question"]}', "empty dialogue"),
        ('{"data": ["", "answer"]}', "empty dialogue"),
        ('{"data": ["a", 3]}', "turn 2 lacks"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "turn 1 is the assistant's"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}', "turn 2 is the user's"),
        ('{"messages": [{"role": "user", "content": "a"}, {"content": "b"}]}', "turn 2 lacks"),
        ('{"messages": ["a", "b"]}', "without role"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, words):
    file = tmp_path / "bad.jsonl"
    good = json.dumps({"data": TALK})
    file.write_text(f"{good}\n{good}\n{line}\n{good}\n")
    with pytest.raises(InputError, match=rf"bad\.jsonl, line 3: .*{words}"):
        ultrachat.Dialogues([file])


def test_files_that_are_missing_empty_or_not_utf_8_are_named(tmp_path):
    with pytest.raises(InputError, match="none.jsonl"):
        ultrachat.Dialogues([tmp_path / "none.jsonl"])
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(InputError, match="empty.jsonl: the file is empty"):
        ultrachat.Dialogues([tmp_path / "empty.jsonl"])
    (tmp_path / "latin.jsonl").write_bytes(json.dumps({"data": ["\xe9", "b"]}, ensure_ascii=False).encode("latin-1"))
    with pytest.raises(InputError, match="latin.jsonl, line 1"):
        ultrachat.Dialogues([tmp_path / "latin.jsonl"])


# What carries loss


def parts(turns, template: str) -> list[tuple[str, bool]]:
    """A dialogue written out by hand in each format: pieces of text, and whether they carry loss."""
    found = (
        [("<|begin_of_text|>", False)] if template == "llama3" else [("<bos>", False)] if template == "gemma" else []
    )
    for i, text in enumerate(turns):
        mine = i % 2 == 1
        if template == "chatml":
            found += [
                (f"<|im_start|>{('user', 'assistant')[i % 2]}\n", False),
                (text + "<|im_end|>", mine),
                ("\n", False),
            ]
        elif template == "llama3":
            role = ("user", "assistant")[i % 2]
            found += [(f"<|start_header_id|>{role}<|end_header_id|>\n\n", False), (text + "<|eot_id|>", mine)]
        elif template == "gemma":
            role = ("user", "model")[i % 2]
            found += [(f"<start_of_turn>{role}\n", False), (text + "<end_of_turn>", mine), ("\n", False)]
        else:
            found += [(("User:", "Assistant:")[i % 2], False), (f" {text}\n", mine)]
    return found


def by_hand(tokenizer, turns, template) -> tuple[list[int], list[bool]]:
    """Ids and loss of each, piece by piece through transformers' tokenizer."""
    ids, loss = [], []
    for text, mine in parts(turns, template):
        new = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids, loss = ids + new, loss + [mine] * len(new)
    return ids, loss


TEMPLATES = {"qwen2": "chatml", "llama": "llama3", "gemma2": "gemma"}


@pytest.mark.parametrize("family", TEMPLATES)
def test_loss_is_on_the_assistants_words_and_end_of_turn_token_by_token(checkpoints, family):
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(checkpoints[family] / "tokenizer.json"))
    example = ultrachat.render(messages(), Tokenizer(checkpoints[family]), "chat", WORDS["en"], 2048)
    assert (example.ids, example.loss) == by_hand(theirs, TALK, TEMPLATES[family])
    template = {"qwen2": CHATML, "llama": LLAMA3, "gemma2": GEMMA}[family]
    theirs.bos_token = {"llama": "<|begin_of_text|>", "gemma2": "<bos>"}.get(family)
    assert example.ids == theirs.apply_chat_template(messages(), chat_template=template, return_dict=False)


def test_the_small_real_model_reads_the_samples_as_transformers_does(smollm2):
    theirs, tokenizer = AutoTokenizer.from_pretrained(smollm2), Tokenizer(smollm2)
    end = theirs.convert_tokens_to_ids("<|im_end|>")
    for dialogue in ultrachat.Dialogues([SAMPLES / "en.jsonl", SAMPLES / "ar.jsonl"]):
        example = ultrachat.render(dialogue, tokenizer, "chat", {}, 10**6)
        assert not example.cut
        assert example.ids == theirs.apply_chat_template(dialogue, return_dict=False)
        said = [
            list(group)
            for carries, group in itertools.groupby(zip(example.ids, example.loss), lambda p: p[1])
            if carries
        ]
        assert all(ids[-1][0] == end for ids in said)
        texts = [theirs.decode([i for i, _ in ids[:-1]]) for ids in said]
        assert texts == [turn["content"] for turn in dialogue if turn["role"] == "assistant"]


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_plain_transcript_ends_each_answer_in_a_newline_and_the_last_in_end_of_text(checkpoints, family):
    tokenizer = Tokenizer(checkpoints[family])
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(checkpoints[family] / "tokenizer.json"))
    ids, loss = by_hand(theirs, TALK, "plain")
    if family != "qwen2":  # these put a BOS in front
        ids, loss = tokenizer.encode([""], special=True)[0] + ids, [False] + loss
    example = ultrachat.render(messages(), tokenizer, "plain", WORDS["en"], 2048)
    assert (example.ids, example.loss) == (ids + tokenizer.end_of_text, loss + [True])
    assert len(tokenizer.end_of_text) == 1


def test_sentencepiece_says_where_its_tokens_start(tmp_path):
    text = "\n".join(["User: hello there, how are you", "Assistant: fine thanks and you", "نعم شكرا لك"] * 40)
    (tmp_path / "text").write_text(text)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=90, hard_vocab_limit=False,
        control_symbols=["<turn>"], add_dummy_prefix=False, minloglevel=2,
    )  # fmt: skip
    tokenizer = Tokenizer(tmp_path)
    text = "<turn>hello نعم<turn>there you"
    ids, starts = tokenizer.encode_at(text, special=False)
    assert ids == tokenizer.encode([text], special=False)[0]
    ends = [*starts[1:], len(text)]
    assert [text[a:b] for a, b in zip(starts, ends)] == tokenizer.pieces(ids)


def test_a_template_that_rewrites_earlier_turns_is_refused(checkpoints, tmp_path):
    tokenizer = Tokenizer(checkpoints["qwen2"])
    tokenizer.template = "{{ messages | length }}" + CHATML
    with pytest.raises(InputError, match="differently"):
        ultrachat.render(messages(), tokenizer, "chat", WORDS["en"], 2048)


@pytest.mark.parametrize("format", ["chat", "plain"])
def test_a_long_dialogue_is_cut_after_the_last_answer_that_fits(checkpoints, format):
    tokenizer = Tokenizer(checkpoints["qwen2"])
    whole = [ultrachat.render(messages(TALK[:n]), tokenizer, format, WORDS["en"], 2048) for n in (2, 4, 6)]
    newline = 1 if format == "chat" else 0  # after the last turn, which a cut leaves out
    for most in range(1, len(whole[2])):
        example = ultrachat.render(messages(), tokenizer, format, WORDS["en"], most)
        fits = [one for one in whole[:3] if len(one) - newline <= most]
        expected = fits[-1] if fits else ultrachat.Example([], [])
        stop = len(expected) - newline if fits else 0
        assert (example.ids, example.loss) == (expected.ids[:stop], expected.loss[:stop])
        assert example.cut == (not fits or fits[-1] is not whole[2])
        assert len(example) <= most


# Batches


def test_every_twentieth_dialogue_is_held_out():
    trained, unseen = ultrachat.held_out(60)
    assert unseen.tolist() == [19, 39, 59] and sorted([*trained, *unseen]) == list(range(60))
    assert ultrachat.held_out(5)[1].tolist() == []


def test_every_epoch_has_every_dialogue_once_in_an_order_of_its_own():
    numbers, _ = ultrachat.held_out(45)
    taken = list(itertools.islice(ultrachat.order(numbers, 3, 0), 3 * len(numbers)))
    epochs = [[number for _, number in taken[i : i + len(numbers)]] for i in range(0, len(taken), len(numbers))]
    assert all(sorted(epoch) == numbers.tolist() for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [cursor for cursor, _ in taken] == list(range(len(taken)))
    for start in (1, 42, 43, 100):  # a restart goes on with the same dialogue
        assert list(itertools.islice(ultrachat.order(numbers, 3, start), 20)) == taken[start : start + 20]
    assert [n for _, n in itertools.islice(ultrachat.order(numbers, 4, 0), 43)] != epochs[0]


def make(*lengths):
    return [(i, ultrachat.Example([i] * n, [False] + [True] * (n - 1))) for i, n in enumerate(lengths, start=7)]


def test_packs_hold_whole_dialogues_and_know_the_next_one():
    found = list(ultrachat.packs(iter(make(4, 3, 4, 0, 10, 1, 1)), 10))
    assert [[len(e) for e in pack] for _, pack in found] == [[4, 3], [4, 0], [10], [1, 1]]
    assert [cursor for cursor, _ in found] == [9, 11, 12, 14]
    everything = make(4, 3, 4, 0, 10, 1, 1)
    again = list(ultrachat.packs(iter(everything[9 - 7 :]), 10))  # from the first pack's cursor
    assert again == found[1:]


def test_a_batch_reads_before_every_token_that_carries_loss():
    examples = [ultrachat.Example([5, 6, 7, 8], [False, False, True, True]), ultrachat.Example([], [])]
    examples.append(ultrachat.Example([9, 3, 4], [False, True, False]))
    forest, read, target = ultrachat.batch(examples)
    assert forest.tokens.tolist() == [5, 6, 7, 8, 9, 3, 4] and forest.positions.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert forest.ends.tolist() == [4] * 4 + [7] * 3
    assert read.tolist() == [1, 2, 4] and target.tolist() == [7, 8, 3]
    assert len(ultrachat.batch(examples, multiple=64)[0]) == 64


# The samples


@pytest.mark.parametrize("lang", ["en", "ar"])
def test_the_samples_are_sixty_different_dialogues_in_their_language(lang):
    rows = [json.loads(line) for line in (SAMPLES / f"{lang}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in rows] == [f"uc-{lang}-{i:03}" for i in range(1, 61)]
    assert all(len(row["data"]) % 2 == 0 and all(text and text == text.strip() for text in row["data"]) for row in rows)
    turns = [text for row in rows for text in row["data"]]
    assert len(set(turns)) == len(turns)
    openings = [" ".join(text.split()[:5]) for row in rows for text in row["data"][1::2]]
    assert len(set(openings)) == len(openings)
    for row in rows:
        letters = [c for text in row["data"] for c in text if c.isalpha()]
        arabic = sum("\u0600" <= c <= "\u06ff" for c in letters) / len(letters)
        assert arabic > 0.6 if lang == "ar" else arabic < 0.05, row["id"]


def test_the_demo_checkpoint_has_a_chat_template_for_training():
    assert Tokenizer(find("smollm2-135m-instruct")).template
