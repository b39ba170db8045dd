"""What /v1 answers: OpenAI's objects, whole or as server-sent events, made from the pieces of a generation.

The schemas at the top are what the OpenAPI document promises; the bytes are built below without them, because a stream
of 128 answers sends thousands of pieces a second.
"""

import json
import math
import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any, Literal

from pydantic import BaseModel

from penstock.serve.catalogue import ServedModel
from penstock.serve.errors import ApiError
from penstock.serve.scheduler import Generation, Token

LEAST_LOGPROB = -9999.0
"""What OpenAI writes for a probability of zero, which JSON has no logarithm of."""
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
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
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


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"]
    data: list[ModelCard]


# --- whole ------------------------------------------------------------------------------------------------------------


async def whole(generation: Generation, chat: bool) -> dict[str, Any]:
    """The answer in one object. Raises ApiError when an answer failed, or everybody has gone."""
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
    served, choices = generation.served, []
    for i, text in enumerate(texts):
        said = logprobs_of(served, tokens[i], generation, chat)
        body = {"message": {"role": "assistant", "content": text, "refusal": None}} if chat else {"text": text}
        choices.append({"index": i, **body, "logprobs": said, "finish_reason": reasons[i]})
    kind = "chat.completion" if chat else "text_completion"
    return {**_head(kind, served, chat), "choices": choices, "usage": usage_of(generation)}


def usage_of(generation: Generation) -> dict[str, int]:
    """Tokens read and made."""
    read, made = sum(map(len, generation.prompts)), generation.tokens_made
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


def _head(kind: str, served: ServedModel, chat: bool) -> dict[str, Any]:
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()),
        "model": served.id, "system_fingerprint": f"fp_{served.digest[:12]}",
    }  # fmt: skip


# --- in pieces --------------------------------------------------------------------------------------------------------


async def events(generation: Generation, chat: bool, with_usage: bool) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events, ended by [DONE]; a failure is an error event, and then there is no [DONE]."""
    served = generation.served
    head = _head("chat.completion.chunk" if chat else "text_completion", served, chat)
    usage: dict[str, Any] = {"usage": None} if with_usage else {}
    # One chunk differs from the next in its choices only.
    start = json.dumps({**head, **usage})[:-1] + ', "choices": [{"index": '
    if chat:
        opening = '"delta": {"role": "assistant", "content": "", "refusal": null}, "logprobs": null'
        yield "".join(
            f'data: {start}{i}, {opening}, "finish_reason": null}}]}}\n\n' for i in range(generation.count)
        ).encode()
    left = generation.count
    while left:
        pieces = await generation.pieces()
        if not pieces:
            return
        lines = []
        for piece in pieces:
            if piece.error:
                lines.append(f"data: {json.dumps(piece.error.body)}\n\n")
                yield "".join(lines).encode()
                return
            said = (
                json.dumps(logprobs_of(served, piece.tokens, generation, chat)) if generation.wants_tokens else "null"
            )
            text = json.dumps(piece.text)
            if chat:
                if piece.text or piece.tokens:
                    lines.append(
                        f'data: {start}{piece.index}, "delta": {{"content": {text}}}, "logprobs": {said}, '
                        '"finish_reason": null}]}\n\n'
                    )
                if piece.finish_reason:
                    lines.append(
                        f'data: {start}{piece.index}, "delta": {{}}, "logprobs": null, '
                        f'"finish_reason": "{piece.finish_reason}"}}]}}\n\n'
                    )
            else:
                reason = json.dumps(piece.finish_reason)
                rest = f'"text": {text}, "logprobs": {said}, "finish_reason": {reason}'
                lines.append(f"data: {start}{piece.index}, {rest}}}]}}\n\n")
            left -= piece.finish_reason is not None
        yield "".join(lines).encode()
    if with_usage:
        yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage_of(generation)})}\n\n".encode()
    yield b"data: [DONE]\n\n"


# --- log-probabilities ------------------------------------------------------------------------------------------------


def logprobs_of(served: ServedModel, tokens: Any, generation: Generation, chat: bool) -> dict[str, Any] | None:
    """The log-probabilities of some tokens in OpenAI's form, or None where they were not asked for."""
    if not generation.wants_tokens:
        return None
    if chat:
        return {
            "content": [
                {**_one(served, token.id, token.logprob), "top_logprobs": [_one(served, *one) for one in token.top]}
                for token in tokens
            ]
        }
    top = [{_name(served, i): _finite(logprob) for i, logprob in token.top} for token in tokens]
    return {
        "tokens": [_name(served, token.id) for token in tokens],
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": top if generation.sampling.top_logprobs else None,
        "text_offset": [token.start for token in tokens],
    }


def _one(served: ServedModel, token: int, logprob: float) -> dict[str, Any]:
    spelled = served.vocabulary.bytes_of(token)
    return {"token": spelled.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(spelled)}


def _name(served: ServedModel, token: int) -> str:
    """A token's text; where it is no text by itself, its bytes as OpenAI writes them."""
    spelled = served.vocabulary.bytes_of(token)
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB) if math.isfinite(logprob) else LEAST_LOGPROB
