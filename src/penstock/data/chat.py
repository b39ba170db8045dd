"""From records to token ids and back: the model's own tokenizer and chat template, one EOS, at most one BOS.

Prompt strings are used as they are; messages go through the tokenizer's chat template, or a plain built-in one when it
has none. Demonstrations, comparisons and prompts share these lines, so that the reward model and PPO see exactly what
SFT was trained on (PPO.md 11).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from penstock.data.formats import Comparison, Demonstration, Message, Prompt
from penstock.errors import DataError, UserError
from penstock.models.tokenizer_files import check_fit, load_tokenizer, one_line

PLAIN_TEMPLATE = (
    "{% for m in messages %}"
    "{% if not loop.first %}{{ '\n\n' }}{% endif %}"
    "{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}Human: {{ m.content }}"
    "{% else %}Assistant: {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{% if messages %}{{ '\n\n' }}{% endif %}Assistant:{% endif %}"
)
"""The template of tokenizers that have none."""


@dataclass(frozen=True)
class Example:
    """One row of SFT. Example: Example([1, 5, 6, 2], [False, False, True, True])."""

    tokens: list[int]
    trained: list[bool]
    """True where the token is an assistant's, end token included (PPO.md 24)."""


class Encoder:
    """A tokenizer (or none, for data of ids), the ids that end a response, and how long a row may be.

    A response that does not fit `max_length` is cut at its end and then has no EOS: the model never learns to stop
    there. A prompt that leaves no room for `reserve` tokens is a DataError.
    """

    def __init__(
        self, tokenizer: Any, *, eos_ids: Sequence[int], vocab_size: int, max_length: int, reserve: int = 1
    ) -> None:
        self.tokenizer, self.eos_ids, self.vocab_size = tokenizer, tuple(eos_ids), vocab_size
        self.max_length, self.reserve = max_length, max(reserve, 1)
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
    def for_model(
        source: str, *, eos_ids: Sequence[int], vocab_size: int, max_length: int, reserve: int = 1
    ) -> "Encoder":
        """The encoder of the model at `source`. Raises UserError when its tokenizer does not fit the model."""
        tokenizer = load_tokenizer(source)
        if tokenizer is not None:
            check_fit(tokenizer, vocab_size, source)
            if tokenizer.eos_token_id is not None:
                eos_ids = [tokenizer.eos_token_id, *(i for i in eos_ids if i != tokenizer.eos_token_id)]
        return Encoder(tokenizer, eos_ids=eos_ids, vocab_size=vocab_size, max_length=max_length, reserve=reserve)

    def encode_prompt(self, record: Prompt) -> list[int]:
        """What precedes the response. Raises DataError when it leaves no room for `reserve` tokens."""
        if record.prompt_ids is not None:
            ids = self._checked(record.prompt_ids, record.where, "prompt_ids")
        elif record.messages is not None:
            ids = self._prompt_of(record.messages, record.where)
        else:
            ids = self._with_bos(self._tokens(record.prompt or "", record.where))
        if not ids:
            raise DataError(
                f"{record.where}: prompt: no tokens in it, and this tokenizer adds no BOS; write something."
            )
        if len(ids) + self.reserve > self.max_length:
            raise DataError(
                f"{record.where}: prompt: {len(ids)} tokens, and with {self.reserve} for the response the limit of "
                f"{self.max_length} is passed; shorten it, raise --max-length if the model allows, or --skip-bad."
            )
        return ids

    def encode_demonstration(self, record: Demonstration) -> Example:
        """A row with the assistant's tokens marked."""
        if record.messages is None:
            prompt = self.encode_prompt(record)
            response = self._response(record)
            return self._cut(Example(prompt + response, [False] * len(prompt) + [True] * len(response)), record.where)
        row = self._dialogue(record.messages, record.where)
        if row is None:
            raise DataError(
                f"{record.where}: messages: this chat template rewrites earlier turns, so it cannot be told which "
                "tokens are the assistant's; split the conversation into single answers."
            )
        return self._cut(row, record.where)

    def encode_comparison(self, record: Comparison) -> tuple[list[int], list[list[int]]]:
        """The prompt's ids and each response's, EOS included."""
        prompt = self.encode_prompt(record)
        room = self.max_length - len(prompt)
        if record.response_ids is not None:
            responses = [self._end(self._checked(ids, record.where, "response_ids")) for ids in record.response_ids]
        else:
            responses = [self._answer(record, text) for text in record.responses or ()]
        return prompt, [ids[:room] for ids in responses]

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

    def _response(self, record: Demonstration) -> list[int]:
        if record.response_ids is not None:
            return self._end(self._checked(record.response_ids, record.where, "response_ids"))
        return self._end(self._tokens(record.response or "", record.where))

    def _answer(self, record: Prompt, text: str) -> list[int]:
        """A response to the record's prompt, as its template would write it."""
        if record.messages is None:
            return self._end(self._tokens(text, record.where))
        turn: Message = {"role": "assistant", "content": text}
        before = self._render(record.messages, record.where, answer=True)
        after = self._render((*record.messages, turn), record.where)
        if not after.startswith(before):
            raise DataError(f"{record.where}: messages: this chat template does not write an answer behind its prompt.")
        return self._turn(after[len(before) :], record.where)[0]

    def _prompt_of(self, messages: Sequence[Message], where: str) -> list[int]:
        row = self._dialogue(messages, where)
        if row is not None:
            return row.tokens
        return self._with_bos(self._tokens(self._render(messages, where, answer=True), where))

    def _dialogue(self, messages: Sequence[Message], where: str) -> Example | None:
        """The conversation's row, with the opening of the next answer where it ends with a question.

        Each answer is tokenized by itself, as when it was sampled, so that prompts, demonstrations and rollouts of one
        conversation begin with the same ids. None if the template rewrites earlier turns when later ones come.
        """
        tokens: list[int] = []
        trained: list[bool] = []
        shown, tail = "", ""  # text that is tokenized already, and what the template wrote behind the last EOS
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for i in answers if answers[-1:] == [len(messages) - 1] else [*answers, len(messages)]:
            before = self._render(messages[:i], where, answer=True)
            if not before.startswith(shown):
                return None
            question = self._tokens(tail + before[len(shown) :], where)
            answer: list[int] = []
            if i < len(messages):
                shown = self._render(messages[: i + 1], where)
                if not shown.startswith(before):
                    return None
                answer, tail = self._turn(shown[len(before) :], where)
            tokens += question + answer
            trained += [False] * len(question) + [True] * len(answer)
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

    def _render(self, messages: Sequence[Message], where: str, answer: bool = False) -> str:
        if self.tokenizer is None:
            raise DataError(f"{where}: messages: the model has no tokenizer; give prompt_ids and response_ids.")
        template = self.tokenizer.chat_template or PLAIN_TEMPLATE
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), chat_template=template, tokenize=False, add_generation_prompt=answer
            )
        except Exception as error:  # jinja's own, or what a template raises on purpose
            raise DataError(f"{where}: messages: the chat template refuses them: {one_line(error)}.") from error

    def _checked(self, ids: Sequence[int], where: str, name: str) -> list[int]:
        if max(ids, default=0) >= self.vocab_size:
            raise DataError(
                f"{where}: {name}: token id {max(ids)} is outside the model's vocabulary of {self.vocab_size}; make "
                "the ids with the model's own tokenizer."
            )
        return list(ids)

    def _cut(self, example: Example, where: str) -> Example:
        # Not beyond the last trained token: a row that ends within a user's turn teaches nothing there.
        end = max((i + 1 for i, flag in enumerate(example.trained[: self.max_length]) if flag), default=0)
        example = Example(example.tokens[:end], example.trained[:end])
        if not any(example.trained[1:]):
            raise DataError(
                f"{where}: response: no token of it is within the limit of {self.max_length}; shorten the prompt, "
                "raise --max-length if the model allows, or --skip-bad."
            )
        return example


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
