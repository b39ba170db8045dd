"""Prepares items beside serving: models answer the prompts that came alone, reward models say what to ask about first.

[Note: people come first] One prompt's answers are begun at a time, and only where rows are free and nobody waits. What
is to be done is in the database: a server that ends loses the answers that it was writing, and begins them again.
"""

import asyncio
import contextlib
import functools
import hashlib
import math
import sys
from typing import Any

from pydantic import ValidationError

from penstock.data.records import Prompt
from penstock.errors import DataError
from penstock.serve import openai_requests
from penstock.serve.detokenize import OPEN, opens_thought
from penstock.serve.errors import ApiError
from penstock.serve.labelling import waiting
from penstock.serve.labelling.uncertainty import least_known, uncertainty
from penstock.serve.models.catalogue import ServedReward
from penstock.serve.scheduler import LOST
from penstock.serve.service import Life, Service
from penstock.serve.store import Row

IDLE_SECONDS = 30.0
"""Between two looks when nothing was to be done; an import is looked at once."""
BUSY_SECONDS = 0.2
"""Between two looks for free rows."""
SCORED_AT_ONCE = 8
"""Items between two transactions."""


class Preparation:
    """The task that prepares items. Belongs to the event loop."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._lost: set[str] = set()
        """Items in whose answers the models' process has ended once."""

    async def run(self) -> None:
        """Goes on until it is cancelled."""
        while True:
            news = self._service.new_items
            news.clear()
            try:
                worked = await self._work()
            except Exception as error:  # a database or a model may fail in any way, and come back
                print(f"the labelling room will try again: {error}", file=sys.stderr, flush=True)
                worked = False
            if not worked:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(IDLE_SECONDS):
                        await news.wait()

    async def _work(self) -> bool:
        """Does the next thing; False where there is none."""
        service = self._service
        if service.life is not Life.SERVING:
            await asyncio.sleep(BUSY_SECONDS)
            return True
        item = await asyncio.to_thread(waiting.next_draft, service.store)
        if item is not None:
            await self._answer(item)
            return True
        rewards = service.catalogue.rewards()
        if not rewards:
            return False
        scorers = hashlib.sha256("".join(reward.digest for reward in rewards).encode()).hexdigest()
        items = await asyncio.to_thread(waiting.unscored, service.store, scorers, SCORED_AT_ONCE)
        values = {item["id"]: await self._uncertainty(item, rewards) for item in items}
        if values:
            await asyncio.to_thread(waiting.store_uncertainty, service.store, values, scorers)
        return bool(values)

    async def _answer(self, item: Row) -> None:
        """Has the models of an item's draft answer its prompt."""
        draft, answers = item["draft"], list[Row]()
        models = draft["models"][: draft["answers"]]
        try:
            for i, name in enumerate(models):
                share = range(i, draft["answers"], len(models))
                answers += await self._answers(name, item["prompt"], len(share), draft["sampling"])
        except ApiError as error:
            lost = error.code == LOST and item["id"] not in self._lost  # perhaps by somebody else's request
            if lost or error.status in (429, 503):
                self._lost |= {item["id"]} if lost else set()
                await asyncio.sleep(BUSY_SECONDS)
                return
            await asyncio.to_thread(waiting.fail_draft, self._service.store, item["id"], error.message)
            return
        different = {answer["content"]: answer for answer in reversed(answers) if answer["content"].strip()}
        if len(different) < 2:
            problem = f"{len(answers)} answers were made, and {len(different)} of them differ; raise the temperature."
            await asyncio.to_thread(waiting.fail_draft, self._service.store, item["id"], problem)
            return
        kept = [different[text] for text in reversed(different)]
        count = draft.get("keep") or len(kept)
        if count < len(kept):
            scores = await self._scores({**item, "answers": kept}, self._service.catalogue.rewards())
            kept = [kept[i] for i in least_known(scores, count)] if scores else kept[:count]
        await asyncio.to_thread(waiting.finish_draft, self._service.store, item["id"], kept)

    async def _answers(self, name: str, prompt: Any, count: int, sampling: Row) -> list[Row]:
        """Answers of one model. Raises ApiError."""
        service, model = self._service, self._service.find(name)
        encode: Any = openai_requests.encode_chat
        body: Any = openai_requests.ChatRequest
        given: Row = {"model": name, "n": count, **sampling, "messages": prompt}
        if isinstance(prompt, str):
            encode, body = openai_requests.encode_text, openai_requests.CompletionRequest
            given = {"model": name, "n": count, "max_tokens": model.length, **sampling, "prompt": prompt}
        try:
            request = body.model_validate(given)
        except ValidationError as error:
            raise ApiError(400, f"{name} cannot answer this prompt: {error.errors()[0]['msg']}.") from error
        encoded = await service.encode(len(str(prompt)), encode, request, model)
        while service.scheduler and (waiting_now := service.scheduler.outstanding) and waiting_now + count > model.rows:
            await asyncio.sleep(BUSY_SECONDS)
        generation = service.begin(model, encoded)
        texts, reasons = [""] * count, [""] * count
        try:
            while not all(reasons):
                for piece in await generation.pieces():
                    if piece.error is not None:
                        raise piece.error
                    texts[piece.index] += piece.text
                    reasons[piece.index] = piece.finish_reason or ""
        finally:
            service.cancel(generation)
            service.metrics.generated(generation)
        opening = OPEN if opens_thought(model.decode, generation.prompts[0]) else ""
        origin = {"model": name, "digest": model.digest, "sampling": {**sampling, "seed": encoded.sampling.seed}}
        return [
            {"content": opening + text, **origin, "finish_reason": reason}
            for text, reason in zip(texts, reasons, strict=True)
        ]

    async def _uncertainty(self, item: Row, rewards: list[ServedReward]) -> float | None:
        """What the reward models leave open about an item's answers; None where they cannot read them."""
        scores = await self._scores(item, rewards)
        return uncertainty(scores) if scores else None

    async def _scores(self, item: Row, rewards: list[ServedReward]) -> list[list[float]] | None:
        """Of each reward model, of each answer, unscaled; None where one cannot read them or says no number."""
        prompt, scores = item["prompt"], list[list[float]]()
        record = Prompt(where=item["id"], **({"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}))
        for reward in rewards:
            try:
                rows = [
                    await self._service.encode(
                        len(str(prompt)) + len(answer["content"]),
                        functools.partial(reward.encoder.encode_response, ended=True), record, answer["content"],
                    )
                    for answer in item["answers"]
                ]  # fmt: skip
            except DataError:
                return None
            if max(map(len, rows)) > reward.length:
                return None
            values: list[float] = []
            for part in reward.parts(rows):
                if self._service.scheduler is None:
                    return None
                values += await self._service.scheduler.score(reward.number, rows[part])
            # As the reward model was trained: PPO's scale divides margins by the spread of scores.
            scores.append([value * reward.std for value in values])
        return scores if all(math.isfinite(value) for row in scores for value in row) else None
