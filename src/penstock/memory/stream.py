"""One model's weights in motion: fetch, compute, drop, in the order of its program.

A `Stream` knows where every chunk is at home, brings chunks to the device while a part of the program runs, and takes
their gradients away afterwards. It decides nothing: which tiers, how many slots and whether to recompute come from the
plan. Several micro-batches run inside one visit, so a weight moves once per pass whatever their number.
"""

import contextlib
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from penstock.autochunk.recompute import recomputing
from penstock.distributed.world import World
from penstock.memory.arena import Arena, Slot
from penstock.memory.chunks import Chunk
from penstock.memory.homes import ChunkHome
from penstock.memory.program import Part, Program, owners
from penstock.memory.sink import Sink
from penstock.memory.tiers import DiskHome, RamHome, worker
from penstock.memory.transfer import copy_ahead

NEVER = 1 << 60
Losses = tuple[Tensor, dict[str, Tensor]]
LossOf = Callable[[Tensor, Any], Losses]
"""(last states [B, T, D], micro-batch) -> its part of the loss, and statistics."""
Result = TypeVar("Result")
Visits = Generator[None, None, Result]
"""A pass through a model that stops behind every visit, so that another model's can go beside it."""


@dataclass
class Hold:
    """A chunk in use: what `lease` took and `release` gives back."""

    stored: ChunkHome
    slot: Slot | None
    gradient_slot: Slot | None
    gradients: bool
    opened: bool = False
    """The gradient slot is ready to be added to."""


class Stream:
    """See the module. Made by `Strategy.prepare`; `arena` and `gradient_arena` are called when first needed."""

    def __init__(
        self,
        model: Any,
        stored: Sequence[ChunkHome],
        world: World,
        *,
        sink: Sink | None,
        recompute: bool,
        ahead: int,
        arenas: Callable[[], tuple[Arena, Arena]],
    ) -> None:
        self.model: Any = model
        """A module that is a `Program`."""
        self.program: Program = model
        self.world, self.sink = world, sink
        self.stored = list(stored)
        self._mine = set(stored)
        self.recompute, self.ahead = recompute, ahead
        self.device: torch.device = world.device
        """Where weights are when a part runs."""
        self._arenas = arenas
        self._owners = owners(model)
        self._empty = {
            name: nn.Parameter(torch.empty_like(getattr(*owner), device="meta"), getattr(*owner).requires_grad)
            for name, owner in self._owners.items()
        }
        """Shapes and dtypes: what stands in for weights that are not here."""
        self._groups: dict[str, list[ChunkHome]] = {}
        for one in self.stored:
            self._groups.setdefault(one.chunk.group, []).append(one)
        self._graph: dict[ChunkHome, list[nn.Parameter]] = {}
        """The parameters of chunks that move, as a graph that is kept knows them: wherever the weights are now."""
        self._holds: dict[ChunkHome, list[Hold]] = {}
        self._reader = worker("prefetch")
        self._order: list[tuple[str, ...]] = []
        self._positions: dict[str, list[int]] = {}
        self._at = 0
        self._repeats = True
        self._follow(self._cycle(), repeats=True)
        for one in self.stored:
            self._unbind(one.chunk)
            if one.resident:
                assert isinstance(one.weights, RamHome)
                grads = one.grads.tensor if isinstance(one.grads, RamHome) and one.in_place else None
                self._bind(one.chunk, one.weights.tensor, trained=one.chunk.trained)
                if grads is not None:
                    self._bind_gradients(one.chunk, grads)
        model.feed = self

    # --- what models call: weights for a moment, without gradients ----------------------------------------------------

    @contextlib.contextmanager
    def visit(self, *groups: str) -> Iterator[None]:
        """Inside, the weights of these groups are on the device, bound to the model's own modules."""
        with self.lease(groups, gradients=False):
            yield

    @property
    def collective(self) -> bool:
        """Whether a visit brings ranks together: all must make it, in the same order."""
        return any(not one.whole for one in self.stored)

    def shares(self, other: "Stream") -> bool:
        """Whether the two are made of some of the same weights."""
        return not self._mine.isdisjoint(other.stored)

    @property
    def moves(self) -> bool:
        """Whether any weight comes and goes: if none does, all have fixed addresses."""
        return not all(one.resident for one in self.stored)

    def together(self, busy: bool) -> bool:
        """Whether any rank is still busy with this model: a rank that is done keeps visiting with the others."""
        return bool(self.most(int(busy)))

    def most(self, count: int) -> int:
        """The largest count of all ranks, where they must visit as often as each other; else its own."""
        if not self.collective:
            return count
        return int(self.world.max(torch.tensor(count, device=self.world.device)))

    # --- passes -------------------------------------------------------------------------------------------------------

    def evaluation(self, micro_batches: Sequence[Any], read: Callable[[Tensor, Any], Any]) -> "Visits[list[Any]]":
        """read(last states, micro-batch) of every micro-batch (each has `.tokens` [B, T]), without gradients."""
        results: list[Any] = []
        for wave in self._waves(micro_batches, agree=False):
            xs: list[Tensor] = [one.tokens for one in wave]
            contexts = [self.program.begin(one.tokens) for one in wave]
            self._follow(self._cycle(), repeats=True)
            for part in self.program.parts():
                with self.lease(part.groups, gradients=False):
                    xs = [part.run(x, context) for x, context in zip(xs, contexts, strict=True)]
                yield
            with self.lease(self.program.reads(), gradients=False):
                results += [read(x, one) for x, one in zip(xs, wave, strict=True)]
            yield
        return results

    def backward(self, micro_batches: Sequence[Any], loss_of: LossOf) -> "Visits[list[Losses]]":
        """Forward and backward of every micro-batch; the gradients' sum is in the homes afterwards.

        Returns each micro-batch's loss and statistics. With `recompute` a block's inner activations live only while
        it is visited: forward keeps the inputs of blocks, backward runs each block once more. Without, where weights
        move, the graph's parameters stay the same and their memory changes: backward looks where they are by then.
        """
        results: list[Losses] = []
        for wave in self._waves(micro_batches, agree=True):
            results += yield from self._pass(wave, loss_of)
        return results

    def _pass(self, wave: Sequence[Any], loss_of: LossOf) -> "Visits[list[Losses]]":
        parts = self.program.parts()
        first = self._first_trained(parts)
        order = visits_of(self.program)
        self._follow([*order, *(part.groups for part in reversed(parts[first:-1]))], repeats=False)
        contexts = [self.program.begin(one.tokens) for one in wave]
        xs: list[Tensor] = [one.tokens for one in wave]
        inputs: list[list[Tensor]] = []
        outputs: list[list[Tensor]] = []
        for i, part in enumerate(parts[:-1]):
            keep = i >= first
            with self.lease(part.groups, gradients=False, graph=keep and not self.recompute):
                if keep:
                    xs = [_leaf(x, i > first) for x in xs]
                    inputs.append(xs)
                with record_function(f"forward.{i}"), torch.set_grad_enabled(keep and not self.recompute):
                    ys = [part.run(x, context) for x, context in zip(xs, contexts, strict=True)]
                if keep:
                    outputs.append([] if self.recompute else ys)
                xs = [y.detach() for y in ys]
                del ys
            yield
        results, slopes = [], []
        with self.lease(order[-1], gradients=True) as holds, torch.enable_grad(), record_function("turn"):
            for context, one in zip(contexts, wave, strict=True):
                x = _leaf(xs.pop(0), len(parts) - 1 > first)  # what one micro-batch held is let go of before the next
                loss, stats = loss_of(parts[-1].run(x, context), one)
                self._open(holds)
                loss.backward()
                # Undetached, a statistic would hold the whole graph, and with it the states it began from.
                results.append((loss.detach(), {key: value.detach() for key, value in stats.items()}))
                slopes.append(x.grad)
                del x, loss, stats
        yield
        for i in reversed(range(first, len(parts) - 1)):
            here, ys = inputs.pop(), outputs.pop()
            leased = self.lease(parts[i].groups, gradients=True, graph=not self.recompute)
            with leased as holds, record_function(f"backward.{i}"):
                for j, context in enumerate(contexts):
                    x = here.pop(0)
                    with torch.enable_grad(), recomputing():
                        y = parts[i].run(x, context) if self.recompute else ys.pop(0)
                    if y.requires_grad and slopes[j] is not None:  # None: the loss read nothing of it
                        self._open(holds)
                        y.backward(slopes[j])
                    slopes[j] = x.grad
                    del x, y
            yield
        return results

    def _first_trained(self, parts: Sequence[Part]) -> int:
        """The first part that has something to learn; nothing before it needs a gradient."""
        for i, part in enumerate(parts):
            if any(one.chunk.trained for group in part.groups for one in self._groups.get(group, ())):
                return i
        return len(parts) - 1

    def _waves(self, micro_batches: Sequence[Any], agree: bool) -> list[Sequence[Any]]:
        """Micro-batches that share one visit: all of them when weights move, unless what is inside blocks is kept."""
        if self.recompute or (self.moves and not agree):
            return [micro_batches]
        waves: list[Sequence[Any]] = [[one] for one in micro_batches]
        if agree and (self.collective or any(not one.grads_whole for one in self.stored if one.chunk.trained)):
            # Every wave ends in collectives, so a rank with fewer micro-batches visits with empty hands.
            most = int(self.world.max(torch.tensor(len(waves), device=self.world.device)))
            waves += [[] for _ in range(most - len(waves))]
        return waves

    # --- training -----------------------------------------------------------------------------------------------------

    def update(self, lr: float, scale: float) -> None:
        """One AdamW update of every trained chunk, with gradients times `scale`; slots forget what they held."""
        assert self.sink is not None
        self.sink.update(lr, scale)
        self._forget()

    def restore(self, steps: int, read: Callable[[str, str], Tensor]) -> None:
        """Weights and optimizer states of an earlier run after `steps` updates; see `Sink.load_states`."""
        assert self.sink is not None
        self.sink.steps = steps
        self.sink.load_states(read)
        self._forget()

    def _forget(self) -> None:
        if self.moves:
            self._arenas()[0].forget(lambda key: key in self._mine and key.chunk.trained)

    # --- leases -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lease(self, groups: Sequence[str], gradients: bool, graph: bool = False) -> Iterator[list[Hold]]:
        """Inside, the weights of these groups are on the device and, with `gradients`, have a place for theirs, which
        is theirs to add to once it has been opened. `graph`: they are the parameters of a graph that is kept."""
        self._advance(tuple(groups))
        needed = [one for group in groups for one in self._groups.get(group, ())]
        # The largest first: a small chunk may have been fetched into the only slot that holds a large one.
        holds = [self._hold(one, gradients, graph) for one in sorted(needed, key=lambda one: -one.chunk.nbytes)]
        self._prefetch()
        try:
            yield holds
        finally:
            for hold in reversed(holds):
                self._release(hold)

    def _hold(self, one: ChunkHome, gradients: bool, graph: bool) -> Hold:
        gradients = gradients and one.chunk.trained
        outer = self._holds.setdefault(one, [])
        if outer:  # inside another lease of the same chunk
            hold = Hold(one, None, None, gradients=False)
            outer.append(hold)
            return hold
        slot = None
        if not one.resident:
            slot = self._fetch(one)
            slot.users += 1
            slot.wait()
        gradient_slot = None
        grads = None
        if gradients and not one.in_place:
            gradient_slot = self._gradient_slot(one)
            grads = gradient_slot.memory[: one.chunk.nbytes].view(one.dtype)
        if slot is not None:
            if grads is None and gradients:
                assert isinstance(one.grads, RamHome)
                grads = one.grads.tensor
            if graph:
                self._bind_graph(one, slot)
            else:
                self._bind_slot(one, slot, trained=gradients)
            if grads is not None:
                self._bind_gradients(one.chunk, grads)
        elif grads is not None:  # resident weights: the graph knows these very parameters
            self._bind_gradients(one.chunk, grads)
        hold = Hold(one, slot, gradient_slot, gradients)
        outer.append(hold)
        return hold

    def _release(self, hold: Hold) -> None:
        one = hold.stored
        self._holds[one].remove(hold)
        if hold.gradient_slot is not None:
            assert self.sink is not None
            self._open([hold])
            grads = hold.gradient_slot.memory[: one.chunk.nbytes].view(one.dtype)
            hold.gradient_slot.leaving = self.sink.settle(one, grads)
            hold.gradient_slot.users -= 1
            hold.gradient_slot.key = None
        elif hold.gradients:
            one.graded = True
        if hold.gradients and not (hold.slot is None and one.in_place):
            for weight in one.chunk.weights:
                getattr(*self._owners[weight.name]).grad = None
        if hold.slot is not None:
            hold.slot.users -= 1
            self._unbind(one.chunk)

    def _bind(self, chunk: Chunk, weights: Tensor, *, trained: bool) -> list[nn.Parameter]:
        """The model's own parameters become views of `weights`."""
        bound = []
        for weight, offset in zip(chunk.weights, chunk.offsets, strict=True):
            view = weights[offset : offset + weight.numel].view(weight.shape)
            bound.append(nn.Parameter(view, requires_grad=trained))
            setattr(*self._owners[weight.name], bound[-1])
        return bound

    def _bind_slot(self, one: ChunkHome, slot: Slot, *, trained: bool) -> None:
        """The same for a chunk in a slot. While it stays there it is cut once: decoding visits it for every token."""
        purpose = (id(self), one, trained)
        if slot.views[0] != purpose:
            weights = slot.memory[: one.chunk.nbytes].view(one.dtype)
            slot.views = (purpose, self._bind(one.chunk, weights, trained=trained))
            return
        for weight, parameter in zip(one.chunk.weights, slot.views[1], strict=True):
            setattr(*self._owners[weight.name], parameter)

    def _bind_graph(self, one: ChunkHome, slot: Slot) -> None:
        """The same parameters whenever the chunk comes, on the memory that it is in now."""
        weights = slot.memory[: one.chunk.nbytes].view(one.dtype)
        views = [
            weights[offset : offset + weight.numel].view(weight.shape).data  # of no version: slots are written again
            for weight, offset in zip(one.chunk.weights, one.chunk.offsets, strict=True)
        ]
        if one not in self._graph:
            self._graph[one] = [nn.Parameter(view, one.chunk.trained) for view in views]
        for weight, parameter, view in zip(one.chunk.weights, self._graph[one], views, strict=True):
            parameter.data = view
            setattr(*self._owners[weight.name], parameter)

    def _bind_gradients(self, chunk: Chunk, grads: Tensor) -> None:
        """The bound parameters' gradients become views of `grads`: autograd adds in place, so the views survive."""
        for weight, offset in zip(chunk.weights, chunk.offsets, strict=True):
            view = grads[offset : offset + weight.numel].view(weight.shape)
            getattr(*self._owners[weight.name]).grad = view

    def _unbind(self, chunk: Chunk) -> None:
        for weight in chunk.weights:
            setattr(*self._owners[weight.name], self._empty[weight.name])

    def _gradient_slot(self, one: ChunkHome) -> Slot:
        arena = self._arenas()[1]
        slot = arena.claim(one, one.chunk.nbytes, lambda key: 0)
        if slot is None:
            raise arena.too_small(one.chunk.nbytes)
        slot.users += 1
        return slot

    def _open(self, holds: Sequence[Hold]) -> None:
        """Before the first backward of a visit, which is late: what the slot held last may still be on its way home
        while a block is recomputed."""
        for hold in holds:
            slot = hold.gradient_slot
            if slot is not None and not hold.opened:
                assert self.sink is not None
                if slot.leaving is not None:
                    slot.leaving.wait()
                    slot.leaving = None
                self.sink.open(hold.stored, slot.memory[: hold.stored.chunk.nbytes].view(hold.stored.dtype))
                hold.opened = True

    # --- fetching -----------------------------------------------------------------------------------------------------

    def _fetch(self, one: ChunkHome) -> Slot:
        """The chunk's slot, filled or being filled."""
        arena = self._arenas()[0]
        slot = arena.find(one)
        if slot is None:
            slot = arena.claim(one, one.chunk.nbytes, self._next_use)
            if slot is None:
                raise arena.too_small(one.chunk.nbytes)
            slot.landing = self._start(one, slot)
        return slot

    def _start(self, one: ChunkHome, slot: Slot) -> Callable[[], None]:
        """Begins to fill a slot; calling the result waits until it is full."""
        out = slot.memory[: one.chunk.nbytes].view(one.dtype)
        mine = out
        if not one.whole:
            size = one.chunk.numel // self.world.size
            mine = out[self.world.rank * size : (self.world.rank + 1) * size]
        arrived: Callable[[], None]
        if isinstance(one.weights, DiskHome):
            arrived = self._reader.submit(one.weights.read, mine).result
        else:
            arrived = copy_ahead(one.weights.tensor, mine, one.weights.tier)

        kind = "disk.wait" if isinstance(one.weights, DiskHome) else "link.wait"

        def land() -> None:
            with record_function(kind):
                arrived()
            if mine is not out:
                self.world.join_shards(mine, out)

        return land

    def _prefetch(self) -> None:
        """Sends for the chunks of the next visits, where a slot holds nothing that is needed sooner."""
        for step in range(1, self.ahead + 1):
            at = self._at + step
            if at >= len(self._order) and not self._repeats:
                return
            for group in self._order[at % len(self._order)]:
                for one in self._groups.get(group, ()):
                    if one.resident or self._arenas()[0].find(one) is not None:
                        continue
                    slot = self._arenas()[0].claim(one, one.chunk.nbytes, self._next_use, before=step)
                    if slot is not None:
                        slot.landing = self._start(one, slot)

    def _cycle(self) -> list[tuple[str, ...]]:
        return [*(part.groups for part in self.program.parts()), self.program.reads()]

    def _follow(self, order: list[tuple[str, ...]], *, repeats: bool) -> None:
        """What will be visited, in this order: eviction and prefetch read it."""
        self._order, self._repeats, self._at = order, repeats, -1
        self._positions = {}
        for i, groups in enumerate(order):
            for group in groups:
                self._positions.setdefault(group, []).append(i)

    def _advance(self, groups: tuple[str, ...]) -> None:
        for step in range(1, len(self._order) + 1):
            at = (self._at + step) % len(self._order)
            if self._order[at] == groups:
                self._at = at
                return

    def _next_use(self, one: ChunkHome) -> int:
        """Visits from now until this chunk is needed again."""
        if one not in self._mine:
            return NEVER
        positions = self._positions.get(one.chunk.group, ())
        later = bisect_right(positions, self._at)
        if later < len(positions):
            return positions[later] - self._at
        return len(self._order) - self._at + positions[0] if self._repeats and positions else NEVER


def interleave(passes: Sequence[Visits[Result]]) -> list[Result]:
    """Several models' passes, one visit of each in turn: frozen weights that they share are brought once for all."""
    results: dict[int, Result] = {}
    while len(results) < len(passes):
        for i, one in enumerate(passes):
            if i not in results:
                try:
                    next(one)
                except StopIteration as end:
                    results[i] = end.value
    return [results[i] for i in range(len(passes))]


def visits_of(program: Program) -> list[tuple[str, ...]]:
    """Groups that are needed at once, in order: the parts', the last of them with what reads its states."""
    parts = program.parts()
    return [*(part.groups for part in parts[:-1]), (*parts[-1].groups, *program.reads())]


def _leaf(x: Tensor, wants_gradient: bool) -> Tensor:
    """The same values cut from what made them; with a gradient of its own if wanted."""
    x = x.detach()
    return x.requires_grad_() if wants_gradient and x.is_floating_point() else x
