"""Text from a decoder: continuous batching over the rows of one fixed KV cache.

Every step gives each running answer one token. A prompt is read once, whatever the number of its answers. The weights
are the trainer's own, wherever they live. An answer depends on its prompt, seed and episode number alone: see [Note:
one random stream per answer] in `sampling`.

[Note: running rows stand side by side] Running answers are rows 0 .. n-1 of the cache. When one ends, the last row
moves into its place, and waiting prompts take the rows behind. So a step computes nothing for empty rows and needs no
mask over them.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from penstock.errors import UserError
from penstock.kernels import cpu_ops
from penstock.memory.strategy import Strategy
from penstock.memory.tiers import Ram
from penstock.models import surgery
from penstock.models.chat_template import ChatTemplate, ends_of, words_of
from penstock.models.decoder import Decoder
from penstock.models.roles import Actor
from penstock.models.tiling import prefills
from penstock.models.tokenizer_files import load_tokenizer
from penstock.rollout.cache import KVCache
from penstock.rollout.cuda_graphs import Steps
from penstock.rollout.in_step import RowsInStep
from penstock.rollout.sampling import Sampling, adjust, pick, stream


@dataclass
class Answer:
    """One sampled response. Example: Answer([5, 9], [7, 2], [-0.3, -1.1], "stop")."""

    prompt_ids: list[int]
    response_ids: list[int] = field(default_factory=list)
    """The sampled tokens; a first EOS ends the response and belongs to it (PPO.md 1)."""
    logprobs: list[float] = field(default_factory=list)
    """Log-probability of each response token at the sampling temperature."""
    finish_reason: str = "length"
    """`stop` when EOS or a stop string was sampled, `length` when the limit came first, `cancelled`, or `error`."""
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    """Per response token the likeliest ones and their log-probabilities, if they were asked for."""
    error: str | None = None
    """What was wrong with this request; the others went on."""
    text: str | None = None
    """The response without its EOS and stop string, where the engine has a tokenizer."""


Rollout = list[Answer]
"""Sampled answers, those of one prompt side by side, in the order of the prompts."""
MOST_ANSWERS = 4096
"""Answers to one prompt at most."""


class _Prompt:
    """A prompt that several answers may share."""

    def __init__(self, ids: list[int], adapter: int | None = None) -> None:
        self.ids, self.adapter = ids, adapter
        self.state: Tensor | None = None
        """[D], the hidden state behind its last token, once it has been read."""


@dataclass(eq=False)
class _Run:
    """An answer on its way."""

    answer: Answer
    prompt: _Prompt
    sampling: Sampling
    numbers: list[float]
    """The random numbers that pick its tokens."""
    limit: int
    """Tokens it may have."""
    ends: frozenset[int]
    """Tokens that end it."""

    @property
    def length(self) -> int:
        """Tokens in its row."""
        return len(self.prompt.ids) + len(self.answer.response_ids)


class Engine:
    """See the module. Not for several threads: whoever owns it calls `step` while it is `busy`."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        eos_ids: Sequence[int] | None = None,
        rows: int = 32,
        length: int | None = None,
        tokenizer: Any = None,
        swap: Ram | None = None,
        fixed: bool | None = None,
        hidden: Collection[int] = (),
    ) -> None:
        """`rows` answers run together, each of at most `length` tokens with its prompt (the model's own limit). The KV
        cache lives in `swap`, a tier of host memory, and not on the device, if there is one. `fixed`: decode at fixed
        addresses, as rollout.cuda_graphs does; by default on a GPU whose weights and cache do not move. `hidden`:
        tokens that are no text, besides the ends."""
        most = decoder.config.max_length
        self.decoder, self.tokenizer = decoder, tokenizer
        self.eos_ids = frozenset(decoder.config.eos_ids if eos_ids is None else eos_ids)
        self._hidden = self.eos_ids | frozenset(hidden)
        self.rows, self.length, self._swap = rows, min(length or most, most), swap
        self.prompts_read = 0
        """Prompts that a prefill has gone through."""
        self._in_step = RowsInStep(decoder) if decoder.config.foreign else None
        """Of transformers' own layers: see [Note: rows in step]."""
        cpu_ops.warn_without(decoder.device)
        self._waiting: list[_Run] = []
        self._running: list[_Run] = []
        self._cache: KVCache | None = None
        self._fixed = fixed
        self._steps: tuple[int, Steps] | None = None
        """Steps at fixed addresses, under the lease of that number."""
        self._prompts: WeakValueDictionary[tuple[int | None, ...], _Prompt] = WeakValueDictionary()
        """Prompts of answers that wait or run, by their adapter and tokens."""

    @staticmethod
    def from_pretrained(source: str, *, dtype: str = "fp32", device: str | None = None, rows: int = 32) -> "Engine":
        """Weights and tokenizer of a Hugging Face directory or hub id; dtype fp32, bf16 or int8 (weights only)."""
        decoder, tokenizer = load(source, dtype, device)[1].decoder, load_tokenizer(source)
        template = None if tokenizer is None else ChatTemplate(tokenizer)
        ends, hidden = ends_of(template, decoder.config.eos_ids), template.structure if template else ()
        return Engine(decoder, eos_ids=ends.ids, tokenizer=tokenizer, rows=rows, hidden=hidden)

    # --- requests -----------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling,
        *,
        episodes: Sequence[int] | None = None,
        adapter: int | None = None,
    ) -> list[Answer]:
        """Queues `sampling.n` answers to one prompt; `episodes` are their random streams (0, 1, 2 ... by default).
        `adapter`: the number of theirs, where the decoder has several (surgery.add_adapters_by_row).

        A request that cannot be answered comes back with its `error` and takes no part; nothing is raised.
        """
        ids = self._ids(prompt) if isinstance(prompt, str) and self.tokenizer else prompt
        wrong = self._wrong(ids, sampling)
        if wrong:
            return [Answer([], finish_reason="error", error=wrong) for _ in range(min(sampling.n, MOST_ANSWERS))]
        answers = [Answer(list(map(int, ids))) for _ in range(sampling.n)]
        prompt_ids = answers[0].prompt_ids
        shared = self._prompts.setdefault((adapter, *prompt_ids), _Prompt(prompt_ids, adapter))
        limit, ends = min(sampling.max_new_tokens, self.length - len(shared.ids)), self.ends_of(sampling)
        for answer, episode in zip(answers, episodes or range(sampling.n), strict=True):
            numbers = stream(sampling.seed, episode, limit).tolist()
            self._waiting.append(_Run(answer, shared, sampling, numbers, limit, ends))
        return answers

    def ends_of(self, sampling: Sampling) -> frozenset[int]:
        """Tokens that end answers which are sampled so."""
        return frozenset(sampling.stop_ids) | (frozenset() if sampling.ignore_eos else self.eos_ids)

    def _ids(self, prompt: str) -> list[int]:
        """A text's ids, without the end that some tokenizers (T5's) put behind every text."""
        ids = list(self.tokenizer(prompt).input_ids)
        spelled = ids[-1:] == list(self.tokenizer(prompt[-64:], add_special_tokens=False).input_ids)[-1:]
        return ids[:-1] if ids and ids[-1] in self.eos_ids and not spelled else ids

    def _wrong(self, ids: Any, sampling: Sampling) -> str | None:
        if isinstance(ids, str):
            return "a text needs a tokenizer, and this model has none; give token ids"
        if sampling.n > MOST_ANSWERS:
            return f"n={sampling.n} answers to one prompt; {MOST_ANSWERS} at most"
        if not ids:
            return "an empty prompt has no state to continue from; give it a BOS token"
        if len(ids) >= self.length:
            return f"a prompt of {len(ids)} tokens leaves no room in the model's {self.length}"
        if not all(0 <= token < self.decoder.config.vocab_size for token in (*ids, *sampling.stop_ids)):
            return f"a prompt or stop_ids hold token ids outside 0 .. {self.decoder.config.vocab_size - 1}"
        if sampling.stop and self.tokenizer is None:
            return "stop strings need a tokenizer, and this model has none"
        return None

    def cancel(self, answer: Answer) -> None:
        """Ends an answer now; its row is free before the next step. What has ended already stays as it is."""
        self._waiting = [run for run in self._waiting if run.answer is not answer or _end(run, "cancelled")]
        for row, run in enumerate(self._running):
            if run.answer is answer:
                _end(run, "cancelled")
                self._leave(row)
                return

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._waiting or self._running)

    @property
    def free(self) -> int:
        """Rows that nobody uses."""
        return self.rows - len(self._running)

    def reserve(self) -> None:
        """Makes the cache for all rows and tokens now, as a plan counts it. Default: see [Note: a cache grows]."""
        if self._in_step is None:
            self._cache = KVCache(self.decoder, self.rows, self.length, self._swap)

    # --- one token each -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> list[Answer]:
        """One token for every answer that has a row, after free rows were given to waiting ones.

        Returns the answers that got one. Where ranks share the weights, all of them call it while any is busy.
        """
        if self._in_step is not None:
            return self._step_in_step(self._in_step)
        feed, old = self.decoder.feed, len(self._running)
        if self._cache is None and self._waiting:
            self._cache = KVCache(self.decoder, self.rows, self.length, self._swap, whole=False)
        new = self._waiting[: self.free]
        del self._waiting[: len(new)]
        if self._cache is not None and self._cache.make_room([run.length for run in (*self._running, *new)]):
            self._steps = None
        states = []
        if feed.max_over_ranks(old):
            with cpu_ops.one_token():
                states.append(self._decode() if old else self.decoder.idle())
        first, unread, copies = self._split(new)
        groups = prefills([len(run.prompt.ids) for run in unread])
        for i in range(feed.max_over_ranks(len(groups))):
            if i < len(groups):
                self._prefill(old + groups[i].start, unread[groups[i]])
            else:
                states.append(self.decoder.idle())
        self._running += unread
        for run in copies:
            assert self._cache is not None
            self._cache.copy_row(first[id(run.prompt)], len(self._running), len(run.prompt.ids))
            self._running.append(run)
        states += [run.prompt.state[None] for run in (*unread, *copies) if run.prompt.state is not None]
        self._choose_adapters(self._running)
        with cpu_ops.one_token():
            logits = self.decoder.logits(torch.cat(states))  # a visit, even without rows
        return self._give_tokens(logits.float(), list(self._running)) if self._running else []

    def _step_in_step(self, rows: RowsInStep) -> list[Answer]:
        """`step` for rows that all stand at one position; new ones wait until the last of them has ended."""
        if not self._running:
            self._running, self._waiting = self._waiting[: self.rows], self._waiting[self.rows :]
        ended, states = rows.read([run.prompt.ids + run.answer.response_ids for run in self._running])
        logits = self.decoder.logits(states)  # a visit, even without rows
        return self._give_tokens(logits.float(), [self._running[row] for row in ended]) if ended else []

    def _decode(self) -> Tensor:
        """[n, D]: the states behind the last token of every row."""
        device, runs = self.decoder.device, self._running
        last = [run.answer.response_ids[-1] for run in runs]
        positions = [run.length - 1 for run in runs]
        assert self._cache is not None
        self._choose_adapters(runs)
        if self._is_fixed():
            leased = self.decoder.feed.leased
            if self._steps is None or self._steps[0] != leased:
                self._steps = leased, Steps(self.decoder, self._cache)
            return self._steps[1].run(last, positions)
        slots = torch.tensor(positions, device=device)
        with self._cache.lend(0, len(runs), slots) as layers:
            return self.decoder.decode(torch.tensor(last, device=device), layers, slots, max(positions) + 1)

    def _choose_adapters(self, runs: Sequence[_Run]) -> None:
        """Of the rows of the next forward pass."""
        if self.decoder.row_adapters is not None:
            self.decoder.row_adapters.choose([run.prompt.adapter for run in runs], self.decoder.device)

    def _is_fixed(self) -> bool:
        """Whether weights and cache have fixed addresses now, on a GPU."""
        if self._fixed is not None:
            return self._fixed
        # Which experts are read is known once a router has chosen, and which adapters a row has is known to the host.
        chosen = self.decoder.config.num_experts > 0 or self.decoder.row_adapters is not None
        return self.decoder.device.type == "cuda" and self.decoder.feed.fixed and not (chosen or self._swap)

    def _split(self, new: list[_Run]) -> tuple[dict[int, int], list[_Run], list[_Run]]:
        """Which of these prompts must be read and which answers copy a row: (prompt -> its row, unread, copies)."""
        first = {id(run.prompt): row for row, run in enumerate(self._running)}
        unread: list[_Run] = []
        copies: list[_Run] = []
        for run in new:
            if id(run.prompt) in first:
                copies.append(run)
            else:
                first[id(run.prompt)] = len(self._running) + len(unread)
                unread.append(run)
        return first, unread, copies

    def _prefill(self, start: int, new: list[_Run]) -> None:
        """Reads these prompts into the rows from `start` on."""
        device = self.decoder.device
        assert self._cache is not None
        lengths = torch.tensor([len(run.prompt.ids) for run in new], device=device)
        tokens = torch.zeros(len(new), int(lengths.max()), dtype=torch.int64, device=device)
        for row, run in enumerate(new):
            tokens[row, : len(run.prompt.ids)] = torch.tensor(run.prompt.ids, device=device)
        self._choose_adapters(new)
        with self._cache.lend(start, start + len(new)) as layers:
            hidden = self.decoder.forward(tokens, lengths, layers)
        for run, state in zip(new, hidden[torch.arange(len(new), device=device), lengths - 1], strict=True):
            run.prompt.state = state
        self.prompts_read += len(new)

    def _give_tokens(self, logits: Tensor, runs: Sequence[_Run]) -> list[Answer]:
        """logits [n, V] fp32, run by run."""
        rules: dict[Sampling, list[int]] = {}
        for row, run in enumerate(runs):
            rules.setdefault(run.sampling.rule, []).append(row)
            adjust(logits[row], run.sampling, run.prompt.ids, run.answer.response_ids)
            if run.ends and len(run.answer.response_ids) + 1 < run.sampling.min_new_tokens:
                logits[row, sorted(run.ends)] = -math.inf
        numbers = torch.tensor([run.numbers[len(run.answer.response_ids)] for run in runs], device=logits.device)
        tokens: list[int] = [0] * len(runs)
        logprobs: list[float] = [0.0] * len(runs)
        for rule, rows in rules.items():
            some = slice(None) if len(rules) == 1 else torch.tensor(rows, device=logits.device)
            picked, likely = pick(logits[some], numbers[some], rule)
            # sync: the host must know who has ended
            for row, token, logprob in zip(rows, picked.tolist(), likely.tolist(), strict=True):
                tokens[row], logprobs[row] = token, logprob
        for row, run in enumerate(runs):
            self._take(run, tokens[row], logprobs[row], logits[row])
        for run in reversed(runs):
            if _ended(run):
                self._leave(self._running.index(run))
        return [run.answer for run in runs]

    def _take(self, run: _Run, token: int, logprob: float, logits: Tensor) -> None:
        answer = run.answer
        if math.isnan(logprob):
            answer.error = f"the model's logits were not finite after {len(answer.response_ids)} tokens"
            _end(run, "error")
            return
        answer.response_ids.append(token)
        answer.logprobs.append(logprob)
        if run.sampling.top_logprobs:
            temperature = run.sampling.temperature or 1.0
            likely = torch.log_softmax(logits / temperature, dim=-1).topk(run.sampling.top_logprobs)
            answer.top_logprobs.append(list(zip(likely.indices.tolist(), likely.values.tolist(), strict=True)))
        if token in run.ends or (run.sampling.stop and self._stopped(run)):
            _end(run, "stop")
        elif len(answer.response_ids) == run.limit:
            _end(run, "length")
        if _ended(run) and self.tokenizer is not None:
            answer.text = self._text(run)

    def _stopped(self, run: _Run) -> bool:
        """Whether a stop string has just been completed: it lies within the last tokens, which are a byte at least."""
        stops = run.sampling.stop
        tail = run.answer.response_ids[-(max(len(stop.encode()) for stop in stops) + 8) :]
        text = words_of(self.tokenizer, tail, self._hidden)
        return any(stop in text for stop in stops)

    def _text(self, run: _Run) -> str:
        ids = run.answer.response_ids
        ids = ids[:-1] if ids[-1] in run.ends else ids
        text = words_of(self.tokenizer, ids, self._hidden)
        ends = [text.index(stop) for stop in run.sampling.stop if stop in text]
        return text[: min(ends)] if ends else text

    def _leave(self, row: int) -> None:
        """Frees a row: the last row moves into its place, so that running rows stay side by side."""
        if self._in_step is not None:
            del self._running[row]
            self._in_step.keep([i for i in range(len(self._running) + 1) if i != row])
            return
        last = self._running.pop()
        if row < len(self._running):
            assert self._cache is not None
            self._cache.copy_row(len(self._running), row, last.length)
            self._running[row] = last

    # --- all at once --------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[str | Sequence[int]], sampling: Sampling, *, first_episode: int = 0
    ) -> Rollout:
        """`sampling.n` answers per prompt, those of one prompt side by side; faulty ones carry their `error`."""
        answers = []
        for i, prompt in enumerate(prompts):
            start = first_episode + i * sampling.n
            answers += self.submit(prompt, sampling, episodes=range(start, start + sampling.n))
        self._waiting.sort(key=lambda run: len(run.prompt.ids))  # long prompts together: less padding
        self.run()
        return answers

    def run(self, between: Callable[[], object] = bool) -> None:
        """Until everybody has ended, on every rank that shares the weights, or `between`, before each step, raises."""
        while self.decoder.feed.any_rank_busy(self.busy):
            between()
            self.step()

    def stream(self, prompt: str | Sequence[int], sampling: Sampling, *, episode: int = 0) -> Iterator[int]:
        """The tokens of one answer as they are made, EOS included. Stop iterating to cancel.

        Raises ValueError when the request cannot be answered.
        """
        (answer,) = self.submit(prompt, dataclasses.replace(sampling, n=1), episodes=[episode])
        sent = 0
        try:
            while sent < len(answer.response_ids) or self._knows(answer):
                if sent == len(answer.response_ids):
                    self.step()
                yield from answer.response_ids[sent:]
                sent = len(answer.response_ids)
            if answer.error:
                raise ValueError(answer.error)
        finally:
            self.cancel(answer)

    def _knows(self, answer: Answer) -> bool:
        return any(run.answer is answer for run in (*self._waiting, *self._running))


def _end(run: _Run, reason: str) -> bool:
    """Says why; false, so that a comprehension drops it."""
    run.answer.finish_reason = reason
    run.limit = 0
    return False


def _ended(run: _Run) -> bool:
    return run.limit == 0


def load(source: str, dtype: str, device: str | None = None, adapter: str | None = None) -> tuple[Strategy, Actor]:
    """A model for answering, with its adapter merged, and the strategy that holds it: `naive`, all on one device."""
    strategy = Strategy.named("naive", dtype="bf16" if dtype == "int8" else dtype, device=device)
    with strategy.init():
        actor = Actor.from_pretrained(source, adapter=adapter).requires_grad_(False)
    if dtype != "int8":
        strategy.prepare(actor)
        surgery.merge_adapters(actor.decoder, keep=False)
        return strategy, actor
    if actor.decoder.config.foreign:
        raise UserError(
            f"--dtype int8: the layers of {actor.decoder.config.family} are transformers' own, which answer in fp32 or "
            "bf16; give one of these."
        )
    weights = {name: torch.empty_like(p, device=strategy.world.device) for name, p in actor.named_parameters()}
    actor.fill(weights)
    actor.load_state_dict(weights, assign=True)
    surgery.merge_adapters(actor.decoder, keep=False)
    surgery.quantise(actor.decoder)
    return strategy, actor.requires_grad_(False)


def generate(
    decoder: Decoder,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    *,
    eos_ids: Sequence[int],
    episodes: Sequence[int] | None = None,
    batch_size: int | None = None,
    between: Callable[[], object] = bool,
    **options: Any,
) -> Rollout:
    """`sampling.n` answers per prompt, those of one prompt side by side.

    `episodes` numbers the answers' random streams (0, 1, 2 ... by default). An answer ends at the first of `eos_ids`,
    at `max_new_tokens`, or where the model's positions end. `batch_size` answers are decoded together, all by default.
    between: see `Engine.run`; options: as in `Engine` (tokenizer, swap).
    Raises ValueError for prompts that cannot be answered.
    """
    if not prompts and not decoder.feed.collective:
        return []
    longest = max((len(prompt) for prompt in prompts), default=1) + sampling.max_new_tokens
    count = len(prompts) * sampling.n
    rows = min(batch_size or count, count) or 1
    engine = Engine(decoder, eos_ids=eos_ids, rows=rows, length=longest, **options)
    answers = []
    for i, prompt in enumerate(prompts):
        own = slice(i * sampling.n, (i + 1) * sampling.n)
        answers += engine.submit(prompt, sampling, episodes=(range(count) if episodes is None else episodes)[own])
    wrong = [answer.error for answer in answers if answer.error]
    if wrong:
        raise ValueError(wrong[0])
    if answers:
        engine.reserve()
    engine._waiting.sort(key=lambda run: len(run.prompt.ids))
    engine.run(between)
    return answers
