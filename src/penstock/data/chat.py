"""From records to token ids and back: the model's own tokenizer and chat template, one EOS, at most one BOS.

Prompt strings are used as they are; messages go through the tokenizer's chat template, or a plain built-in one when it
has none. Demonstrations, comparisons and prompts share these lines, so that the reward model and PPO see exactly what
SFT was trained on (PPO.md 11).
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from penstock.data.field_checks import REASONING, Message
from penstock.data.records import Comparison, Demonstration, Prompt
from penstock.errors import DataError, UserError
from penstock.models.tokenizer_files import check_fit, load_tokenizer, one_line

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

Truncate = Literal["drop", "left", "right"]
CUT = "answers cut at their end: they have no end of sequence, so only how they begin is learned"


class TooLongError(DataError):
    """A record that does not fit, and that must not or cannot be cut."""


@dataclass(frozen=True)
class Example:
    """One row of SFT. Example: Example([1, 5, 6, 2], [False, False, True, True])."""

    tokens: list[int]
    trained: list[bool]
    """True where the token is an assistant's, end token included (PPO.md 24)."""


class Encoder:
    """A tokenizer (or none, for data of ids), the ids that end a response, and how long a row may be.

    What does not fit `max_length` is dropped, an answer at a time; or cut at its end (`right`: the answer has no EOS
    then, and its end is not learned); or the prompt is cut at its beginning (`left`). A prompt has room for `reserve`
    tokens behind it. What cannot be done so is a TooLongError.
    """

    def __init__(
        self, tokenizer: Any, *, eos_ids: Sequence[int], vocab_size: int, max_length: int, reserve: int = 1,
        truncate: Truncate = "drop",
    ) -> None:  # fmt: skip
        self.tokenizer, self.eos_ids, self.vocab_size = tokenizer, tuple(eos_ids), vocab_size
        self.max_length, self.reserve, self.truncate = max_length, max(reserve, 1), truncate
        self.notes: Counter[str] = Counter()
        """What was done to records that users must know, in words, and how many times; `setup.read` says it."""
        if not self.eos_ids:
            raise UserError(
                "the model names no end-of-sequence token, so no response could ever end; set eos_token_id in its "
                "config.json, or eos_token in its tokenizer."
            )
        if self.reserve >= self.max_length:
            raise UserError(
                f"{self.reserve} new tokens leave no room for a prompt in rows of {self.max_length}; lower "
                "--max-new-tokens, or raise --max-length if the model allows."
            )
        # Only a tokenizer that puts a BOS in front by itself wants one: GPT-2's has one and never uses it.
        bos = [tokenizer.bos_token_id] if tokenizer is not None else []
        self._bos: list[int] = bos if bos and tokenizer("a").input_ids[:1] == bos else []

    @staticmethod
    def for_model(source: str, *, eos_ids: Sequence[int], vocab_size: int, **limits: Any) -> "Encoder":
        """The encoder of the model at `source`. Raises UserError when its tokenizer does not fit the model."""
        tokenizer = load_tokenizer(source)
        if tokenizer is not None:
            check_fit(tokenizer, vocab_size, source)
            if tokenizer.eos_token_id is not None:
                eos_ids = [tokenizer.eos_token_id, *(i for i in eos_ids if i != tokenizer.eos_token_id)]
        return Encoder(tokenizer, eos_ids=eos_ids, vocab_size=vocab_size, **limits)

    def encode_prompt(self, record: Prompt) -> list[int]:
        """What precedes the response. Raises TooLongError when it leaves no room for `reserve` tokens."""
        return self._shortened(self._prompt(record), self.max_length - self.reserve, record.where)

    def encode_demonstration(self, record: Demonstration) -> Example:
        """A row with the assistant's tokens marked."""
        if record.messages is None:
            prompt, response = self._prompt(record), self._response(record)
            return self._cut(Example(prompt + response, [False] * len(prompt) + [True] * len(response)), record.where)
        self._check_rendered(record, record.messages)
        row = self._dialogue(record, record.messages)
        if row is None:
            raise DataError(
                f"{record.where}: messages: this chat template rewrites earlier turns, so it cannot be told which "
                "tokens are the assistant's; split the conversation into single answers."
            )
        return self._cut(row, record.where)

    def encode_comparison(self, record: Comparison) -> tuple[list[int], list[list[int]]]:
        """The prompt's ids and each response's, EOS included; no ids where a response is dropped."""
        prompt = self._prompt(record)
        if record.response_ids is not None:
            responses = [self._end(self._checked(ids, record.where, "response_ids")) for ids in record.response_ids]
        else:
            responses = [self._answer(record, text) for text in record.responses or ()]
        least = len(self._bos) + 1 if self.truncate == "left" else len(prompt)  # tokens of the prompt that stay
        fits = [len(ids) <= self.max_length - least for ids in responses]
        if self.truncate == "right" and self.max_length > len(prompt):
            self._note(CUT, fits.count(False))
            responses = [ids[: self.max_length - len(prompt)] for ids in responses]
        elif sum(fits) < 2:
            longest = max(map(len, responses))
            raise self._too_long(
                record.where, f"responses: a prompt of {len(prompt)} tokens, answers of up to {longest}"
            )
        else:
            self._note("answers left out of their rankings, because they do not fit", fits.count(False))
            responses = [ids if fit else [] for ids, fit in zip(responses, fits, strict=True)]
            prompt = self._shortened(prompt, self.max_length - max(map(len, responses)), record.where)
        kept = [(rank, ids) for rank, ids in zip(record.ranks, responses, strict=True) if ids]
        pairs = [
            ids == other_ids for (rank, ids), (other, other_ids) in itertools.combinations(kept, 2) if rank != other
        ]
        self._note("pairs of answers not compared: their tokens are the same", sum(pairs))
        self._note("rankings left out: no answer in them is better than another", all(pairs))
        return prompt, responses

    def encode_response(self, record: Prompt, text: str, *, ended: bool) -> list[int]:
        """Prompt and response as one row; EOS only if the response `ended` by itself."""
        prompt, response = self.encode_prompt(record), self._answer(record, text)
        if not ended and response[-1] in self.eos_ids:
            response = response[:-1]
        return (prompt + response)[: self.max_length]

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens; empty when the model has no tokenizer."""
        if self.tokenizer is None:
            return ""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def same_tokenizer(self, encoder: "Encoder") -> bool:
        """True when both write the same ids, template included."""
        if self.tokenizer is None or encoder.tokenizer is None:
            return self.vocab_size == encoder.vocab_size
        return _fingerprint(self.tokenizer) == _fingerprint(encoder.tokenizer)

    # --- pieces -----------------------------------------------------------------------------------------------------

    def _prompt(self, record: Prompt) -> list[int]:
        """The whole prompt's ids, however many."""
        if record.prompt_ids is not None:
            ids = self._checked(record.prompt_ids, record.where, "prompt_ids")
        elif record.messages is not None:
            self._check_rendered(record, record.messages)
            ids = self._prompt_of(record, record.messages)
        else:
            ids = self._with_bos(self._tokens(record.prompt or "", record.where))
        if not ids:
            raise DataError(
                f"{record.where}: prompt: no tokens in it, and this tokenizer adds no BOS; write something."
            )
        return ids

    def _response(self, record: Demonstration) -> list[int]:
        if record.response_ids is not None:
            return self._end(self._checked(record.response_ids, record.where, "response_ids"))
        return self._end(self._tokens(record.response or "", record.where))

    def _answer(self, record: Prompt, text: str) -> list[int]:
        """A response to the record's prompt, as its template would write it."""
        if record.messages is None:
            return self._end(self._tokens(text, record.where))
        turn: Message = {"role": "assistant", "content": text}
        before = self._render(record, record.messages, answer=True)
        after = self._render(record, (*record.messages, turn))
        if not after.startswith(before):
            raise DataError(f"{record.where}: messages: this chat template does not write an answer behind its prompt.")
        return self._turn(after[len(before) :], record.where)[0]

    def _prompt_of(self, record: Prompt, messages: Sequence[Message]) -> list[int]:
        row = self._dialogue(record, messages)
        if row is not None:
            return row.tokens
        return self._with_bos(self._tokens(self._render(record, messages, answer=True), record.where))

    def _dialogue(self, record: Prompt, messages: Sequence[Message]) -> Example | None:
        """The conversation's row, with the opening of the next answer where it ends with a question.

        Each answer is tokenized by itself, as when it was sampled, so that prompts, demonstrations and rollouts of one
        conversation begin with the same ids. An answer of weight 0 is not trained.
        None if the template rewrites earlier turns when later ones come.
        """
        tokens: list[int] = []
        trained: list[bool] = []
        shown, tail = "", ""  # text that is tokenized already, and what the template wrote behind the last EOS
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for i in answers if answers[-1:] == [len(messages) - 1] else [*answers, len(messages)]:
            before = self._render(record, messages[:i], answer=True)
            if not before.startswith(shown):
                return None
            question = self._tokens(tail + before[len(shown) :], record.where)
            answer: list[int] = []
            if i < len(messages):
                shown = self._render(record, messages[: i + 1])
                if not shown.startswith(before):
                    return None
                answer, tail = self._turn(shown[len(before) :], record.where)
            tokens += question + answer
            learned = i < len(messages) and bool(messages[i].get("weight", 1))
            trained += [False] * len(question) + [learned] * len(answer)
        whole = self._with_bos(tokens)
        return Example(whole, [False] * (len(whole) - len(tokens)) + trained)

    def _turn(self, text: str, where: str) -> tuple[list[int], str]:
        """An answer's ids, with exactly one EOS at their end, and the text that the template wrote behind that."""
        ids = self._tokens(text, where)
        answer = self._end(ids)
        if len(answer) > len(ids):
            return answer, ""
        offsets = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        ).offset_mapping
        return answer, text[offsets[len(answer) - 1][1] :]

    def _end(self, ids: list[int]) -> list[int]:
        """Exactly one EOS, at the end: a response ends at its first EOS (PPO.md 1)."""
        first = next((i for i, token in enumerate(ids) if token in self.eos_ids), None)
        return [*ids, self.eos_ids[0]] if first is None else ids[: first + 1]

    def _with_bos(self, ids: list[int]) -> list[int]:
        if not self._bos and not ids and self.tokenizer is not None and self.tokenizer.bos_token_id is not None:
            return [self.tokenizer.bos_token_id]  # an empty prompt still needs a state to start from
        return ids if ids[:1] == self._bos else self._bos + ids

    def _tokens(self, text: str, where: str) -> list[int]:
        if self.tokenizer is None:
            raise DataError(f"{where}: prompt: the model has no tokenizer, so it reads no text; give prompt_ids.")
        if not text.isascii():
            _check_unicode(text, where)
        # verbose=False: the limit here is --max-length, not the tokenizer's own, which transformers would warn about.
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids) if text else []

    def _render(self, record: Prompt, messages: Sequence[Message], answer: bool = False) -> str:
        if self.tokenizer is None:
            raise DataError(f"{record.where}: messages: the model has no tokenizer; give prompt_ids and response_ids.")
        template = self.tokenizer.chat_template or PLAIN_TEMPLATE
        system = "developer" if "developer" in str(template) else "system"  # the newer name of the same role
        turns = [{**m, "role": system} if m["role"] == "developer" else m for m in messages]
        tools = list(record.tools) if record.tools else None
        try:
            return self.tokenizer.apply_chat_template(
                turns, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=answer
            )
        except Exception as error:  # jinja's own, or what a template raises on purpose
            raise DataError(f"{record.where}: messages: the chat template refuses them: {one_line(error)}.") from error

    def _check_rendered(self, record: Prompt, messages: Sequence[Message]) -> None:
        """Raises DataError for tools, their calls and results, and reasoning that the template does not write."""

        def renders(part: Sequence[Message], without: Sequence[Message], tools: bool = True) -> bool:
            whole = self._render(record, part)
            try:
                return whole != self._render(record if tools else dataclasses.replace(record, tools=None), without)
            except DataError:  # the template insists on it
                return True

        missing = [] if not record.tools or renders(messages, messages, tools=False) else ["tools"]
        for i, message in enumerate(messages):
            silent = [*messages[:i], {**message, "content": ""}, *messages[i + 1 :]]
            if message["role"] == "tool" and message["content"] and not renders(messages, silent):
                missing.append(f"messages[{i}] of role tool")
            for key in (name for name in (*REASONING, "tool_calls") if name in message):
                bare = {name: value for name, value in message.items() if name != key}
                if not renders(messages[: i + 1], [*messages[:i], bare]):
                    missing.append(f"messages[{i}].{key}")
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

    def _cut(self, row: Example, where: str) -> Example:
        """The row, made to fit, up to its last trained token: what follows that teaches nothing."""
        ends = [i for i in range(1, len(row.trained) + 1) if row.trained[i - 1] and not any(row.trained[i : i + 1])]
        end, fits = ends[-1], [end for end in ends if end <= self.max_length]
        if end > self.max_length and self.truncate == "left":
            row = self._without_start(row, end, where)
            end = self.max_length
        elif end > self.max_length:
            end = max(fits, default=0)
            if self.truncate == "right" and any(row.trained[end : self.max_length]):
                end = max(i + 1 for i, flag in enumerate(row.trained[: self.max_length]) if flag)
                self._note(CUT)
            elif fits:
                self._note("conversations end at their last answer that fits")
        if not any(row.trained[1:end]):
            raise self._too_long(where, f"response: {ends[0]} tokens with the prompt")
        return Example(row.tokens[:end], row.trained[:end])

    def _without_start(self, row: Example, end: int, where: str) -> Example:
        """The last `max_length` tokens before `end`, a BOS in front of them; half an answer at the start teaches
        nothing."""
        tokens, trained = row.tokens[:end], row.trained[:end]
        answer = len(list(itertools.takewhile(bool, reversed(trained))))
        if answer >= self.max_length:
            raise self._too_long(where, f"response: {answer} tokens without any prompt")
        self._note("rows without their beginning")
        head = self._bos if tokens[:1] == self._bos else []
        start = end - self.max_length + len(head)
        half = len(list(itertools.takewhile(bool, trained[start:]))) if trained[start - 1] else 0
        return Example(head + tokens[start:], [False] * (len(head) + half) + trained[start + half :])

    def _shortened(self, prompt: list[int], room: int, where: str) -> list[int]:
        """A prompt in `room` tokens: without its beginning, its BOS aside, if that may be cut."""
        if len(prompt) <= room:
            return prompt
        head = self._bos if prompt[:1] == self._bos else []
        if self.truncate != "left" or room <= len(head):
            raise self._too_long(where, f"prompt: {len(prompt)} tokens where there is room for {room}")
        self._note("prompts without their beginning")
        return head + prompt[len(prompt) - room + len(head) :]

    def _too_long(self, where: str, problem: str) -> TooLongError:
        return TooLongError(
            f"{where}: {problem}, and a row has {self.max_length} with {self.reserve} at least for the response; "
            "shorten it, raise --max-length if the model allows, --truncate left, or --skip-bad."
        )

    def _note(self, text: str, count: int = 1) -> None:
        if count:
            self.notes[text] += count


def _fingerprint(tokenizer: Any) -> tuple[Any, ...]:
    backend = getattr(tokenizer, "backend_tokenizer", None)  # slow tokenizers have none
    words = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return words, tokenizer.chat_template, tokenizer.eos_token_id


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: text: character {error.start + 1} is half a character; type or export it again."
        ) from error
