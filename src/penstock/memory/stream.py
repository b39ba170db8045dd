"""The executor of one model's weights: fetch, compute, drop, in the order of the model's program.

A `Stream` knows the home of every chunk, brings chunks to the device while a part of the program runs, and takes their
gradients away afterwards. It decides nothing: tiers, slots, recomputation and what to fetch next come from the plan.
Several micro-batches run inside one visit, so a weight moves once per pass whatever their number.

[Note: resident is the easy case] All rows of `placement.py` but FSDP2's are run by this one engine. A chunk whose home
is whole on the device is bound to the model once; then a lease costs nothing, micro-batches run one after the other
with an ordinary graph, and the engine is plain PyTorch. Where weights move, or with --recompute, forward keeps the
inputs of blocks and backward runs each block once more. Streaming is bit-equal to resident with recomputation.

[Note: parameters are rebound] A module's own parameters become views of a slot for the time of a lease. That is as
cheap as `functional_call`, works for every module unchanged, and a resident model is a lease that never ends.

[Note: a kept graph] With --keep-activations where weights move, the graph's parameters stay the same objects and their
memory changes, so backward finds a chunk in whatever slot it is in by then. Micro-batches then go one after the other.

[Note: one lease for a rollout] A rollout visits every weight for every token. Where slots hold the whole model, the
first visit of a rollout takes all of it, and until the phase ends its weights are bound once and stay: a visit costs
nothing, ranks go their own ways, and a GPU decodes by CUDA graphs, as of a resident model.

[Note: one gradient slot] A visit claims its gradient slot when it begins and writes to it only when the block has been
recomputed. The gradients that were in the slot have that long to leave, so one slot is enough.
"""

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.profiler import record_function

from penstock.autochunk.recompute import recomputing
from penstock.distributed.world import World
from penstock.memory import plan
from penstock.memory.arena import Arena, Hold, Parameters, Slot
from penstock.memory.chunks import Chunk
from penstock.memory.homes import SUMS, ChunkHome, fetch
from penstock.memory.program import Inputs, Part, Program, Wave, first_trained, visits_of
from penstock.memory.schedule import NEVER, Schedule
from penstock.memory.sink import Sink
from penstock.memory.tiers import DiskHome, Ram, RamHome, worker

Losses = tuple[Tensor, dict[str, Tensor]]
LossOf = Callable[[Tensor, Any], Losses]
"""(last states [B, T, D], micro-batch) -> its part of the loss, and statistics."""
Result = TypeVar("Result")
Visits = Generator[None, None, Result]
"""A pass through a model that stops after every visit, so that passes of several models can be interleaved."""


class Stream:
    """One model's executor. `Strategy.prepare` makes it; `arenas` is called when weights or gradients first move."""

    offload: Ram | None = None
    """Where inputs of blocks that are recomputed wait for backward; None: on the device."""
    _last_wave = False
    """Whether a backward adds the last part of its gradients."""

    def __init__(
        self,
        model: Any,
        homes: Sequence[ChunkHome],
        world: World,
        *,
        sink: Sink | None,
        recompute: bool,
        ahead: int,
        few_tokens: int = 0,
        arenas: Callable[[], tuple[Arena, Arena]],
    ) -> None:
        self.model: Any = model
        """A module that is a `Program`."""
        self.program: Program = model
        self.world, self.sink = world, sink
        self.homes = list(homes)
        self._home_set = set(homes)
        self.recompute, self.ahead = recompute, ahead
        self.device: torch.device = world.device
        """Where weights are while a part runs."""
        self.dtype: torch.dtype | None = None
        """Of weights while a part runs, where they lie in another; None: they do not."""
        self._arenas = arenas
        self._parameters = Parameters(model, self.homes)
        self._groups: dict[str, list[ChunkHome]] = {}
        self._moving: dict[str, list[ChunkHome]] = {}
        """The homes of each group; those whose weights must be fetched."""
        for home in self.homes:
            self._groups.setdefault(home.chunk.group, []).append(home)
            if not home.resident:
                self._moving.setdefault(home.chunk.group, []).append(home)
        self.moves = bool(self._moving)
        """Whether any weight comes and goes."""
        self._holds: dict[ChunkHome, list[Hold]] = {home: [] for home in self.homes}
        self._reader = worker("prefetch")
        self.leasing, self.leased = False, 0
        """A rollout has begun, and its first visit takes all weights if they fit; the number of the lease under which
        they are here. See [Note: one lease for a rollout]."""
        self._cycle, self._choosing = self._schedules(few_tokens)
        """One pass after the other, all of a visit's groups at once; and where chosen ones come when chosen."""
        self._few_tokens = few_tokens
        self._schedule = self._cycle
        for home in self.homes:
            self._parameters.unbind(home.chunk)
            if home.resident:
                assert isinstance(home.weights, RamHome)
                self._parameters.bind(home.chunk, home.weights.tensor)
                if home.in_place:
                    assert home.grads is not None
                    self._parameters.bind_gradients(home.chunk, home.grads.tensor)
        self._leases = 0
        self._landing: dict[str, list[ChunkHome]] = {}
        """Groups that are on their way under that lease, and `_landed` what is bound."""
        self._landed: list[Hold] = []
        model.feed = self

    # --- what models call: weights for a moment, without gradients ----------------------------------------------------

    def start(self, tokens: int) -> bool:
        """Begins a pass without gradients. Whether its parts visit what its tokens chose: see plan.few_tokens."""
        chooses = self._choosing is not None and tokens <= self._few_tokens and not self.leased
        self._schedule = self._choosing if self._choosing is not None and chooses else self._cycle
        return chooses

    @contextlib.contextmanager
    def visit(self, *groups: str) -> Iterator[None]:
        """Inside, the weights of these groups are on the device, bound to the model's own modules."""
        if self.leasing:
            self._lease_all()
        if self.leased:
            self._land(groups)
            yield
            return
        with self.lease(groups, gradients=False):
            yield

    @property
    def moving_homes(self) -> list[ChunkHome]:
        """Those whose weights must be fetched."""
        return [home for homes in self._moving.values() for home in homes]

    @property
    def fixed(self) -> bool:
        """Whether all weights have fixed addresses now."""
        return not self.moves or self.leased > 0

    @property
    def collective(self) -> bool:
        """Whether a visit is a collective, which all ranks must make in the same order. Under one lease none is."""
        return not self.leased and any(not home.whole for home in self.homes)

    def shares(self, other: "Stream") -> bool:
        """Whether the two models have weights in common."""
        return not self._home_set.isdisjoint(other.homes)

    def any_rank_busy(self, busy: bool) -> bool:
        """Whether any rank still uses this model: a rank that is done keeps visiting with the others."""
        return bool(self.max_over_ranks(int(busy)))

    def max_over_ranks(self, count: int) -> int:
        """The largest count of all ranks where visits are collective; else this rank's."""
        if not self.collective:
            return count
        return int(self.world.max(torch.tensor(count, device=self.world.device)))

    # --- passes -------------------------------------------------------------------------------------------------------

    def evaluation(self, micro_batches: Sequence[Any], read: Callable[[Tensor, Any], Any]) -> "Visits[list[Any]]":
        """read(last states, micro-batch) of every micro-batch (each has `.tokens` [B, T]), without gradients."""
        results: list[Any] = []
        for batches in self._waves(micro_batches, backward=False):
            states: list[Tensor] = [batch.tokens for batch in batches]
            contexts = [self.program.begin(batch.tokens, batch) for batch in batches]
            self._schedule = self._cycle
            for part in self.program.parts():
                with self.lease(part.groups, gradients=False):
                    states = [part.run(x, context) for x, context in zip(states, contexts, strict=True)]
                yield
            with self.lease(self.program.reads(), gradients=False):
                results += [read(x, batch) for x, batch in zip(states, batches, strict=True)]
            yield
        return results

    def backward(self, micro_batches: Sequence[Any], loss_of: LossOf) -> "Visits[list[Losses]]":
        """Forward and backward of every micro-batch; the gradients' sum is in the homes afterwards.

        Returns each micro-batch's loss and statistics. With `recompute` a block's inner activations live only while
        it is visited: forward keeps the inputs of blocks, backward runs each block once more. Without, where weights
        move, see [Note: a kept graph].
        """
        losses: list[Losses] = []
        self.program.learn(micro_batches, self.world)
        waves = self._waves(micro_batches, backward=True)
        for i, batches in enumerate(waves):
            self._last_wave = i == len(waves) - 1
            losses += yield from self._pass(batches, loss_of)
        return losses

    def _pass(self, batches: Sequence[Any], loss_of: LossOf) -> "Visits[list[Losses]]":
        parts = self.program.parts()
        contexts = [self.program.begin(batch.tokens, batch, learns=True) for batch in batches]
        first = first_trained(parts, {home.chunk.group for home in self.homes if home.chunk.trained})
        inputs = Inputs(self.offload if self.recompute else None, len(parts) - 1 - first)
        wave = Wave(batches, contexts, [batch.tokens for batch in batches], inputs)
        visits = visits_of(self.program)
        order = [*visits, *(part.groups for part in reversed(parts[first:-1]))]
        self._schedule = Schedule(self._moving, order, repeats=False)
        for i, part in enumerate(parts[:-1]):
            keeps = i >= first
            with self.lease(part.groups, gradients=False, graph=keeps and not self.recompute):
                if keeps:
                    wave.states = [_leaf(x, i > first) for x in wave.states]
                    wave.inputs.keep(wave.states)
                with record_function(f"forward.{i}"), torch.set_grad_enabled(keeps and not self.recompute):
                    outputs = [part.run(x, context) for x, context in zip(wave.states, wave.contexts, strict=True)]
                if keeps:
                    wave.outputs.append([] if self.recompute else outputs)
                wave.states = [y.detach() for y in outputs]
                del outputs
                wave.inputs.leave()
            yield
        if self.recompute:
            self.program.turn(self.world)
        with self.lease(visits[-1], gradients=True) as holds, torch.enable_grad(), record_function("turn"):
            losses = self._turn(wave, parts[-1], holds, loss_of, wants_grads=len(parts) - 1 > first)
        yield
        for i in reversed(range(first, len(parts) - 1)):
            leased = self.lease(parts[i].groups, gradients=True, graph=not self.recompute)
            with leased as holds, record_function(f"backward.{i}"):
                self._backward_part(wave, parts[i], holds)
            yield
        return losses

    def _turn(self, wave: Wave, part: Part, holds: Sequence[Hold], loss_of: LossOf, wants_grads: bool) -> list[Losses]:
        """The last part, forward and backward."""
        losses = []
        for context, batch in zip(wave.contexts, wave.micro_batches, strict=True):
            x = _leaf(wave.states.pop(0), wants_grads)  # each micro-batch's tensors are freed before the next one's
            loss, stats = loss_of(part.run(x, context), batch)
            self._open(holds)
            loss.backward()
            # Undetached, a statistic would hold the whole graph, and with it the states it began from.
            losses.append((loss.detach(), {key: value.detach() for key, value in stats.items()}))
            wave.state_grads.append(x.grad)
            del x, loss, stats
        return losses

    def _backward_part(self, wave: Wave, part: Part, holds: Sequence[Hold]) -> None:
        inputs, outputs = wave.inputs.take(), wave.outputs.pop()
        for j, context in enumerate(wave.contexts):
            x = inputs.pop(0)
            with torch.enable_grad(), recomputing():
                y = part.run(x, context) if self.recompute else outputs.pop(0)
            if y.requires_grad and wave.state_grads[j] is not None:
                self._open(holds)
                y.backward(wave.state_grads[j])
            wave.state_grads[j] = x.grad
            del x, y

    def _waves(self, micro_batches: Sequence[Any], backward: bool) -> list[Sequence[Any]]:
        """Micro-batches that share one visit: all where weights move, unless activations inside blocks are kept."""
        if self.recompute or (self.moves and not backward):
            return [micro_batches]
        waves: list[Sequence[Any]] = [[batch] for batch in micro_batches]
        if backward and (self.collective or any(not home.grads_whole for home in self.homes if home.chunk.trained)):
            # Every wave ends in collectives, so a rank with fewer micro-batches visits without any.
            count = int(self.world.max(torch.tensor(len(waves), device=self.world.device)))
            waves += [[] for _ in range(count - len(waves))]
        return waves

    # --- training -----------------------------------------------------------------------------------------------------

    def update(self, lr: float, scale: float) -> None:
        """One AdamW update of every trained chunk, with gradients times `scale`; slots forget the old weights."""
        assert self.sink is not None
        self._forget()  # first: a copy that fills a slot reads what an update writes
        self.sink.update(lr, scale)

    def restore(self, steps: int, read: Callable[[str, str], Tensor]) -> None:
        """Weights and optimizer states of an earlier run after `steps` updates; see `Sink.load_states`."""
        assert self.sink is not None
        self.sink.wait()
        self._forget()
        self.sink.steps = steps
        self.sink.load_states(read)

    def _forget(self) -> None:
        if self._moving:
            self._arenas()[0].forget(lambda home: home in self._home_set and home.chunk.trained)

    # --- one lease of all weights: see [Note: one lease for a rollout] ------------------------------------------------

    def _lease_all(self) -> None:
        self.leasing = False
        if self.max_over_ranks(int(not self._all_fits())):
            return
        self._take_all()
        self._leases += 1
        self.leased = self._leases

    def _all_fits(self) -> bool:
        """Whether there is room for all weights on this rank."""
        slots = (slot.nbytes for slot in self._arenas()[0].slots if not slot.users)
        return plan.fit_at_once((home.chunk for home in self.moving_homes), slots)

    def _take_all(self) -> None:
        """Sends for all weights. Visits wait for them, or, where gathers are collectives, ranks do together."""
        self._schedule = self._cycle
        for home, slot in self._arenas()[0].pin(self.moving_homes, self._schedule.next_use):
            slot.landing = self._start(home, slot)
        self._landing = dict(self._groups)
        if self.collective:
            self._land([*self._groups])

    def _land(self, groups: Sequence[str]) -> None:
        """Binds what has not been visited under this lease."""
        if self._landing:
            homes = [home for group in groups for home in self._landing.pop(group, ())]
            self._landed += [self._hold(home, gradients=False, graph=False) for home in homes]

    def end_lease(self) -> None:
        """A rollout has ended: weights come and go again."""
        self.leasing = False
        if self.leased:
            self.leased = 0
            self._give_all()

    def _give_all(self) -> None:
        for hold in self._landed:
            self._release(hold)
        self._landed, self._landing = [], {}
        self._arenas()[0].unpin(self.moving_homes)

    # --- leases -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lease(self, groups: Sequence[str], gradients: bool, graph: bool = False) -> Iterator[list[Hold]]:
        """Inside, the weights of these groups are on the device and, with `gradients`, theirs have memory too, which
        must be opened before autograd adds to it. `graph`: they are the parameters of a graph that is kept."""
        self._schedule.advance(tuple(groups))
        needed = [home for group in groups for home in self._groups.get(group, ())]
        # The largest first: a small chunk may have been fetched into the only slot that holds a large one.
        holds = [self._hold(home, gradients, graph) for home in sorted(needed, key=lambda home: -home.chunk.nbytes)]
        if self.moves:
            for home, slot in self._schedule.prefetch(self._arenas()[0], self.ahead):
                slot.landing = self._start(home, slot)
        try:
            yield holds
        finally:
            for hold in reversed(holds):
                self._release(hold)

    def _hold(self, home: ChunkHome, gradients: bool, graph: bool) -> Hold:
        gradients = gradients and home.chunk.trained
        outer = self._holds[home]
        if outer:  # inside another lease of the same chunk
            hold = Hold(home, None, None, gradients=False)
            outer.append(hold)
            return hold
        slot = None
        if home.resident:
            home.update.wait()
        else:
            slot = self._fetch(home)
            slot.wait()
            slot.users += 1
        if gradients and self.sink is not None:
            self.sink.zero(home)
        gradient_slot = None
        grads = None
        if gradients and not home.in_place:
            gradient_slot = self._gradient_slot(home)
            grads = _sums(gradient_slot, home.chunk)
        if slot is not None:
            if grads is None and gradients:
                assert home.grads is not None
                grads = home.grads.tensor
            if graph:
                self._parameters.bind_graph(home, slot)
            else:
                self._parameters.bind_slot(home, slot)
        if grads is not None:
            self._parameters.bind_gradients(home.chunk, grads)
        hold = Hold(home, slot, gradient_slot, gradients)
        outer.append(hold)
        return hold

    def _release(self, hold: Hold) -> None:
        home = hold.home
        self._holds[home].remove(hold)
        if hold.gradient_slot is not None:
            assert self.sink is not None
            self._open([hold])
            last = self._last_wave and self._schedule.next_use(home) == NEVER
            hold.gradient_slot.leaving = self.sink.settle(home, _sums(hold.gradient_slot, home.chunk), last)
            hold.gradient_slot.users -= 1
            self._arenas()[1].clear(hold.gradient_slot)
        elif hold.gradients:
            home.graded = True
        if hold.gradients and not (hold.slot is None and home.in_place):
            for weight in home.chunk.weights:
                self._parameters.now(weight).grad = None
        if hold.slot is not None:
            hold.slot.users -= 1
            self._parameters.unbind(home.chunk)

    def _gradient_slot(self, home: ChunkHome) -> Slot:
        arena = self._arenas()[1]
        nbytes = home.chunk.numel * SUMS.itemsize
        slot = arena.claim(home, nbytes, lambda key: 0)
        if slot is None:
            raise arena.too_small(nbytes)
        slot.users += 1
        return slot

    def _open(self, holds: Sequence[Hold]) -> None:
        """Before a visit's backward: gradient slots get zeros or the sum so far. See [Note: one gradient slot]."""
        for hold in holds:
            slot = hold.gradient_slot
            if slot is not None and not hold.opened:
                assert self.sink is not None
                if slot.leaving is not None:
                    slot.leaving.wait()
                    slot.leaving = None
                self.sink.open(hold.home, _sums(slot, hold.home.chunk))
                hold.opened = True

    # --- fetching -----------------------------------------------------------------------------------------------------

    def _schedules(self, few_tokens: int) -> tuple[Schedule[ChunkHome], Schedule[ChunkHome] | None]:
        parts, reads = self.program.parts(), self.program.reads()
        cycle = Schedule(self._moving, [*(part.groups for part in parts), reads], repeats=True)
        if not few_tokens or self.collective or not any(part.choices for part in parts):
            return cycle, None
        needed, choices = ([*(getattr(part, name) for part in parts)] for name in ("needed", "choices"))
        return cycle, Schedule(self._moving, [*needed, reads], repeats=True, choices=[*choices, ()])

    def _fetch(self, home: ChunkHome) -> Slot:
        """The chunk's slot, filled or being filled."""
        arena = self._arenas()[0]
        slot = arena.find(home)
        if slot is None:
            slot = arena.claim(home, home.chunk.nbytes, self._schedule.next_use)
            if slot is None:
                raise arena.too_small(home.chunk.nbytes)
            slot.landing = self._start(home, slot)
        return slot

    def _start(self, home: ChunkHome, slot: Slot) -> Callable[[], None]:
        """Begins to fill a slot; calling the result waits until it is full."""
        whole = slot.memory[: home.chunk.nbytes].view(home.dtype)
        part = whole
        if not home.whole:
            size = home.chunk.numel // self.world.size
            part = whole[self.world.rank * size : (self.world.rank + 1) * size]
        label = "disk.wait" if isinstance(home.weights, DiskHome) else "link.wait"
        arrived = fetch(home, part, self._reader)

        def arrive() -> None:
            with record_function(label):
                arrived()

        return arrive if part is whole else self.world.join_ahead(arrive, part, whole)


def _sums(slot: Slot, chunk: Chunk) -> Tensor:
    """[numel] fp32: the slot as the chunk's gradients."""
    return slot.memory[: chunk.numel * SUMS.itemsize].view(SUMS)


def _leaf(x: Tensor, wants_gradient: bool) -> Tensor:
    """The same values without their graph; with a gradient of its own if wanted."""
    x = x.detach()
    return x.requires_grad_() if wants_gradient and x.is_floating_point() else x
