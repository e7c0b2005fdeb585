import json
import shutil

import pytest
import sentencepiece
from conftest import BENCH
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from eicap import InputError
from eicap.tokenizer import Tokenizer


def message(role, content):
    return {"role": role, "content": content}


ONE = [message("user", "My sister moved out in 2019 and I can't settle.")]
MANY = [
    message("user", "I failed the exam."),
    message("assistant", "That sounds heavy. What hurts most?"),
    message("user", "Telling my father."),
]
ARABIC = [
    message("user", "رسبتُ في الامتحان يوم ١٢ آذار 2024."),
    message("assistant", "يبدو أنك حزين 😔"),
    message("user", "نعم، «جدًّا»!"),
]
WHITESPACE = [
    message("user", "  two\n\n\tlines  \n"),
    message("assistant", "\n   \n"),
    message("user", "trailing \u00a0space "),
]
SYSTEM = [message("system", "You listen."), *MANY]
CHATS = {"one": ONE, "many": MANY, "arabic": ARABIC, "whitespace": WHITESPACE, "system": SYSTEM}
FAMILIES = ["smollm2", "qwen2", "llama", "gemma2"]
TEXTS = ["", " ", "Answer: A", "In 2024, 1234567 times!", "مرحبا بك في ٢٠٢٤", "  a\n\n b\t ", "é 😀 e\u0301 <b>&amp;"]


@pytest.fixture
def folder(checkpoints, tmp_path):
    """A copy of a tokenizer without a chat template, to write one into."""
    shutil.copy(checkpoints["llama"] / "tokenizer.json", tmp_path)
    configure(tmp_path)
    return tmp_path


def configure(folder, **changes):
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | changes))


def named(request, family):
    return request.getfixturevalue("smollm2") if family == "smollm2" else request.getfixturevalue("checkpoints")[family]


@pytest.mark.parametrize("prompted", [True, False])
@pytest.mark.parametrize(
    "family, chat",
    [(family, chat) for family in FAMILIES for chat in CHATS if (family, chat) != ("gemma2", "system")],
)
def test_chat_equals_transformers(request, family, chat, prompted):
    path, messages = named(request, family), CHATS[chat]
    ours, theirs = Tokenizer(path), PreTrainedTokenizerFast.from_pretrained(path)
    text = ours.chat(messages, add_generation_prompt=prompted)
    assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompted)
    ids = theirs.apply_chat_template(messages, add_generation_prompt=prompted, return_dict=False)
    assert ours.encode([text], special=False) == [ids]
    assert ours.text(ids) == text


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_text_equals_transformers(request, family):
    path = named(request, family)
    lines = [(BENCH / f"{lang}.jsonl").read_text(encoding="utf-8").splitlines()[0] for lang in ("en", "ar")]
    theirs = PreTrainedTokenizerFast.from_pretrained(path)
    assert Tokenizer(path).encode(TEXTS + lines, special=True) == theirs(TEXTS + lines)["input_ids"]


@pytest.mark.parametrize("family, bos", [("llama", "<|begin_of_text|>"), ("gemma2", "<bos>")])
def test_rendered_chat_has_exactly_one_bos(checkpoints, family, bos):
    tokenizer = Tokenizer(checkpoints[family])
    ids = tokenizer.encode([tokenizer.chat(MANY)], special=False)[0]
    assert [i for i, piece in enumerate(tokenizer.pieces(ids)) if piece == bos] == [0]


@pytest.mark.parametrize("messages", [SYSTEM, MANY[1:], [*ONE, *ONE]])
def test_gemma_refuses_turns_that_do_not_alternate(checkpoints, messages):
    with pytest.raises(InputError, match="tiny-gemma2-instruct.*Conversation roles must alternate"):
        Tokenizer(checkpoints["gemma2"]).chat(messages)


def test_fingerprint_follows_every_tokenizer_file(folder):
    found = {Tokenizer(folder).fingerprint}
    configure(folder, chat_template="a")
    found.add(Tokenizer(folder).fingerprint)
    (folder / "chat_template.jinja").write_text("a")
    found.add(Tokenizer(folder).fingerprint)
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + "\n")
    found.add(Tokenizer(folder).fingerprint)
    assert len(found) == 4
    (folder / "README.md").write_text("not a tokenizer file")
    assert Tokenizer(folder).fingerprint in found


# Where the template is


def test_chat_template_jinja_wins_over_the_config(folder):
    configure(folder, chat_template="config")
    (folder / "chat_template.jinja").write_text("file {{ messages[0].content }} «é»\n", encoding="utf-8")
    assert Tokenizer(folder).chat(ONE) == f"file {ONE[0]['content']} «é»"
    assert PreTrainedTokenizerFast.from_pretrained(folder).apply_chat_template(ONE, tokenize=False) == Tokenizer(
        folder
    ).chat(ONE)


def test_of_named_templates_the_default_is_taken(folder):
    templates = [{"name": "tool_use", "template": "tool"}, {"name": "default", "template": "mine"}]
    configure(folder, chat_template=templates)
    assert Tokenizer(folder).chat(ONE) == "mine"
    assert PreTrainedTokenizerFast.from_pretrained(folder).apply_chat_template(ONE, tokenize=False) == "mine"


@pytest.mark.parametrize("templates", [None, [], [{"name": "tool_use", "template": "tool"}], [{"name": "default"}, 7]])
def test_no_template_is_refused_only_when_a_chat_is_wanted(folder, templates):
    configure(folder, chat_template=templates)
    tokenizer = Tokenizer(folder)
    assert len(tokenizer.encode(["hello"], special=True)[0]) > 1
    with pytest.raises(InputError, match="no chat template in this folder; use --format plain"):
        tokenizer.chat(ONE)


@pytest.mark.parametrize("template", [3, {"default": "a"}, [{"name": "default", "template": 3}]])
def test_template_that_is_not_text_is_refused(folder, template):
    configure(folder, chat_template=template)
    with pytest.raises(InputError, match="tokenizer_config.json: chat_template is not a text"):
        Tokenizer(folder)


def test_template_file_that_is_not_utf8_is_refused(folder):
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe{")
    with pytest.raises(InputError, match="chat_template.jinja: not UTF-8"):
        Tokenizer(folder)


# What a template may do


TEMPLATES = {
    "generation": "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}\n"
    "  {{ m.content }}\n  {% endgeneration %}\n{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "tojson": "{{ messages | tojson }}{{ {'b': '<é&\"ح>', 'a': [1, none]} | tojson(indent=2, sort_keys=true) }}"
    "{{ 'é' | tojson(ensure_ascii=true) }}{{ [1, 2] | tojson(separators=(',', ':')) }}",
    "trim and lstrip": "\n   {% if true %}\n  a  \n   {# comment #}\n{% endif %}\n\t{% for m in messages %}\n"
    "  {{ m.role }}\n{% endfor %}\n  {%- if true -%}  x  {%- endif %}\n\n",
    "loop controls": "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ m.content }}"
    "{% if loop.index0 == 2 %}{% break %}{% endif %}{% endfor %}",
    "variables": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ tools is none }}|{{ documents is none }}|"
    "{{ tools is defined }}|{{ nothing is defined }}|{{ add_generation_prompt }}|{{ strftime_now('%Y') | length }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m.content | length %}"
    "{% endfor %}{{ ns.n }}{{ dict(a=1) }}{{ messages[1:] | map(attribute='role') | join(',') }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_features_equal_transformers(folder, name):
    configure(folder, chat_template=TEMPLATES[name], pad_token=None)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    for prompted in (True, False):
        expected = theirs.apply_chat_template(SYSTEM, tokenize=False, add_generation_prompt=prompted)
        assert expected
        assert Tokenizer(folder).chat(SYSTEM, add_generation_prompt=prompted) == expected


def test_special_token_given_as_an_object_is_its_content(folder):
    bos = {"__type": "AddedToken", "content": "<|begin_of_text|>", "lstrip": False, "special": True}
    configure(folder, bos_token=bos, chat_template="{{ bos_token }}!")
    assert Tokenizer(folder).chat(ONE) == "<|begin_of_text|>!"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'content': 'x'}) }}",
        "{{ raise_exception.__globals__['__builtins__'] }}",
        "{{ strftime_now.__globals__.items() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
    ],
)
def test_template_that_reaches_out_of_the_sandbox_is_refused(folder, template):
    configure(folder, chat_template=template)
    messages = [dict(m) for m in ONE]
    with pytest.raises(InputError, match="the chat template (was refused|failed)"):
        Tokenizer(folder).chat(messages)
    assert messages == ONE


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{% for m in messages %}", "endfor"),
        ("{{ messages | nosuchfilter }}", "nosuchfilter"),
        ("{% include 'other' %}", ""),
        ("{{ nothing.at.all }}", "nothing"),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ range(99999999) | list }}", "[Rr]ange"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ raise_exception('only one turn') }}", "only one turn"),
    ],
)
def test_template_that_fails_is_an_input_error(folder, template, reason):
    configure(folder, chat_template=template)
    with pytest.raises(InputError, match=f"the chat template failed: .*{reason}"):
        Tokenizer(folder).chat(ONE)


# Broken files


def test_missing_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match="neither tokenizer.json nor tokenizer.model"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"version": "1.0", "model": {"type": "?"}}']
)
def test_garbled_tokenizer_json_is_refused(folder, content):
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError, match="tokenizer.json: cannot be read as a tokenizer"):
        Tokenizer(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_garbled_tokenizer_config_is_refused(folder, content):
    (folder / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(InputError, match="tokenizer_config.json: "):
        Tokenizer(folder)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\xff" * 100])
def test_garbled_sentencepiece_model_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(InputError, match="tokenizer.model: cannot be read as a SentencePiece model"):
        Tokenizer(tmp_path)


def test_truncation_and_padding_in_tokenizer_json_are_ignored(folder):
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    whole = Tokenizer(folder).encode(["one two three four five six", "a"], special=True)
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": 8, "pad_id": 0, "pad_type_id": 0}
    content["padding"] = padding | {"pad_token": "<|begin_of_text|>"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer(folder).encode(["one two three four five six", "a"], special=True) == whole
    assert len(whole[0]) > 4 and len(whole[1]) == 2


# SentencePiece


@pytest.fixture(scope="module")
def gemma_like(tmp_path_factory):
    """A SentencePiece model made the way Gemma's is: byte fallback, no dummy prefix, turns as user-defined symbols."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    train_sentencepiece(folder, bos_id=2, eos_id=1, pad_id=0, unk_id=3, bos_piece="<bos>", eos_piece="<eos>")
    configure(folder, tokenizer_class="GemmaTokenizer", bos_token="<bos>", eos_token="<eos>", chat_template="{{ 1 }}")
    return folder


def train_sentencepiece(folder, **changes):
    lines = [
        line for lang in ("en", "ar") for line in (BENCH / f"{lang}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    turns = (turn["content"] for line in lines for turn in json.loads(line)["turns"])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=turns,
        model_prefix=str(folder / "tokenizer"),
        vocab_size=900,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.99,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>", "\n"],
        num_threads=1,
        minloglevel=2,
        **changes,
    )


def test_sentencepiece_ids_equal_the_library(gemma_like):
    library = sentencepiece.SentencePieceProcessor(model_file=str(gemma_like / "tokenizer.model"))
    chat = "<start_of_turn>user\n  Hi  there 2024 مرحبا 😀<end_of_turn>\n<start_of_turn>model\n"
    texts = [*TEXTS, chat]
    tokenizer = Tokenizer(gemma_like)
    assert tokenizer.encode(texts, special=False) == library.encode(texts)
    assert tokenizer.encode(texts, special=True) == library.encode(texts, add_bos=True)
    assert [tokenizer.text(ids) for ids in library.encode(texts)] == texts


def test_sentencepiece_control_symbols_in_a_chat_are_one_id(gemma_like):
    library = sentencepiece.SentencePieceProcessor(model_file=str(gemma_like / "tokenizer.model"))
    text = "<bos><start_of_turn>user\nHi <eos> there<end_of_turn>\n<eos>"
    eos = library.eos_id()
    expected = [library.bos_id(), *library.encode("<start_of_turn>user\nHi "), eos]
    expected += [*library.encode(" there<end_of_turn>\n"), eos]
    tokenizer = Tokenizer(gemma_like)
    assert tokenizer.encode([text], special=False) == [expected]
    assert AutoTokenizer.from_pretrained(gemma_like)(text, add_special_tokens=False)["input_ids"] == expected
    assert tokenizer.text(expected) == text
    assert "".join(tokenizer.pieces(expected)[-2:]) == "\n<eos>"


def test_sentencepiece_added_token_of_the_config_is_one_id(gemma_like, tmp_path):
    shutil.copy(gemma_like / "tokenizer.model", tmp_path)
    configure(tmp_path, added_tokens_decoder={"900": {"content": "<extra>", "special": True}})
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ids = Tokenizer(tmp_path).encode(["hi<extra>you"], special=False)[0]
    assert ids == [*library.encode("hi"), 900, *library.encode("you")]
    assert Tokenizer(tmp_path).text(ids) == "hi<extra>you"
    configure(tmp_path, added_tokens_decoder={"900": "<extra>"})
    with pytest.raises(InputError, match="tokenizer_config.json: added_tokens_decoder is garbled"):
        Tokenizer(tmp_path)


def test_sentencepiece_bos_is_left_out_where_the_config_or_the_model_has_none(gemma_like, tmp_path):
    shutil.copy(gemma_like / "tokenizer.model", tmp_path)
    configure(tmp_path, add_bos_token=False)
    without = Tokenizer(tmp_path)
    assert without.encode(TEXTS, special=True) == without.encode(TEXTS, special=False)

    (tmp_path / "bare").mkdir()
    train_sentencepiece(tmp_path / "bare", bos_id=-1, eos_id=-1, pad_id=-1, unk_id=0)
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "bare" / "tokenizer.model"))
    assert Tokenizer(tmp_path / "bare").encode(TEXTS, special=True) == library.encode(TEXTS)
