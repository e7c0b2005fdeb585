"""Text to token ids and back, and messages to text through the checkpoint's own chat template.

`tokenizer.json` is read by `tokenizers`, `tokenizer.model` by `sentencepiece`. A chat template is a jinja2
program that came with the weights: it runs in a sandbox, with the variables, filters and whitespace settings
that transformers gives it (https://huggingface.co/docs/transformers/chat_templating).
"""

import hashlib
import itertools
import json
import re
from datetime import datetime
from functools import cache
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import sentencepiece
import tokenizers

from eicap import InputError
from eicap.checkpoint import read_json

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")


class Tokenizer:
    """The tokenizer of a checkpoint folder.

    Attributes: `fingerprint`, the sha256 of the files it was read from; `template`, the chat template or None.
    Raises InputError where the folder has no tokenizer or one that cannot be read.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        config_path = self.folder / "tokenizer_config.json"
        config = read_json(config_path) if config_path.is_file() else {}
        self.special = _special_tokens(config)  # what a template may write: bos_token, eos_token, …
        self.template = _chat_template(self.folder, config)
        if (self.folder / "tokenizer.json").is_file():
            self.backend = _JsonBackend(self.folder / "tokenizer.json")
        elif (self.folder / "tokenizer.model").is_file():
            self.backend = _SentencePieceBackend(self.folder / "tokenizer.model", config)
        else:
            raise InputError(f"{self.folder}: neither tokenizer.json nor tokenizer.model in this folder")
        digest = hashlib.sha256()
        for name in FILES:
            if (self.folder / name).is_file():
                digest.update(name.encode() + (self.folder / name).read_bytes())
        self.fingerprint = digest.hexdigest()

    @property
    def end_of_text(self) -> list[int]:
        """The end-of-text token, as a list of its id; empty where the tokenizer names none."""
        token = self.special.get("eos_token")
        return self.encode([token], special=False)[0] if token else []

    def encode(self, texts: list[str], special: bool) -> list[list[int]]:
        """Ids of each text. special: add what the tokenizer adds by default (a BOS, where it has one)."""
        return self.backend.encode(texts, special)

    def encode_at(self, text: str, special: bool) -> tuple[list[int], list[int]]:
        """Ids of a text, and at which of its characters each token starts."""
        return self.backend.encode_at(text, special)

    def pieces(self, ids: list[int]) -> list[str]:
        """Each id as readable text, special tokens included."""
        return self.backend.pieces(ids)

    def text(self, ids: list[int]) -> str:
        """What the ids say, special tokens included."""
        return self.backend.text(ids)

    def chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages ({"role", "content"}) as the chat template writes them.

        Raises InputError where there is no template, or where the template fails or refuses the messages.
        """
        if self.template is None:
            raise InputError(f"{self.folder}: no chat template in this folder; use --format plain")
        try:
            return _compile(self.template).render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special,
            )
        except jinja2.exceptions.SecurityError as error:
            raise InputError(f"{self.folder}: the chat template was refused: {error}") from None
        except Exception as error:  # a template is a program, and can fail in any way
            raise InputError(f"{self.folder}: the chat template failed: {str(error) or type(error).__name__}") from None


class _JsonBackend:
    def __init__(self, path: Path):
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise InputError(f"{path}: cannot be read as a tokenizer ({error})") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def encode(self, texts, special):
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=special)]

    def encode_at(self, text, special):
        encoding = self.tokenizer.encode(text, add_special_tokens=special)
        return encoding.ids, [start for start, _ in encoding.offsets]

    def pieces(self, ids):
        return [self.tokenizer.decode([i], skip_special_tokens=False) for i in ids]

    def text(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False)


class _SentencePieceBackend:
    """SentencePiece knows no special tokens in text: the text is cut at them first, as transformers does."""

    def __init__(self, path: Path, config: dict):
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise InputError(f"{path}: cannot be read as a SentencePiece model ({error})") from None
        ids = range(self.model.get_piece_size())
        self.special = {self.model.id_to_piece(i): i for i in ids if self.model.is_control(i)}
        try:
            added = {token["content"]: int(index) for index, token in config.get("added_tokens_decoder", {}).items()}
        except (TypeError, ValueError, KeyError, AttributeError):
            raise InputError(f"{path.parent / 'tokenizer_config.json'}: added_tokens_decoder is garbled") from None
        self.special |= added
        self.names = {index: token for token, index in self.special.items()}
        longest_first = sorted(self.special, key=len, reverse=True)
        self.cut = re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")
        self.bos = [self.model.bos_id()] if config.get("add_bos_token", True) and self.model.bos_id() >= 0 else []

    def encode(self, texts, special):
        return [(self.bos if special else []) + self._encode(text) for text in texts]

    def _encode(self, text):
        ids = []
        for part in self.cut.split(text):
            ids += [self.special[part]] if part in self.special else self.model.encode(part)
        return ids

    def encode_at(self, text, special):
        ids, starts, at = (self.bos if special else [])[:], [0] * (len(self.bos) if special else 0), 0
        for part in self.cut.split(text):
            if part in self.special:
                ids, starts = ids + [self.special[part]], starts + [at]
            else:
                found = self.model.encode(part, return_type="offset_mapping")
                ids, starts = ids + found["ids"], starts + [at + start for start, _ in found["offsets"]]
            at += len(part)
        return ids, starts

    def pieces(self, ids):
        return [self.names.get(i) or self.model.id_to_piece(i).replace("▁", " ") for i in ids]

    def text(self, ids):
        runs = itertools.groupby(ids, key=self.names.__contains__)  # decode drops the special ones
        return "".join(
            "".join(map(self.names.get, run)) if named else self.model.decode(list(run)) for named, run in runs
        )


def _special_tokens(config: dict) -> dict[str, str]:
    """bos_token, eos_token, … of tokenizer_config.json; each is a string or an object with `content`."""
    tokens = {k: v for k, v in config.items() if k.endswith("_token")}
    tokens = {k: v.get("content") if isinstance(v, dict) else v for k, v in tokens.items()}
    return {k: v for k, v in tokens.items() if isinstance(v, str)}


def _chat_template(folder: Path, config: dict) -> str | None:
    """The template in chat_template.jinja, else in tokenizer_config.json (of several, the default one)."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except ValueError as error:
            raise InputError(f"{path}: not UTF-8 ({error})") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        template = next(
            (t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), None
        )
    if not isinstance(template, str | None):
        raise InputError(f"{folder / 'tokenizer_config.json'}: chat_template is not a text")
    return template


class _Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %} marks what an assistant wrote; here it is just its contents."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=line)


@cache
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda pattern: datetime.now().strftime(pattern),
    }
    return environment.from_string(template)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message):
    raise jinja2.TemplateError(message)
