"""Requests to /v1: OpenAI's names in, prompts as token ids and a Sampling out. Knows no routes and no scheduler.

A key that would change what an answer means, and that this server does not support, is refused by name. Other unknown
keys are ignored, because clients send many of them. A text is never read as a number, nor a number as a text.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from penstock.data.chat import Encoder
from penstock.data.records import Prompt
from penstock.errors import DataError
from penstock.rollout.sampling import Sampling
from penstock.serve.errors import ApiError
from penstock.serve.models.catalogue import ServedModel

MAX_MESSAGES = 4096
"""In one request; the model's context ends most conversations earlier. A template writes a conversation again for each
answer in it: twice as many messages take four times as long, and so many half a minute."""
MAX_ANSWERS = 16
MAX_PROMPTS = 64
"""In one request to /v1/completions."""
MAX_STOPS = 4
MAX_STOP_LENGTH = 64
MAX_STOP_IDS = 64
MAX_BIASES = 300
MIN_TEMPERATURE = 1e-3
"""A temperature below it takes the likeliest token, as 0 does: logits divided by less leave the range of fp32."""


def _storable(text: str) -> str:
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("holds a zero byte or half a character; send plain Unicode text")
    return text


Str = Annotated[str, AfterValidator(_storable)]
"""Text that can be tokenized, stored and sent back."""


class Loose(BaseModel):
    """An object that may hold more than we read."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class TextPart(Loose):
    """A part of a message's content."""

    type: Literal["text"]
    text: Str


class ChatMessage(Loose):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Str | list[TextPart]

    @property
    def text(self) -> str:
        """All parts, end to end."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(Loose):
    """How to stream."""

    include_usage: bool | None = None


Temperature = Annotated[float, Field(ge=0, le=2)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
TopK = Annotated[int, Field(ge=0, lt=2**31, description="Not OpenAI's; 0 is off.")]
MinP = Annotated[float, Field(ge=0, le=1, description="Not OpenAI's; 0 is off.")]
# Below 0.1 the logits of repeated tokens leave the range of fp32.
RepetitionPenalty = Annotated[float, Field(ge=0.1, le=10, description="Not OpenAI's; 1 is off.")]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
SEED_BITS = 53
"""Of a drawn seed: JavaScript, and so the page, represents no larger whole numbers exactly."""
Stop = Annotated[Str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Sampled(Loose):
    """What both kinds of completion share; null is the same as leaving a key out."""

    model: str
    temperature: Temperature | None = None
    top_p: Share | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] | None = None
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    max_tokens: Count | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_BIASES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    repetition_penalty: RepetitionPenalty | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_IDS, description="As vLLM's.")] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31, description="As vLLM's: no end before them.")] | None = None
    ignore_eos: Annotated[bool, Field(description="As vLLM's.")] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with how many tokens there were."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Sampled):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Count | None = None
    continue_final_message: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(description="As vLLM's: what the template reads.")] | None = (
        None
    )
    reasoning_effort: Annotated[Str, Field(description="For chat templates that read it.")] | None = None
    add_generation_prompt: Annotated[bool, Field(description="As vLLM's: false opens no answer.")] | None = None


Ids = Annotated[list[TokenId], Field(min_length=1)]


class CompletionRequest(Sampled):
    """The body of POST /v1/completions."""

    prompt: (
        Str
        | Ids
        | Annotated[list[Str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=2**31, description="0 with echo: the prompt alone.")] | None = None
    echo: bool | None = None


@dataclass(frozen=True)
class EncodedRequest:
    """A request, ready for the scheduler."""

    prompts: list[list[int]]
    """Token ids of each prompt."""
    sampling: Sampling
    stops: tuple[str, ...]
    wants_tokens: bool
    """Whether the answer holds log-probabilities."""
    echo: bool = False
    """Whether the prompt, and its log-probabilities, come first."""
    answers: bool = True
    """False: the prompt is all that comes."""


# --- from the request to the engine's terms ---------------------------------------------------------------------------


def encode_chat(request: ChatRequest, model: ServedModel) -> EncodedRequest:
    """A chat request, encoded. Raises ApiError, with the key at fault, for what this server cannot do."""
    refuse_unsupported(request, CHANGES_CHAT)
    for i, message in enumerate(request.messages):
        refuse_unsupported(message, CHANGES_MESSAGE, f"messages[{i}].")
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true beside it.", param="top_logprobs")
    limits = {limit for limit in (request.max_tokens, request.max_completion_tokens) if limit is not None}
    if len(limits) > 1:
        raise ApiError(400, "max_tokens and max_completion_tokens differ; give one of them.", param="max_tokens")
    turns, beginning = _turns(request)
    if len(turns) > model.length:
        text = f"{len(turns)} messages do not fit the {model.length} tokens of {model.id}; begin a new conversation."
        raise ApiError(400, text, param="messages", code="context_length_exceeded")
    encoder = _encoder(request, model)
    opened = request.add_generation_prompt is not False
    prompt = _encode(model, encoder, Prompt(messages=turns, where="messages"), "messages", beginning, opened)
    sampling = _sampling(request, model, max(limits, default=model.length), request.top_logprobs or 0)
    return EncodedRequest([prompt], sampling, request.stops, bool(request.logprobs))


def _turns(request: ChatRequest) -> tuple[tuple[dict[str, str], ...], str]:
    """The turns that precede the answer, and how it begins: the assistant's last turn, where it is to be continued.

    An empty turn of the assistant says nothing, and some templates fail on it: it is left out.
    """
    turns = [{"role": message.role, "content": message.text} for message in request.messages]
    turns = [turn for turn in turns if turn["role"] != "assistant" or turn["content"]]
    if not turns:
        raise ApiError(400, "messages holds empty turns of the assistant only; add a user's.", param="messages")
    last = f"messages[{len(request.messages) - 1}].role"
    if turns[-1]["role"] != "assistant":
        # An empty one at the end is a place for the answer, and going on with nothing is answering.
        if request.continue_final_message and request.messages[-1].role != "assistant":
            text = "continue_final_message goes on with an assistant's turn, and the last one is not; leave it out."
            raise ApiError(400, text, param="continue_final_message")
        return tuple(turns), ""
    if not request.continue_final_message:
        text = "the last turn is the assistant's; end with a user's, or go on with it: continue_final_message: true."
        raise ApiError(400, text, param=last)
    if len(turns) == 1:
        raise ApiError(400, "an answer is continued behind what it answers; put a user's turn in front.", param=last)
    return tuple(turns[:-1]), turns[-1]["content"]


def encode_text(request: CompletionRequest, model: ServedModel) -> EncodedRequest:
    """A plain completion, encoded. Raises ApiError as `encode_chat` does."""
    refuse_unsupported(request, CHANGES_TEXT)
    texts: Any = request.prompt  # a text, token ids, or a list of either
    if isinstance(texts, str) or isinstance(texts[0], int):
        texts = [texts]
    if len(texts) * (request.n or 1) > MAX_PROMPTS:
        message = f"{len(texts)} prompts with n={request.n} are more than {MAX_PROMPTS} answers; send fewer at once."
        raise ApiError(400, message, param="prompt")
    prompts = []
    for i, text in enumerate(texts):
        param = "prompt" if len(texts) == 1 else f"prompt[{i}]"
        source: dict[str, Any] = {"prompt": text} if isinstance(text, str) else {"prompt_ids": tuple(text)}
        prompts.append(_encode(model, model.encoder, Prompt(**source, where=param), param))
    echo, answers = bool(request.echo), request.max_tokens != 0
    if not (echo or answers):
        raise ApiError(
            400, "max_tokens: 0 makes no answer; add echo: true to have the prompt read.", param="max_tokens"
        )
    limit = 16 if request.max_tokens is None else max(request.max_tokens, 1)  # 16: OpenAI's default
    sampling = _sampling(request, model, limit, request.logprobs or 0)
    return EncodedRequest(prompts, sampling, request.stops, request.logprobs is not None, echo, answers)


def _encoder(request: ChatRequest, model: ServedModel) -> Encoder:
    """The model's, with the request's arguments for the chat template."""
    arguments = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort is not None:
        arguments["reasoning_effort"] = request.reasoning_effort
    try:
        return model.encoder_with(arguments)
    except KeyError as error:
        name = error.args[0]
        text = f"{ascii(name)[:60]} is nothing that a request may set in the chat template of {model.id}; leave it out."
        raise ApiError(
            400, text, code="unsupported_parameter",
            param=name if name == "reasoning_effort" else "chat_template_kwargs",
        ) from error  # fmt: skip


def _encode(
    model: ServedModel, encoder: Encoder, record: Prompt, param: str, beginning: str = "", opened: bool = True
) -> list[int]:
    """Token ids of a prompt and of how its answer begins. Raises ApiError where the template or the context refuses."""
    try:
        ids = encoder.encode_prompt(record, beginning, opened=opened)
    except DataError as error:
        raise ApiError(400, str(error), param=param) from error
    if len(ids) >= model.length:
        text = (
            f"the prompt has {len(ids)} tokens and {model.id} has a context of {model.length}, answer included; "
            "shorten it or begin a new conversation."
        )
        raise ApiError(400, text, param=param, code="context_length_exceeded")
    return ids


def _sampling(request: Sampled, model: ServedModel, limit: int, top_logprobs: int) -> Sampling:
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options needs stream: true beside it.", param="stream_options")
    temperature = 1.0 if request.temperature is None else request.temperature
    vocab_size, limit, fewest = model.vocab_size, min(limit, model.length), request.min_tokens or 0
    if fewest > limit:
        raise ApiError(400, f"min_tokens is {fewest}, and {limit} are the most there can be.", param="min_tokens")
    for token in request.stop_token_ids or ():
        if token >= vocab_size:
            text = f"{token} is no token of this model; its ids are 0 to {vocab_size - 1}."
            raise ApiError(400, text, param="stop_token_ids")
    return Sampling(
        temperature=temperature if temperature >= MIN_TEMPERATURE else 0.0,
        max_new_tokens=limit,
        n=request.n or 1,
        top_k=request.top_k or 0,
        top_p=1.0 if request.top_p is None else max(request.top_p, 1e-6),  # 0: the likeliest token alone
        seed=secrets.randbits(SEED_BITS) if request.seed is None else request.seed,
        min_p=request.min_p or 0.0,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=_biases(request.logit_bias or {}, vocab_size),
        top_logprobs=top_logprobs,
        min_new_tokens=fewest and fewest + 1,  # ours counts the end among them
        # All that end an answer: an adapter may have others than its base, whose engine it shares.
        stop_ids=(*(() if request.ignore_eos else model.encoder.eos_ids), *(request.stop_token_ids or ())),
        ignore_eos=True,
    )


def _biases(biases: dict[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    for key in biases:
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size):
            text = f"{ascii(key)[:40]} is no token of this model; its ids are 0 to {vocab_size - 1}."
            raise ApiError(400, text, param="logit_bias")
    return tuple((int(key), bias) for key, bias in biases.items())


# --- what is refused --------------------------------------------------------------------------------------------------

CHANGES_SAMPLED: dict[str, Any] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "audio": (), "modalities": (["text"], []), "web_search_options": (),
    "verbosity": ("medium",), "thinking": (), "reasoning": (), "best_of": (1,), "extra_body": ({},),
    # vLLM's and SGLang's
    "structured_outputs": (), "guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (),
    "guided_json_object": (False,), "guided_whitespace_pattern": (), "structural_tag": (), "ebnf": (), "regex": (),
    "bad_words": ([],), "allowed_token_ids": (), "logits_processors": ([],), "use_beam_search": (False,),
    "length_penalty": (1,), "early_stopping": (False,), "truncate_prompt_tokens": (), "prompt_logprobs": (),
    "include_stop_str_in_output": (False,), "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,),
    "no_stop_trim": (False,), "stop_regex": (), "chat_template": (), "documents": ([],), "mm_processor_kwargs": ({},),
    "return_token_ids": (False,), "return_tokens_as_token_ids": (False,), "lora_path": (),
    # llama.cpp's, Ollama's and transformers'
    "json_schema": (), "grammar": ("",), "n_predict": (-1,), "repeat_penalty": (1,), "typical_p": (1,), "tfs_z": (1,),
    "mirostat": (0,), "dynatemp_range": (0,), "xtc_probability": (0,), "dry_multiplier": (0,), "samplers": (),
    "lora": ([],), "format": ("",), "options": ({},), "images": ([],), "max_new_tokens": (), "min_new_tokens": (),
    "max_length": (), "min_length": (), "do_sample": (True,), "num_beams": (1,), "no_repeat_ngram_size": (0,),
}  # fmt: skip
"""Keys that change what an answer means, with the values that do not; null never does."""
CHANGES_CHAT = {
    **CHANGES_SAMPLED, "prediction": (), "echo": (False,),
    "add_special_tokens": (False,),
}  # fmt: skip
CHANGES_TEXT = {
    **CHANGES_SAMPLED, "suffix": ("",), "add_special_tokens": (True,), "messages": (), "chat_template_kwargs": ({},),
}  # fmt: skip
CHANGES_MESSAGE: dict[str, Any] = {"tool_calls": ([],), "tool_call_id": (), "function_call": (), "audio": ()}


def refuse_unsupported(request: Loose, changes: dict[str, Any], prefix: str = "") -> None:
    """Raises ApiError for a key of a table as CHANGES_SAMPLED, with a value that changes something."""
    for key, value in (request.model_extra or {}).items():
        if key in changes and value is not None and value not in changes[key]:
            text = f"{key} would change what the answer means, and this server does not do it; leave it out."
            raise ApiError(400, text, param=prefix + key, code="unsupported_parameter")


def param_of(path: Sequence[int | str], body: Any) -> str | None:
    """The key that a validation error is about, as in messages[0].role: pydantic's path without its type names."""
    name = ""
    for part in path:
        if isinstance(body, dict) and isinstance(part, str) and (part in body or part == path[-1]):
            name += f".{part}" if name else part
            body = body.get(part)
        elif isinstance(body, list) and isinstance(part, int) and part < len(body):
            name += f"[{part}]"
            body = body[part]
    return name or None
