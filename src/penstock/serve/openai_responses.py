"""Answers of /v1: OpenAI's objects, whole or as server-sent events, made of the pieces of a generation.

The schemas at the top are for the OpenAPI document. The bytes are built below without them, because 128 streams send
thousands of pieces a second.
"""

import json
import math
import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

from penstock.serve.detokenize import ThoughtSplitter, opens_thought
from penstock.serve.errors import ApiError
from penstock.serve.models.catalogue import ServedModel
from penstock.serve.scheduler import Generation, Piece, Token

MIN_LOGPROB = -9999.0
"""OpenAI's log-probability of zero: JSON has no infinity."""
Finish = Literal["stop", "length"]


class Usage(BaseModel):
    """Tokens read and made; an end-of-sequence token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(BaseModel):
    """A token that could have come."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token that came, and the likeliest in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Of an answer's tokens, at the temperature asked for and before top_k, top_p and min_p."""

    content: list[TokenLogprob] | None


class AnswerMessage(BaseModel):
    """The turn that was written."""

    role: Literal["assistant"]
    content: str
    reasoning_content: str | None = Field(None, description="Not OpenAI's: a thought in <think> before the content.")
    refusal: str | None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class ChatCompletion(BaseModel):
    """The answer to /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(BaseModel):
    """Of a completion's tokens, in columns."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class TextChoice(BaseModel):
    """One completion."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Finish


class TextCompletion(BaseModel):
    """The answer to /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    task: Literal["generate", "score"]
    max_model_len: int | None


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"]
    data: list[ModelCard]


# --- whole ------------------------------------------------------------------------------------------------------------


async def whole(generation: Generation, chat: bool) -> dict[str, Any]:
    """The answer in one object. Raises ApiError when an answer fails, or the client disconnects."""
    texts, tokens = [""] * generation.count, [list[Token]() for _ in range(generation.count)]
    reasons: dict[int, str] = {}
    while len(reasons) < generation.count:
        pieces = await generation.pieces()
        if not pieces:
            raise ApiError(408, "the client closed the connection.")
        for piece in pieces:
            if piece.error:
                raise piece.error
            texts[piece.index] += piece.text
            tokens[piece.index] += piece.tokens
            if piece.finish_reason:
                reasons[piece.index] = piece.finish_reason
    choices = []
    opened = chat and opens_thought(generation.model.decode, generation.prompts[0])
    for i, text in enumerate(texts):
        body = {"message": _message(text, opened)} if chat else {"text": text}
        logprobs = logprobs_of(generation, tokens[i], chat)
        choices.append({"index": i, **body, "logprobs": logprobs, "finish_reason": reasons[i]})
    head = _head("chat.completion" if chat else "text_completion", generation.model, chat)
    return {**head, "choices": choices, "usage": usage_of(generation)}


def _message(text: str, opened: bool) -> dict[str, Any]:
    thought, content = ThoughtSplitter(opened).push(text, last=True)
    return {"role": "assistant", "content": content, "refusal": None} | (
        {"reasoning_content": thought} if thought else {}
    )


def usage_of(generation: Generation) -> dict[str, int]:
    """Tokens of prompts and answers."""
    prompt, completion = sum(map(len, generation.prompts)), generation.tokens_made
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _head(object_name: str, model: ServedModel, chat: bool) -> dict[str, Any]:
    answer_id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
    source = {"model": model.id, "system_fingerprint": f"fp_{model.digest[:12]}"}
    return {"id": answer_id, "object": object_name, "created": int(time.time()), **source}


# --- in pieces --------------------------------------------------------------------------------------------------------


async def events(generation: Generation, chat: bool, with_usage: bool) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events, ended by [DONE]; a failure is an error event, without [DONE] after it."""
    head = _head("chat.completion.chunk" if chat else "text_completion", generation.model, chat)
    usage: dict[str, Any] = {"usage": None} if with_usage else {}
    # Chunks differ in their choices only.
    start = "data: " + json.dumps({**head, **usage})[:-1] + ', "choices": [{"index": '
    if chat:
        opening = '"delta": {"role": "assistant", "content": "", "refusal": null}, "logprobs": null'
        indices = range(generation.count)
        yield "".join(f'{start}{i}, {opening}, "finish_reason": null}}]}}\n\n' for i in indices).encode()
    unfinished = generation.count
    opened = chat and opens_thought(generation.model.decode, generation.prompts[0])
    splitters = [ThoughtSplitter(opened) for _ in range(generation.count)]
    while unfinished:
        pieces = await generation.pieces()
        if not pieces:
            return
        lines = []
        for piece in pieces:
            if piece.error:
                lines.append(f"data: {json.dumps(piece.error.body)}\n\n")
                yield "".join(lines).encode()
                return
            lines += [
                f"{start}{piece.index}, {choice}}}]}}\n\n"
                for choice in _choices(generation, piece, splitters[piece.index] if chat else None)
            ]
            unfinished -= piece.finish_reason is not None
        yield "".join(lines).encode()
    if with_usage:
        yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage_of(generation)})}\n\n".encode()
    yield b"data: [DONE]\n\n"


def _choices(generation: Generation, piece: Piece, splitter: ThoughtSplitter | None) -> Iterator[str]:
    """A piece as the choices of one event or more, in JSON without the index; without a splitter it is no chat."""
    logprobs = "null"
    if generation.wants_tokens:
        logprobs = json.dumps(logprobs_of(generation, piece.tokens, splitter is not None))
    reason = json.dumps(piece.finish_reason)
    if splitter is None:
        yield f'"text": {json.dumps(piece.text)}, "logprobs": {logprobs}, "finish_reason": {reason}'
        return
    thought, text = splitter.push(piece.text, piece.finish_reason is not None)
    if thought:
        yield f'"delta": {{"reasoning_content": {json.dumps(thought)}}}, "logprobs": {logprobs}, "finish_reason": null'
        logprobs = "null"  # of a piece they are sent once
    if text or (piece.tokens and not thought):
        yield f'"delta": {{"content": {json.dumps(text)}}}, "logprobs": {logprobs}, "finish_reason": null'
    if piece.finish_reason:
        yield f'"delta": {{}}, "logprobs": null, "finish_reason": {reason}'


# --- log-probabilities ------------------------------------------------------------------------------------------------


def logprobs_of(generation: Generation, tokens: Sequence[Token], chat: bool) -> dict[str, Any] | None:
    """The log-probabilities of some tokens in OpenAI's form, or None where the request does not want them."""
    if not generation.wants_tokens:
        return None
    model = generation.model
    if chat:
        content = [
            {
                **_spelled(model, token.id, token.logprob or 0.0),
                "top_logprobs": [_spelled(model, *top) for top in token.top],
            }
            for token in tokens
        ]
        return {"content": content}
    return {
        "tokens": [_name(model, token.id) for token in tokens],
        "token_logprobs": [None if token.logprob is None else _finite(token.logprob) for token in tokens],
        "top_logprobs": [_by_name(model, token.top) for token in tokens] if generation.sampling.top_logprobs else None,
        "text_offset": [token.start for token in tokens],
    }


def _by_name(model: ServedModel, top: Sequence[tuple[int, float]]) -> dict[str, float] | None:
    """The likeliest tokens by their texts; of two with the same text the likelier one."""
    named: dict[str, float] = {}
    for token_id, logprob in top:
        named.setdefault(_name(model, token_id), _finite(logprob))
    return named or None


def _spelled(model: ServedModel, token_id: int, logprob: float) -> dict[str, Any]:
    spelling = model.vocabulary.bytes_of(token_id)
    return {"token": spelling.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(spelling)}


def _name(model: ServedModel, token_id: int) -> str:
    """A token's text; for a part of a character, its bytes as OpenAI writes them."""
    spelling = model.vocabulary.bytes_of(token_id)
    try:
        return spelling.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB) if math.isfinite(logprob) else MIN_LOGPROB
