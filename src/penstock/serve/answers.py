"""The page's answers while they are written: each belongs to the server, and any number of viewers sees it grow.

A request begins an answer and another may stop it; neither has to stay. The text is stored as it comes, on another
thread and all answers in one transaction: once in SAVE_SECONDS what grew, at once what ended. Knows no HTTP.

[Note: an answer is over when it is stored] Viewers are told the end after that transaction. A row without a
finish_reason is an answer that is being written; after a crash the next start marks it as interrupted.
"""

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any

from penstock.serve.errors import ApiError
from penstock.serve.scheduler import Generation, Piece
from penstock.serve.store import Row, Store

SAVE_SECONDS = 1.0
"""Between two transactions that store how answers grew: so much text a killed server loses."""
PING_SECONDS = 15.0
"""A viewer hears something so often, or the proxy between would close the connection."""
CLOSE_SECONDS = 10.0
"""For the last transaction of a server that ends."""


class Answer:
    """A stored message and the text that it gains."""

    def __init__(self, message: Row, generation: Generation | None = None) -> None:
        self.row = message
        """As it was when this began."""
        self.generation = generation
        """None: it has ended."""
        self.finish_reason: str | None = message["finish_reason"]
        self.failure: ApiError | None = None
        """Why it ended with an error."""
        self.texts: list[str] = [message["content"]]
        """All text, in the pieces in which it came."""
        self.usage: dict[str, Any] | None = message.get("usage")
        """Tokens and seconds, once it has ended."""
        self.saved = 1
        """How many of the pieces are stored."""
        self.over = asyncio.Event()
        """Set when its end is stored."""
        self._news = asyncio.Event()
        if generation is None:
            self.over.set()

    @property
    def message(self) -> Row:
        """The row, with the text so far."""
        text = "".join(self.texts)
        return {**self.row, "content": text, "finish_reason": self.finish_reason, "usage": self.usage}

    async def growth(self, seen: int) -> AsyncGenerator[str, None]:
        """The text behind the pieces that were seen, and "" now and then while none comes; ends when that is stored."""
        while True:
            news, over = self._news, self.over.is_set()
            if len(self.texts) > seen:
                text, seen = "".join(self.texts[seen:]), len(self.texts)
                yield text
            if over:
                return
            try:
                async with asyncio.timeout(PING_SECONDS):
                    await news.wait()
            except TimeoutError:
                yield ""

    def take(self, pieces: list[Piece]) -> None:
        """Adds what was generated; no pieces are the end of a generation that was cancelled."""
        self.texts += [piece.text for piece in pieces if piece.text]
        last = pieces[-1] if pieces else Piece(0, "", finish_reason="cancelled")
        self.finish_reason, self.failure = last.finish_reason, last.error
        if last.error is not None and last.error.code == "shutting_down":  # the next server can go on with it
            self.finish_reason, self.failure = "interrupted", None
        if self.finish_reason is not None and self.generation is not None:
            self.usage = usage_of(self.generation, self.usage)
        self._tell()

    def end(self) -> None:
        """Tells the viewers that it is over."""
        self.over.set()
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


def usage_of(generation: Generation, earlier: dict[str, Any] | None) -> dict[str, Any]:
    """Tokens of the prompt and of the answer, and the seconds from its first token to its last. `earlier`: those of the
    parts that it goes on with, which are a part of its prompt."""
    before = earlier or {"completion_tokens": 0, "seconds": 0.0}
    began = generation.first_token_at
    seconds = 0.0 if began is None else time.monotonic() - began
    return {
        "prompt_tokens": max(0, len(generation.prompts[0]) - before["completion_tokens"]),
        "completion_tokens": before["completion_tokens"] + generation.tokens_made,
        "seconds": round(before["seconds"] + seconds, 3),
    }


class Answers:
    """The answers that are being written. Belongs to the event loop."""

    def __init__(self, store: Store, cancel: Callable[[Generation], None], count: Callable[[Generation], None]) -> None:
        """`cancel` ends a generation early; `count` is called with each that has ended."""
        self._store, self._cancel, self._count = store, cancel, count
        self._writing: dict[str, Answer] = {}
        """By the message's id."""
        self._ended = asyncio.Event()
        """Set when an end waits to be stored."""
        self._tasks: set[asyncio.Task[None]] = set()

    def find(self, message_id: str, conversation_id: str | None = None) -> Answer | None:
        """The answer that is being written into a message, if there is one; in this conversation, if one is named."""
        answer = self._writing.get(message_id)
        elsewhere = answer is not None and conversation_id not in (None, answer.row["conversation_id"])
        return None if elsewhere else answer

    def of(self, conversation_id: str) -> list[Answer]:
        """Those of a conversation."""
        return [answer for answer in self._writing.values() if answer.row["conversation_id"] == conversation_id]

    def begin(self, message: Row, generation: Generation) -> Answer:
        """Writes what is generated into a stored message. One that is being written, or has ended, stays as it is."""
        answer = self._writing.get(message["id"]) or Answer(message, None if message["finish_reason"] else generation)
        if answer.generation is not generation:
            self._cancel(generation)
            return answer
        if not self._writing:
            self._keep(self._save())
        self._writing[message["id"]] = answer
        self._keep(self._write(answer, generation))
        return answer

    async def stop(self, answers: Iterable[Answer]) -> None:
        """Ends answers as they are, and waits until that is stored."""
        answers = list(answers)
        for answer in answers:
            if answer.generation is not None:
                self._cancel(answer.generation)
        for answer in answers:
            await answer.over.wait()

    async def close(self) -> None:
        """Waits until all ends are stored, when no more text comes."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                for answer in list(self._writing.values()):
                    await answer.over.wait()

    def _keep(self, work: Any) -> None:
        """Runs a coroutine; the event loop itself keeps no task alive."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _write(self, answer: Answer, generation: Generation) -> None:
        while answer.finish_reason is None:
            answer.take(await generation.pieces())
        self._ended.set()
        self._count(generation)

    async def _save(self) -> None:
        """Stores all answers until none is left. What cannot be stored now is tried again."""
        clock, due = asyncio.get_running_loop().time, 0.0
        while self._writing:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await self._ended.wait()
            self._ended.clear()
            writing, grown = self._writing.values(), clock() >= due
            due = clock() + SAVE_SECONDS if grown else due
            changed = [each for each in writing if each.finish_reason or (grown and len(each.texts) > each.saved)]
            rows = [answer.message for answer in changed]
            pieces = [len(answer.texts) for answer in changed]
            if not rows:
                continue
            try:
                missing = await asyncio.to_thread(self._store.save_answers, rows)
            except Exception as error:  # a database may fail in any way, and come back
                print(f"answers are not stored, and will be tried again: {error}", file=sys.stderr, flush=True)
                await asyncio.sleep(SAVE_SECONDS)
                self._ended.set()
                continue
            for answer, row, count in zip(changed, rows, pieces, strict=True):
                answer.saved = count
                if row["finish_reason"] is not None:
                    del self._writing[row["id"]]
                    answer.end()
                elif row["id"] in missing and answer.generation is not None:  # deleted with its conversation
                    self._cancel(answer.generation)
