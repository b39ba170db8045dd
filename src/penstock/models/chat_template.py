"""A tokenizer's chat template, and the one place that decides which tokens end an answer.

A template is a program, so what it does is read off what it writes: it is probed once with a short conversation. Which
tokens of a text are learned is not known here; see `data/chat.py`.
"""

import datetime
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from penstock.errors import UserError, one_line

PLAIN_TEMPLATE = (
    "{% for m in messages %}"
    "{% if not loop.first %}{{ '\n\n' }}{% endif %}"
    "{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}Human: {{ m.content }}"
    "{% elif m.role == 'assistant' %}Assistant: {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{% if messages %}{{ '\n\n' }}{% endif %}Assistant:{% endif %}"
)
"""The template of tokenizers that have none."""
SYSTEM, QUESTION, ANSWER = "penstock probes", "what is asked", "what is answered"
DATE_CALL = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
NO_END = "the model names no token that ends an answer, so all go on to their limit"
NAMED = (
    "bos_token_id",
    "eos_token_id",
    "unk_token_id",
    "pad_token_id",
    "sep_token_id",
    "cls_token_id",
    "mask_token_id",
)


class ChatTemplate:
    """See the module. `arguments` are handed to the template; with a `date` (2026-01-31) that is its today."""

    def __init__(self, tokenizer: Any, arguments: Mapping[str, Any] | None = None, date: str | None = None) -> None:
        self.tokenizer, self.arguments = tokenizer, dict(arguments or {})
        own = tokenizer.chat_template
        self.own = bool(own)
        """False: the plain template."""
        sources = dict(own) if isinstance(own, dict) else {"default": own or PLAIN_TEMPLATE}
        if "default" not in sources:
            raise UserError(
                f"the tokenizer has chat templates named {', '.join(sources)} and none named default; name one so."
            )
        self.unread = [name for name in self.arguments if not re.search(rf"\b{re.escape(name)}\b", sources["default"])]
        """Arguments that the template does not name."""
        self._undated = sources["default"]
        self.sources = {name: _dated(source, date) for name, source in sources.items()}
        """By name: default, and tool_use for conversations with tools where there is one."""
        self.takes_system = True
        self.opening = ""
        """What opens an answer, where the template itself has no branch for add_generation_prompt."""
        self.amended: str | None = None
        """The default template with that branch."""
        self.end: int | None = None
        """The special token that it ends an answer with."""
        self._added = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
        self._probe()
        self.notes: list[str] = []
        """Lines for the user."""
        if date is not None and any("strftime_now(" in source for source in self.sources.values()):
            self.notes.append(f"the chat template reads today's date in a form that --date {date} does not reach")
        if self.opening:
            self.notes.append(
                f"the chat template has no branch for add_generation_prompt; {self.opening!r}, which it writes before "
                "an answer, now opens answers and is not learned"
            )
        asked, opened = (self._try([("user", QUESTION)], answer=answer) for answer in (False, True))
        self.chats = bool(opened.replace(QUESTION, "").strip())
        """Whether it writes more around a question than space."""
        around = (set(self._ids(asked)) & self._added) | (set(self._ids(opened)) & special_ids(tokenizer))
        named = {token for token in (getattr(tokenizer, name, None) for name in NAMED) if token is not None}
        structure: set[int] = named | around | (set() if self.end is None else {self.end})
        self.structure = frozenset(token for token in structure if not self._blank(token))
        """Ids of tokens that are no text: ends, BOS, padding, and what the template writes around a turn."""

    def render(self, messages: Sequence[Mapping[str, Any]], *, answer: bool = False, tools: Any = None) -> str:
        """The conversation as text; with `answer`, the opening of the assistant's next turn behind it."""
        return self._apply(messages, add_generation_prompt=answer, tools=tools, tokenize=False)

    def render_marked(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> tuple[list[int], list[int]]:
        """The conversation's ids, and 1 for those inside {% generation %} blocks; none where it has no such block."""
        if not GENERATION.search(self._source(tools)) or not hasattr(self.tokenizer, "backend_tokenizer"):
            return [], []
        flags: Any = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        masked = self._apply(messages, tools=tools, **flags)
        return list(masked["input_ids"]), list(masked["assistant_masks"])

    def _source(self, tools: Any) -> str:
        return self.sources["tool_use" if tools and "tool_use" in self.sources else "default"]

    def _apply(self, messages: Sequence[Mapping[str, Any]], *, tools: Any = None, **options: Any) -> Any:
        source = self._source(tools)
        options |= self.arguments | {"chat_template": source, "tools": list(tools) if tools else None}
        system = "developer" if "developer" in source else "system"  # the newer name of the same role
        turns = [{**m, "role": system} if m["role"] == "developer" else dict(m) for m in messages]
        return self.tokenizer.apply_chat_template(turns, **options)

    def _probe(self) -> None:
        """Reads off how an answer is opened and ended, and whether there is a system role."""
        asked, opened = (self._try([("user", QUESTION)], answer=answer) for answer in (False, True))
        answered = self._try([("user", QUESTION), ("assistant", ANSWER)])
        self.takes_system = not asked or SYSTEM in self._try([("system", SYSTEM), ("user", QUESTION)])
        closing = self._ids(answered.rpartition(ANSWER)[2]) if ANSWER in answered else []
        self.end = next((token for token in closing if token in self._added), None)
        if asked and asked == opened and answered.startswith(asked) and ANSWER in answered:
            header = answered[len(asked) :].partition(ANSWER)[0]
            if header.strip():
                branch = "{% if add_generation_prompt %}{{ " + json.dumps(header) + " }}{% endif %}"
                self.opening = header
                self.amended = self._undated + branch
                self.sources["default"] += branch

    def _try(self, turns: Sequence[tuple[str, str]], answer: bool = False) -> str:
        """What it writes; nothing where it refuses these turns."""
        try:
            return self.render([{"role": role, "content": content} for role, content in turns], answer=answer)
        except Exception:  # jinja's own, or what a template raises on purpose
            return ""

    def _blank(self, token: int) -> bool:
        """Some tokenizers add tokens of space and line ends to their vocabulary, and they are text."""
        return word_of(self.tokenizer, token).replace("\u2581", " ").isspace()

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids) if text else []


@dataclass(frozen=True)
class Ends:
    """The ids that end an answer."""

    ids: tuple[int, ...]
    """The first is written behind answers that no template ends."""
    note: str = ""
    """One line for the user where there is something to say about them."""


def ends_of(template: ChatTemplate | None, model_ids: Sequence[int], eos: str | None = None) -> Ends:
    """Which ids end an answer: --eos, the tokenizer's EOS, the template's end of turn, and `model_ids`, which
    config.json and generation_config.json name. Without a tokenizer `template` is None.

    An id of the configs that the tokenizer uses for ordinary text ends nothing. Raises UserError for an --eos that is
    no token.
    """
    if template is None:
        if eos is not None and not eos.isdigit():
            raise UserError(f"--eos {eos}: the model has no tokenizer; give the token's id.")
        ids = tuple(dict.fromkeys([*([int(eos)] if eos else []), *model_ids]))
        return Ends(ids, "" if ids else NO_END)
    tokenizer = template.tokenizer
    given = None if eos is None else _id_of(tokenizer, eos)
    known = {"--eos": given, "tokenizer": tokenizer.eos_token_id, "chat template": template.end}
    sources = {name: [token] for name, token in known.items() if token is not None}
    special = special_ids(tokenizer) | set(tokenizer.added_tokens_decoder)
    ordinary = [token for token in model_ids if sources and token not in special]
    if named := [token for token in model_ids if token not in ordinary]:
        sources["config"] = named
    ids = tuple(dict.fromkeys(token for tokens in sources.values() for token in tokens))
    notes = [] if ids else [NO_END]
    if any(set(tokens) != set(ids) for tokens in sources.values()):
        shown = [
            f"{word_of(tokenizer, token)} ({', '.join(name for name, tokens in sources.items() if token in tokens)})"
            for token in ids
        ]
        turns = f"; a chat turn is taught to end with {word_of(tokenizer, template.end)}" if template.end else ""
        notes.append(f"an answer ends at {' or '.join(shown)}{turns}")
    if ordinary:
        words = ", ".join(f"{token} ({word_of(tokenizer, token)})" for token in ordinary)
        notes.append(f"the config's end {words} is an ordinary token of this tokenizer, and ends nothing")
    return Ends(ids, "; ".join(notes))


def words_of(tokenizer: Any, ids: Sequence[int], hidden: Collection[int]) -> str:
    """The text of the ids without the `hidden` ones. Other special tokens (a <think>, say) are part of the text."""
    kept = [token for token in ids if token not in hidden]
    return tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def special_ids(tokenizer: Any) -> set[int]:
    """Ids that the tokenizer calls special, named (its EOS) or not (<|im_start|>)."""
    added = tokenizer.added_tokens_decoder.items()
    return {token for token, word in added if word.special} | set(tokenizer.all_special_ids)


def word_of(tokenizer: Any, token: int) -> str:
    """How a token is spelled."""
    return str(tokenizer.convert_ids_to_tokens(token))


def arguments_of(pairs: Sequence[str]) -> dict[str, Any]:
    """--template-args key=value ...: values as JSON where they are JSON, else as text."""
    arguments: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise UserError(f"--template-args {pair}: give pairs key=value, as in enable_thinking=false.")
        try:
            arguments[name] = json.loads(value)
        except ValueError:
            arguments[name] = value
    return arguments


def _dated(source: str, date: str | None) -> str:
    """The template with a day of its own in it: transformers lets no function of ours stand in for its clock."""
    if date is None:
        return source
    try:
        day = datetime.date.fromisoformat(date)
    except ValueError as error:
        raise UserError(f"--date {date}: {one_line(error).rstrip('.')}; write it as 2026-01-31.") from error
    return DATE_CALL.sub(lambda call: json.dumps(day.strftime(call[2])), source)


def _id_of(tokenizer: Any, word: str) -> int:
    vocabulary = tokenizer.get_vocab()
    if word not in vocabulary:
        shown = ", ".join(tokenizer.all_special_tokens[:8]) or "none"
        raise UserError(f"--eos {word}: is no token of the model's tokenizer; its special tokens: {shown}.")
    return vocabulary[word]
