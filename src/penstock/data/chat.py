"""From records to token ids and back: the model's own tokenizer and chat template, one end per answer, at most one BOS.

Prompt strings are used as they are; messages go through the tokenizer's chat template, or a plain built-in one when it
has none. Demonstrations, comparisons and prompts share these lines, so that the reward model and PPO see exactly what
SFT was trained on (PPO.md 11).
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any, Literal

from penstock.config import DataFlags
from penstock.data.field_checks import REASONING, Message
from penstock.data.limits import Example, Limits, TooLongError, without_end
from penstock.data.pieces import Pieces
from penstock.data.records import Comparison, Demonstration, Prompt, Vote
from penstock.errors import DataError, UserError, one_line
from penstock.models.chat_template import ChatTemplate, arguments_of, ends_of, word_of, words_of
from penstock.models.tokenizer_files import check_fit, load_tokenizer

PLAIN = "plain prompts are read without the model's chat template; --apply-chat-template makes each a user's turn"
Task = Literal["train", "answer", "judge"]
SYSTEM = ("system", "developer")
REWRITTEN = "conversations whose answers are learned in a row each: the template rewrites earlier turns"
QUOTED = "words in texts spell ends or tokens of the chat template; they are read as ordinary text"


class Encoder:
    """A tokenizer (or none, for data of ids), the ids that end a response, and how long a row may be.

    What does not fit `max_length` is treated as `limits.Limits` says, by --truncate.
    """

    def __init__(
        self, tokenizer: Any, *, eos_ids: Sequence[int], vocab_size: int, max_length: int, reserve: int = 1,
        flags: DataFlags | None = None, template: ChatTemplate | None = None,
    ) -> None:  # fmt: skip
        self.tokenizer, self.eos_ids, self.vocab_size = tokenizer, tuple(eos_ids), vocab_size
        self.flags, self.max_length = flags or DataFlags(data=()), max_length
        self.limits = Limits(max_length, max(reserve, 1), self.flags.truncate)
        if self.limits.reserve >= max_length:
            raise UserError(
                f"{self.limits.reserve} new tokens leave no room for a prompt in rows of {max_length}; give "
                f"--max-new-tokens {max(max_length // 2, 1)}, or a larger --max-length if the model allows."
            )
        self.facts: list[str] = []
        """Lines for the user about the model's tokenizer and template."""
        self.notes, self._note = self.limits.notes, self.limits.note
        """What was done to records that users must know, in words, and how many times; `take_notes` gives lines."""
        self.hidden = frozenset(self.eos_ids)
        """Ids that are no text: `decode` leaves them out."""
        self.template: Any = None
        """A ChatTemplate where there is a tokenizer."""
        if tokenizer is not None:
            self.template = template or ChatTemplate(tokenizer)
            self.hidden |= self.template.structure
            self._pieces = Pieces(tokenizer, self.hidden)
            # Only a tokenizer that puts a BOS in front by itself wants one: GPT-2's has one and never uses it.
            bos = [tokenizer.bos_token_id]
            self.limits.bos = bos if tokenizer("a").input_ids[:1] == bos else []

    @staticmethod
    def for_model(
        source: str, *, eos_ids: Sequence[int], vocab_size: int, max_length: int, reserve: int = 1,
        flags: DataFlags | None = None, task: Task = "train",
    ) -> "Encoder":  # fmt: skip
        """The encoder of the model at `source`; `eos_ids` are those that its configs name.

        Raises UserError when its tokenizer does not fit the model, for template arguments that nothing reads, and in
        training when nothing ends an answer. A judge reads what another model writes: of the flags that name parts of
        a tokenizer or template it takes those that it has.
        """
        flags, tokenizer, template = flags or DataFlags(data=()), load_tokenizer(source), None
        if tokenizer is not None:
            check_fit(tokenizer, vocab_size, source)
            template = ChatTemplate(tokenizer, arguments_of(flags.template_args), flags.date)
            if template.unread and task != "judge":
                raise UserError(f"--template-args {template.unread[0]}: the chat template reads no such argument.")
        ends = ends_of(template, eos_ids, flags.eos if task != "judge" else None)
        if task == "train" and not ends.ids:
            raise UserError(
                f"{source}: the model names no end-of-sequence token, so no response could ever end; give the token "
                "that is to end them: --eos TOKEN."
            )
        encoder = Encoder(
            tokenizer, eos_ids=ends.ids, vocab_size=vocab_size, max_length=max_length, reserve=reserve, flags=flags,
            template=template,
        )  # fmt: skip
        facts = [ends.note, *(template.notes if template else ())]
        encoder.facts = [f"{source}: {fact}" for fact in facts if fact]
        return encoder

    def take_notes(self) -> list[str]:
        """What the user should know of all that was encoded since the last call, a line each."""
        lines = [*self.facts, *(f"{count} {note}" for note, count in self.notes.items())]
        self.facts = []
        self.notes.clear()
        return lines

    def encode_prompt(self, record: Prompt, beginning: str = "", *, opened: bool = True) -> list[int]:
        """What precedes the response, or of a chat's response that begins so what precedes its rest: that beginning
        stands right behind what opens an answer, as if the model had sampled it. Not `opened`: of messages without it.

        Raises TooLongError when it leaves no room for `reserve` tokens.
        """
        record = self._prepared(record)
        prompt = self._prompt(record, opened)
        if beginning:
            before = self._render(record, record.messages or (), answer=True)
            prompt += self._tokens(self._pieces.quote(beginning), record.where, before)
        return self.limits.shortened(prompt, self.max_length - self.limits.reserve, record.where)

    def encode_demonstration(self, record: Demonstration) -> Example:
        """The row with the assistant's tokens marked; where there are several, the last answer's."""
        return self.encode_rows(record)[-1]

    def encode_rows(self, record: Demonstration) -> list[Example]:
        """All that a demonstration teaches: its row; or, where the template rewrites earlier turns and so writes an
        answer as it is sampled only at the end, a row for each answer."""
        record = self._prepared(record)
        if record.messages is None:
            return [self._answered(record)]
        row = self._marked(record) or self._dialogue(record, record.messages)
        if row is None:
            return self._row_per_answer(record)
        row = without_end(row, self.eos_ids) if record.cut and record.messages[-1].get("weight", 1) else row
        if self.flags.train_on == "last":
            end = max((i for i, trained in enumerate(row.trained) if trained), default=0)
            start = max((i for i in range(end) if not row.trained[i]), default=-1)
            row = Example(row.tokens, [trained and i > start for i, trained in enumerate(row.trained)])
        return [self.limits.cut(row, record.where)]

    def encode_comparison(self, record: Comparison) -> tuple[list[int], list[list[int]]]:
        """The prompt's ids and each response's, EOS included; no ids where a response is dropped."""
        record = self._prepared(record)
        prompt = self._prompt(record)
        given: Any = record.response_ids or record.responses or ()
        responses = [self._response(record, response, i) for i, response in enumerate(given)]
        return self.limits.compared(prompt, responses, record.ranks, record.where)

    def encode_vote(self, record: Vote) -> Example:
        """The row with the judged answer's tokens marked."""
        return self._answered(self._prepared(record))

    def encode_response(self, record: Prompt, text: str, *, ended: bool) -> list[int]:
        """Prompt and response as one row; nothing closes a response that has not `ended` by itself."""
        record = self._prepared(record)
        prompt = self.limits.shortened(self._prompt(record), self.max_length - self.limits.reserve, record.where)
        return (prompt + self._answer(record, text, ended))[: self.max_length]

    def decode(self, ids: Sequence[int]) -> str:
        """Text without ends and the tokens of the template; empty when the model has no tokenizer."""
        return "" if self.tokenizer is None else words_of(self.tokenizer, ids, self.hidden)

    def spells(self, text: str) -> bool:
        """Whether a text has tokens of the chat template in it, written out."""
        return self.tokenizer is not None and bool(self._pieces.spells(text))

    def same_ids(self, encoder: "Encoder") -> bool:
        """True when both mean the same by an id; how they cut a text into ids, and templates, may differ."""
        if self.tokenizer is None or encoder.tokenizer is None:
            return self.vocab_size == encoder.vocab_size
        return self.tokenizer.get_vocab() == encoder.tokenizer.get_vocab()

    def same_tokenizer(self, encoder: "Encoder") -> bool:
        """True when both write the same ids, template included."""
        if self.tokenizer is None or encoder.tokenizer is None:
            return self.vocab_size == encoder.vocab_size
        return _fingerprint(self) == _fingerprint(encoder)

    # --- records ----------------------------------------------------------------------------------------------------

    def _prepared(self, record: Any) -> Any:
        """The record as the template gets it: plain prompts as turns with --apply-chat-template, --system in front, and
        quoted tokens as private characters."""
        record = self._as_turns(record)
        if record.messages is None:
            return record
        if self.tokenizer is None:
            raise DataError(f"{record.where}: messages: the model has no tokenizer; give prompt_ids and response_ids.")
        messages = [self._quoted(message) for message in record.messages]
        if self.flags.system is not None and messages[0]["role"] not in SYSTEM:
            messages.insert(0, {"role": "system", "content": self.flags.system})
        if messages[0]["role"] in SYSTEM and not self.template.takes_system:
            asked = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
            if asked is None:
                raise DataError(f"{record.where}: messages: this chat template has no system role; give a user turn.")
            merged = f"{messages[0]['content']}\n\n{messages[asked]['content']}"
            messages[asked] = messages[asked] | {"content": merged}
            messages = messages[1:]
            self._note("system messages stand at the start of the user's first turn: the template has no system role")
        if messages[0]["role"] == "assistant":
            self._note("conversations begin with the assistant; that turn answers nothing and is not learned")
        record = dataclasses.replace(record, messages=tuple(messages))
        self._check_rendered(record, messages)
        return record

    def _as_turns(self, record: Any) -> Any:
        """With --apply-chat-template a plain prompt as a user's turn; without it, plain prompts are counted."""
        if record.prompt is None or self.tokenizer is None:
            return record
        if not self.flags.apply_chat_template:
            if self.template.own and self.template.chats and not self._pieces.spells(record.prompt):
                self._note(PLAIN)
            self._note("plain prompts have no messages, so they get no --system", int(self.flags.system is not None))
            return record
        turns: list[Message] = [{"role": "user", "content": record.prompt}]
        if isinstance(record, Demonstration):
            turns.append({"role": "assistant", "content": record.response or ""})
            return dataclasses.replace(record, prompt=None, response=None, messages=tuple(turns))
        return dataclasses.replace(record, prompt=None, messages=tuple(turns))

    def _quoted(self, message: Message) -> Message:
        """The message with tokens that its text spells as private characters, an answer's own end taken off."""

        def quoted(value: Any) -> Any:
            if isinstance(value, str):
                self._note(QUOTED, self._pieces.spells(value))
                return self._pieces.quote(value)
            if isinstance(value, dict):
                return {key: quoted(part) for key, part in value.items()}
            return [quoted(part) for part in value] if isinstance(value, list | tuple) else value

        if message["role"] == "assistant" and isinstance(message["content"], str):
            message = message | {"content": self._without_end(message["content"])}
        return {key: value if key == "role" else quoted(value) for key, value in message.items()}

    def _without_end(self, text: str) -> str:
        for word in self._end_words():
            if text.rstrip().endswith(word):
                self._note("answers brought an end of their own, which is not doubled")
                return text.rstrip().removesuffix(word)
        return text

    def _end_words(self) -> list[str]:
        return [word for word, token in self._pieces.words.items() if token in self.eos_ids]

    # --- pieces -----------------------------------------------------------------------------------------------------

    def _prompt(self, record: Prompt, opened: bool = True) -> list[int]:
        """The whole prompt's ids, however many."""
        if record.prompt_ids is not None:
            ids = self._checked(record.prompt_ids, record.where, "prompt_ids")
        elif record.messages is not None:
            ids = self._prompt_of(record, record.messages, opened)
        else:
            ids = self._with_bos(self._tokens(record.prompt or "", record.where))
        if not ids:
            raise DataError(
                f"{record.where}: prompt: no tokens in it, and this tokenizer adds no BOS; write something."
            )
        return ids

    def _answered(self, record: Demonstration | Vote) -> Example:
        """A prompt and the one answer to it as a row that fits."""
        prompt = self._prompt(record)
        response = self._response(record, record.response_ids or record.response or "")
        row = Example(prompt + response, [False] * len(prompt) + [True] * len(response))
        return self.limits.cut(row, record.where)

    def _response(self, record: Prompt, response: str | Sequence[int], number: int = 0) -> list[int]:
        """The ids of one of a record's responses, an end behind them unless it was cut."""
        if isinstance(response, str):
            return self._answer(record, response, number not in record.cut)
        ids = self._checked(response, record.where, "response_ids")
        return ids if number in record.cut else self._end(ids)

    def _answer(self, record: Prompt, text: str, ended: bool = True) -> list[int]:
        """A response to the record's prompt, as its template would write it; without its end if it has not `ended`."""
        if record.messages is None:
            self._needs_tokenizer(record.where)
            words = self._end_words()
            body = self._without_end(text)
            self._note(QUOTED, self._pieces.spells(body, words))
            ids = self._tokens(self._pieces.quote(body, words), record.where, record.prompt or "")
            return self._end(ids) if ended else ids
        turn = self._quoted({"role": "assistant", "content": text})
        before, written = self._split(record, [*record.messages, turn])
        self._check_answer(turn["content"], written, record.where)
        ids, end, tail = self._turn(written, record.where, before)
        if ended:
            return ids
        # Up to the text's own end: what the template writes behind it closes the turn
        body = written.removesuffix(tail).removesuffix(end)
        content = next((text for text in (turn["content"], turn["content"].strip()) if text in body), "")
        return self._tokens(body[: body.rindex(content) + len(content)] if content else "", record.where, before)

    def _prompt_of(self, record: Prompt, messages: Sequence[Message], opened: bool = True) -> list[int]:
        row = self._dialogue(record, messages, opened)
        if row is not None:
            return row.tokens
        return self._with_bos(self._tokens(self._render(record, messages, answer=opened), record.where))

    def _dialogue(self, record: Prompt, messages: Sequence[Message], opened: bool = True) -> Example | None:
        """The conversation's row, with the opening of the next answer where it ends with a question.

        Each answer is tokenized by itself, as when it was sampled, so that prompts, demonstrations and rollouts of one
        conversation begin with the same ids. An answer of weight 0 is not trained.
        None if the template rewrites earlier turns when later ones come.
        """
        tokens: list[int] = []
        trained: list[bool] = []
        shown, end = "", ""  # text that is tokenized already, up to an answer's end; that end
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > 0]
        for i in answers if answers[-1:] == [len(messages) - 1] else [*answers, len(messages)]:
            before = self._render(record, messages[:i], answer=opened or i < len(messages))
            if not before.startswith(shown):
                return None
            text = before[len(shown) :]
            question = self._tokens(text, record.where, end)
            answer: list[int] = []
            if i < len(messages):
                shown = self._render(record, messages[: i + 1])
                if not shown.startswith(before):
                    return None
                written = shown[len(before) :]
                self._check_answer(messages[i]["content"], written, record.where)
                answer, end, tail = self._turn(written, record.where, end + text)
                shown = shown[: len(shown) - len(tail)]  # some templates write more behind the last turn than others
            tokens += question + answer
            learned = i < len(messages) and bool(messages[i].get("weight", 1))
            trained += [False] * len(question) + [learned] * len(answer)
        whole = self._with_bos(tokens)
        return Example(whole, [False] * (len(whole) - len(tokens)) + trained)

    def _marked(self, record: Prompt) -> Example | None:
        """The row of a template that marks what is learned with {% generation %}; an end right behind is learned too.

        None where it marks nothing, or where texts quote tokens of the template.
        """
        messages = record.messages or ()
        if any(self._pieces.is_quoted(message.get("content")) for message in messages):
            return None
        try:
            ids, marks = self.template.render_marked(messages, record.tools)
        except Exception as error:
            raise self._refused(record, messages, error) from error
        if not any(marks):
            return None
        weights = [message.get("weight", 1) for message in messages if message["role"] == "assistant"]
        trained, answer = [False] * len(ids), -1
        for i, marked in enumerate(marks):
            answer += bool(marked) and (i == 0 or not marks[i - 1])
            closes = i > 0 and marks[i - 1] and ids[i] in self.eos_ids and ids[i - 1] not in self.eos_ids
            trained[i] = bool(marked or closes) and (answer >= len(weights) or bool(weights[answer]))
        whole = self._with_bos(ids)
        return Example(whole, [False] * (len(whole) - len(ids)) + trained)

    def _row_per_answer(self, record: Prompt) -> list[Example]:
        """A row for each answer of a conversation; with --train-on last for the last one."""
        messages = record.messages or ()
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > 0]
        answers = [i for i in answers if self.flags.train_on == "all" or i == answers[-1]]
        rows, long = [], list[TooLongError]()
        for i in answers:
            before, written = self._split(record, messages[: i + 1])
            self._check_answer(messages[i]["content"], written, record.where)
            prompt = self._prompt_of(record, messages[:i])
            answer = self._turn(written, record.where, before)[0]
            learned = bool(messages[i].get("weight", 1))
            row = Example(prompt + answer, [False] * len(prompt) + [learned] * len(answer))
            row = without_end(row, self.eos_ids) if record.cut and i == answers[-1] else row
            try:
                rows += [self.limits.cut(row, record.where)] if learned else []
            except TooLongError as error:
                long.append(error)
        if not rows:
            raise long[0] if long else DataError(f"{record.where}: messages: no answer in it is learned.")
        self._note(REWRITTEN)
        self._note("answers left out, because they do not fit --max-length", len(long))
        return rows

    def _split(self, record: Prompt, messages: Sequence[Message]) -> tuple[str, str]:
        """What the template writes before the last message, an answer, and as that answer.

        A template may open an answer with what a given one does not have (<think>): it then stands behind that.
        """
        before, after = self._render(record, messages[:-1], answer=True), self._render(record, messages)
        differ = (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b)
        shared = next(differ, min(len(before), len(after)))
        if shared < len(before):
            if not after.startswith(self._render(record, messages[:-1])):
                raise DataError(
                    f"{record.where}: messages: this chat template does not write an answer behind its prompt."
                )
            self._note("answers do not repeat what the template opens an answer with; they are read right behind it")
        return before, after[shared:]

    def _check_answer(self, text: str, written: str, where: str) -> None:
        """Counts an answer of which the template leaves words out; raises DataError if it writes nothing of it."""
        words, shown = ("".join(part.split()) for part in (text, written))  # templates may move spaces and line ends
        if words in shown:
            return
        if not any(word in shown for word in re.findall(r"\w+", text) or ("",)):
            raise DataError(f"{where}: messages: this chat template does not write an answer behind its prompt.")
        self._note("answers of which the template leaves words out (reasoning, say); only what it writes is read")

    def _turn(self, text: str, where: str, behind: str) -> tuple[list[int], str, str]:
        """An answer's ids, with exactly one end behind them; that end; the text that the template wrote behind it."""
        ids = self._tokens(text, where, behind)
        answer = self._end(ids)
        end = word_of(self.tokenizer, answer[-1]) if answer and answer[-1] in self.eos_ids else ""
        if len(answer) > len(ids):
            self._note("answers: the template ends them with no token, so an end is written", int(self.template.own))
            return answer, end, ""
        return answer, end, text.partition(end)[2] if end else ""

    def _end(self, ids: list[int]) -> list[int]:
        """Exactly one EOS, at the end: a response ends at its first EOS (PPO.md 1). None where nothing is an EOS."""
        first = next((i for i, token in enumerate(ids) if token in self.eos_ids), None)
        return [*ids, *self.eos_ids[:1]] if first is None else ids[: first + 1]

    def _with_bos(self, ids: list[int]) -> list[int]:
        if not self.limits.bos and not ids and self.tokenizer is not None and self.tokenizer.bos_token_id is not None:
            return [self.tokenizer.bos_token_id]  # an empty prompt still needs a state to start from
        return ids if ids[:1] == self.limits.bos else self.limits.bos + ids

    def _needs_tokenizer(self, where: str) -> None:
        if self.tokenizer is None:
            raise DataError(f"{where}: prompt: the model has no tokenizer, so it reads no text; give prompt_ids.")

    def _tokens(self, text: str, where: str, behind: str = "") -> list[int]:
        self._needs_tokenizer(where)
        if not text.isascii():
            _check_unicode(text, where)
        return self._pieces.ids(text, behind)

    def _render(self, record: Prompt, messages: Sequence[Message], answer: bool = False) -> str:
        try:
            return self.template.render(messages, answer=answer, tools=record.tools)
        except Exception as error:  # jinja's own, or what a template raises on purpose
            raise self._refused(record, messages, error) from error

    def _refused(self, record: Prompt, messages: Sequence[Message], error: Exception) -> DataError:
        opens = next((message["role"] for message in messages if message["role"] not in SYSTEM), "") == "assistant"
        hint = "; it begins with the assistant: put a user's turn in front" if opens else ""
        if record.tools or any("tool_calls" in message for message in messages):
            hint += "; it has tools: take a model whose template knows their calls and results, as those here are"
        return DataError(
            f"{record.where}: messages: the chat template refuses them: {one_line(error).rstrip('.')}{hint}."
        )

    def _check_rendered(self, record: Prompt, messages: Sequence[Message]) -> None:
        """Raises DataError for turns, tools, their calls and reasoning that the template does not write."""

        def renders(part: Sequence[Message], without: Sequence[Message], tools: bool = True) -> bool:
            whole = self._render(record, part)
            try:
                return whole != self._render(record if tools else dataclasses.replace(record, tools=None), without)
            except DataError:  # the template insists on it
                return True

        missing = [] if not record.tools or renders(messages, messages, tools=False) else ["tools"]
        whole = self._render(record, messages)
        for i, message in enumerate(messages):
            other = [*messages[:i], {**message, "content": "."}, *messages[i + 1 :]]
            if message["content"].strip() not in whole and not renders(messages, other):
                missing.append(f"messages[{i}] of role {message['role']}")
            thoughts = [name for name in REASONING if name in message]  # transformers makes them one
            for keys in (thoughts, [name for name in ("tool_calls",) if name in message]):
                bare = {name: value for name, value in message.items() if name not in keys}
                if keys and not renders(messages[: i + 1], [*messages[:i], bare]):
                    missing.append(f"messages[{i}].{keys[0]}")
        if missing:
            raise DataError(
                f"{record.where}: messages: this model's chat template does not write {', '.join(missing)}, so the "
                "model would never read it; take a model whose template does, or take it out."
            )

    def _checked(self, ids: Sequence[int], where: str, name: str) -> list[int]:
        if max(ids, default=0) >= self.vocab_size:
            raise DataError(
                f"{where}: {name}: token id {max(ids)} is outside the model's vocabulary of {self.vocab_size}; make "
                "the ids with the model's own tokenizer."
            )
        return list(ids)


def _fingerprint(encoder: Encoder) -> tuple[Any, ...]:
    tokenizer = encoder.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)  # slow tokenizers have none
    if backend is None:
        return sorted(tokenizer.get_vocab().items()), encoder.template.sources, tokenizer.eos_token_id
    parts = json.loads(backend.to_str()) | {"truncation": None, "padding": None}  # how batches were made last
    # A reward model's may have a pad token that its base has not; see `tokenizer_files.pad_of`
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["id"] != tokenizer.pad_token_id]
    return parts, encoder.template.sources, tokenizer.eos_token_id


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: text: character {error.start + 1} is half a character; type or export it again."
        ) from error
