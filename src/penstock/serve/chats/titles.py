"""Titles by a model: one short generation after a first answer, made while nobody waits and dropped for who comes.

A model that writes no title (a base model, one that thinks for long) leaves the one that there is.
"""

import asyncio
import contextlib
from typing import Any

from penstock.serve import openai_requests
from penstock.serve.chats.title_text import cleaned
from penstock.serve.errors import ApiError
from penstock.serve.models.catalogue import ServedModel
from penstock.serve.service import Service

TOKENS = 24
"""Of a title."""
CHARACTERS = 1000
"""Of the question and of the answer that the model reads."""
SECONDS = 60.0
"""From the first try to the last: a server that is busy for longer leaves the title."""
IDLE_SECONDS = 0.1
"""Between two looks whether nobody waits."""
ASK = """Here is the beginning of a conversation.

Question: {question}

Answer: {answer}

Give it a title of two to six words, in its own language. Reply with the title alone."""


async def title_of(service: Service, model: ServedModel, question: str, answer: str) -> str:
    """The model's title for a conversation that begins so, or an empty one."""
    text = ASK.format(question=question[:CHARACTERS], answer=answer[:CHARACTERS])
    chat: dict[str, Any] = {"model": model.id, "messages": [{"role": "user", "content": text}]}
    with contextlib.suppress(KeyError):  # raised where the chat template reads no such argument
        model.encoder_with({"enable_thinking": False})
        chat["chat_template_kwargs"] = {"enable_thinking": False}
    body = openai_requests.ChatRequest.model_validate({**chat, "temperature": 0.0, "max_tokens": TOKENS})
    with contextlib.suppress(ApiError, TimeoutError):  # a small context, a server that ends, one that is always busy
        encoded = await service.encode(len(text), openai_requests.encode_chat, body, model)
        async with asyncio.timeout(SECONDS):
            while True:
                title = await _attempt(service, model, encoded)
                if title is not None:
                    return cleaned(title)
    return ""


async def _attempt(service: Service, model: ServedModel, request: openai_requests.EncodedRequest) -> str | None:
    """What the model writes once nobody else waits for an answer; None if somebody came before its end."""
    while service.scheduler is not None and service.scheduler.outstanding and not service.draining:
        await asyncio.sleep(IDLE_SECONDS)
    if service.draining:
        return ""
    generation = service.begin(model, request, background=True)
    text = ""
    try:
        while pieces := await generation.pieces():
            text += "".join(piece.text for piece in pieces)
            if pieces[-1].finish_reason is not None:
                return "" if pieces[-1].error else text
        return None
    finally:
        service.background.discard(generation)
        service.cancel(generation)
