"""Which ops are computed in slices, along what, in how many: chosen from byte counts alone. No tensor in here.

A region is a set of ops whose results are all cut along one dimension. It grows from one op upward to whatever must be
whole: attention's keys, say, which are then computed before it, perhaps in a region of their own. The curve says how
many bytes are alive at each step, forward and backward; regions are added where it passes the budget, and cut no finer
than the budget asks.
"""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field, replace

from penstock.memory.flow import Blocked, Cut, Node, needs, refs, through_view

LEAVES = ("input", "weight")
VISITS = 2e-5
"""Seconds that one more op costs, forward and backward, whatever its size."""
BANDWIDTH = 1e10
"""Bytes per second at which a slice reads again what is whole: weights, keys and values."""


@dataclass(frozen=True)
class Bytes:
    """What one op holds, when computed whole."""

    own: int = 0
    """New memory of its result."""
    alias: tuple[int, ...] = ()
    """Ops whose memory the result lies in."""
    scratch: int = 0
    """More while it runs."""
    saves: tuple[int, ...] = ()
    """Ops, itself perhaps, whose results autograd keeps for it."""
    kept: int = 0
    """What else autograd keeps."""
    grad: int = 0
    """Of its result's gradient; 0: it has none."""
    back: int = 0
    """More while its backward runs."""


@dataclass(frozen=True)
class Graph:
    """Ops in the order they run, what each holds, and which results leave."""

    nodes: tuple[Node, ...]
    holds: tuple[Bytes, ...]
    outputs: tuple[int, ...]
    cheap: frozenset[int] = frozenset()
    """Ops that may be computed twice rather than kept: no products of matrices."""
    sizes: tuple[int, ...] = ()
    """Bytes of each result, be it new memory or not."""
    before: tuple[int, ...] = field(init=False, compare=False)
    """Of each op, the set of ops that it depends on, as bits."""
    known: dict[tuple[int, Cut], list[tuple[int, Cut | None]] | str] = field(default_factory=dict, compare=False)
    """What `reads` has found."""

    def __post_init__(self) -> None:
        before: list[int] = []
        for node in self.nodes:
            mask = 0
            for i in node.reads:
                mask |= before[i] | 1 << i
            before.append(mask)
        object.__setattr__(self, "before", tuple(before))

    def reads(self, index: int, cut: Cut) -> list[tuple[int, Cut | None]]:
        """(op, cut) for each tensor in the op's arguments, in order, that a slice reads. Raises Blocked."""
        if (index, cut) not in self.known:
            node = self.nodes[index]
            try:
                wanted = needs(node, cut)
            except Blocked as error:
                self.known[index, cut] = str(error)
            else:
                pairs = zip(node.names, node.args, strict=True)
                self.known[index, cut] = [(ref.index, wanted.get(name)) for name, value in pairs for ref in refs(value)]
        found = self.known[index, cut]
        if isinstance(found, str):
            raise Blocked(found)
        return found


@dataclass(frozen=True)
class Region:
    """Ops that are computed slice by slice."""

    cuts: dict[int, Cut]
    """Op -> the cut of its result."""
    copies: frozenset[int]
    """Those of them that are computed outside too, or elsewhere: cheaper than to keep."""
    inputs: tuple[tuple[int, Cut | None], ...]
    """(op, cut) of what is read from outside; None: the whole of it."""
    extent: int
    length: int
    """Of a slice; the last may be shorter."""
    outputs: tuple[int, ...] = ()
    """Ops whose results are read outside; known once the whole plan is."""

    @property
    def slices(self) -> int:
        """How many."""
        return -(-self.extent // self.length)

    @property
    def ops(self) -> list[int]:
        """In the order they run."""
        return sorted(self.cuts)


Step = int | Region


@dataclass(frozen=True)
class Plan:
    """What runs, in order: single ops, and regions."""

    steps: tuple[Step, ...]
    curve: tuple[tuple[str, int], ...]
    """(what runs, bytes alive at its fullest instant), forward and then backward."""

    @property
    def peak(self) -> int:
        """Bytes."""
        return max((nbytes for _, nbytes in self.curve), default=0)

    @property
    def regions(self) -> list[Region]:
        """In order."""
        return [step for step in self.steps if isinstance(step, Region)]


def choose(graph: Graph, budget: int | None, training: bool, turning: bool = False) -> Plan:
    """The cheapest plan found whose peak is within the budget, or else the one with the lowest peak.

    `turning`: gradients are asked for alone, so a region whose results only leave computes nothing forward.
    """
    best = plan_of(graph, [], training, turning)
    assert best is not None
    if budget is None or best.peak <= budget:
        return best
    pool, lowest = list(candidates(graph)), best
    while True:
        regions = best.regions
        options = []
        for one in pool:
            kept = [region for region in regions if not _overlap(region, one)]
            found = plan_of(graph, [*kept, one], training, turning)
            if found is None:
                continue
            lowest = min(lowest, found, key=lambda one: one.peak)
            if _excess(found, budget) < _excess(best, budget):
                options.append(found)
        enough = [one for one in options if one.peak <= budget]
        if enough:
            coarse = [coarsened(graph, one, budget, training, turning) for one in sorted(enough, key=_rank)[:MOST]]
            return min(coarse, key=lambda one: cost(graph, one, training))
        if not options:
            return lowest
        best = min(options, key=lambda one: (_excess(one, budget), _rank(one)))


MOST = 12
"""Sets of regions whose cost is compared."""


def _rank(plan: Plan) -> tuple[int, int]:
    return len(plan.regions), sum(len(region.cuts) for region in plan.regions)


def _excess(plan: Plan, budget: int) -> int:
    return sum(max(nbytes - budget, 0) for _, nbytes in plan.curve)


def _overlap(one: Region, other: Region) -> bool:
    return any(i in other.cuts and i not in other.copies for i in one.cuts if i not in one.copies)


def coarsened(graph: Graph, plan: Plan, budget: int, training: bool, turning: bool = False) -> Plan:
    """The same regions in as few slices as the budget allows, of equal length."""
    regions = [replace(region, outputs=()) for region in plan.regions]
    for at, region in enumerate(regions):
        low, high = 1, region.slices  # slices: too few below `low`, enough at `high`
        while low < high:
            middle = (low + high) // 2
            others = [*regions[:at], _cut_in(region, middle), *regions[at + 1 :]]
            tried = plan_of(graph, others, training, turning)
            low, high = (low, middle) if tried is not None and tried.peak <= budget else (middle + 1, high)
        regions[at] = _cut_in(region, high)
    found = plan_of(graph, regions, training, turning)
    assert found is not None
    return found


def _cut_in(region: Region, slices: int) -> Region:
    return replace(region, length=-(-region.extent // slices))


def cost(graph: Graph, plan: Plan, training: bool) -> float:
    """Seconds that slicing adds, roughly: more ops, and reading again what every slice needs whole."""
    seconds = 0.0
    for region in plan.regions:
        whole = sum(graph.sizes[i] for i, cut in region.inputs if cut is None or cut.prefix)
        again = sum(graph.sizes[i] for i in region.copies)
        visits = VISITS * len(region.cuts) * region.slices
        seconds += ((region.slices - 1) * whole + 2 * again) / BANDWIDTH + visits
    return seconds * (3 if training else 1)


# --- growing ----------------------------------------------------------------------------------------------------------


def candidates(graph: Graph) -> Iterator[Region]:
    """Every region that grows from an op and a dimension of its result, each set of ops once."""
    seen = set()
    for end in reversed(range(len(graph.nodes))):
        node = graph.nodes[end]
        if node.op in LEAVES or node.several or not graph.holds[end].own:
            continue  # where a view is, what it is a view of will do
        for dim, extent in enumerate(node.shape):
            if extent == 1:
                continue
            for again in (False, True):
                grown = grow(graph, end, Cut(dim, extent), again)
                for region in (grown, grown and joined(graph, grown)):
                    if region is None or len(region.cuts) < 2:
                        continue
                    key = (frozenset(region.cuts.items()), region.copies)
                    if key not in seen:
                        seen.add(key)
                        yield region


class _Growth:
    """A region on its way."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.inside: dict[int, Cut] = {}
        self.copies: set[int] = set()
        self.inputs: dict[tuple[int, Cut | None], None] = {}
        self.barred = 0
        """Ops that run before the region, as bits."""

    def enter(self, index: int, cut: Cut | None) -> None:
        """The result is read from outside."""
        self.inputs[index, cut] = None
        self.barred |= self.graph.before[index] | 1 << index

    def region(self, extent: int) -> Region:
        return Region(dict(self.inside), frozenset(self.copies), tuple(self.inputs), extent, 1)


def grow(graph: Graph, end: int, cut: Cut, again: bool) -> Region | None:
    """The largest region that ends in this cut of an op's result. `again`: cheap ops that must be whole for others
    are computed a second time in slices, so that what they made need not be kept."""
    growth = _Growth(graph)
    wanted: dict[int, set[Cut]] = {end: {cut}}
    for index in reversed(range(end + 1)):
        cuts = wanted.get(index)
        if not cuts:
            continue
        node, barred = graph.nodes[index], growth.barred >> index & 1
        possible = len(cuts) == 1 and node.op not in LEAVES and (not barred or (again and index in graph.cheap))
        found = _reads(graph, index, next(iter(cuts)), growth, again) if possible else None
        if found is None:
            if node.several:
                return None
            for one in cuts:
                growth.enter(index, one)
            continue
        growth.inside[index] = next(iter(cuts))
        if barred:
            growth.copies.add(index)
        for source, need in found:
            if need is None or need.prefix:
                growth.enter(source, need)
            else:
                wanted.setdefault(source, set()).add(need)
    if end not in growth.inside:
        return None
    for index in range(len(graph.nodes)):  # all pieces of what is split inside
        for source in graph.nodes[index].reads[:1]:
            if graph.nodes[source].several and source in growth.inside and source not in growth.copies:
                growth.inside.setdefault(index, growth.inside[source])
    return growth.region(cut.extent)


def _reads(graph: Graph, index: int, cut: Cut, growth: _Growth, again: bool) -> list[tuple[int, Cut | None]] | None:
    """(op, cut) of what a slice reads; None where the op cannot be sliced so."""
    try:
        found = graph.reads(index, cut)
        for source, need in found:
            if graph.nodes[source].several:  # a piece and what it is a piece of, or neither
                assert need is not None
                if growth.barred >> source & 1 and not (again and source in graph.cheap):
                    return None
                graph.reads(source, need)
    except Blocked:
        return None
    return found


def joined(graph: Graph, region: Region) -> Region:
    """The same with every later op that can be computed from its slices: fewer results leave it."""
    growth = _Growth(graph)
    growth.inside, growth.copies = dict(region.cuts), set(region.copies)
    for index, cut in region.inputs:
        growth.enter(index, cut)
    mine = sum(1 << i for i in growth.inside if i not in growth.copies)
    for index, node in enumerate(graph.nodes):
        if index in growth.inside or node.op in LEAVES or growth.barred >> index & 1:
            continue
        if not any(i in growth.inside for i in node.reads):
            continue
        for cut in _cuts_after(graph, growth, node):
            found = _reads(graph, index, cut, growth, again=False)
            if found is not None and all(_fits(graph, growth, mine, *one) for one in found):
                growth.inside[index] = cut
                mine |= 1 << index
                for source, need in found:
                    if source not in growth.inside:
                        growth.enter(source, need)
                break
    return growth.region(region.extent)


def _fits(graph: Graph, growth: _Growth, mine: int, source: int, need: Cut | None) -> bool:
    if source in growth.inside:
        return growth.inside[source] == need
    return not graph.before[source] & mine and not graph.nodes[source].several


def _cuts_after(graph: Graph, growth: _Growth, node: Node) -> Iterator[Cut]:
    """Cuts of a node's result that may follow from those of what it reads."""
    for i in dict.fromkeys(node.reads):
        cut = growth.inside.get(i)
        if cut is None:
            continue
        for dim, size in enumerate(node.shape):
            if size == cut.size(cut.extent):
                yield cut.at(dim)
        try:
            yield through_view(cut, graph.nodes[i].shape, node.shape)
        except Blocked:
            continue


# --- running, in bytes ------------------------------------------------------------------------------------------------


def plan_of(graph: Graph, regions: Sequence[Region], training: bool, turning: bool = False) -> Plan | None:
    """The order of steps with these regions, and its curve; None where they wait for each other."""
    steps = _order(graph, regions)
    return None if steps is None else Plan(tuple(steps), tuple(_curve(graph, steps, training, turning)))


def _order(graph: Graph, regions: Sequence[Region]) -> list[Step] | None:
    """Regions as late as possible; what nobody reads any more is left out."""
    owner: dict[int, int] = {}
    for at, region in enumerate(regions):
        owner |= {i: at for i in region.cuts if i not in region.copies}
    single = [i for i, node in enumerate(graph.nodes) if i not in owner and node.op not in LEAVES]
    reads: dict[tuple[int, int], Sequence[int]] = {(i, -1): graph.nodes[i].reads for i in single}
    reads |= {(max(region.cuts), at): [i for i, _ in region.inputs] for at, region in enumerate(regions)}
    done = {i for i, node in enumerate(graph.nodes) if node.op in LEAVES}
    waiting, ordered = sorted(reads), []
    while waiting:
        ready = next((one for one in waiting if done.issuperset(reads[one])), None)
        if ready is None:
            return None
        waiting.remove(ready)
        ordered.append(ready)
        done |= {i for i, at in owner.items() if at == ready[1]} if ready[1] >= 0 else {ready[0]}
    wanted = set(graph.outputs)
    steps: list[Step] = []
    for index, at in reversed(ordered):
        if at < 0:
            if index in wanted:
                steps.append(index)
                wanted.update(graph.nodes[index].reads)
            continue
        region = regions[at]
        outputs = tuple(i for i in region.ops if i in wanted and i not in region.copies)
        if outputs:
            pruned = _pruned(graph, region, outputs)
            steps.append(pruned)
            wanted.update(i for i, _ in pruned.inputs)
    return steps[::-1]


def _pruned(graph: Graph, region: Region, outputs: tuple[int, ...]) -> Region:
    """The region with what these outputs need, and no more."""
    wanted, inputs = set(outputs), set()
    for i in reversed(region.ops):
        if i in wanted:
            for source, need in graph.reads(i, region.cuts[i]):
                if source in region.cuts and region.cuts[source] == need:
                    wanted.add(source)
                else:
                    inputs.add((source, need))
    return replace(
        region, outputs=outputs, cuts={i: cut for i, cut in region.cuts.items() if i in wanted},
        copies=region.copies & wanted, inputs=tuple(one for one in region.inputs if one in inputs),
    )  # fmt: skip


@dataclass(frozen=True)
class _Item:
    """A step as the curve sees it."""

    label: str
    made: dict[int, int]
    """Result -> bytes of new memory."""
    alias: tuple[int, ...]
    reads: tuple[int, ...]
    saves: tuple[int, ...]
    kept: int
    scratch: int
    back: int


def _curve(graph: Graph, steps: Sequence[Step], training: bool, turning: bool) -> list[tuple[str, int]]:
    items = [
        _item_of(graph, step, 1.0) if isinstance(step, int) else _item_of_region(graph, step, training)
        for step in steps
    ]
    if turning:
        read = {i for item in items for i in item.reads}
        items = [
            replace(item, made=dict.fromkeys(item.made, 0), scratch=0)
            if isinstance(step, Region) and read.isdisjoint(item.made) else item
            for item, step in zip(items, steps, strict=True)
        ]  # fmt: skip
    grads = {i: one.grad for i, one in enumerate(graph.holds)}
    return _walk(items, set(graph.outputs), grads, training)


def _item_of(graph: Graph, index: int, share: float) -> _Item:
    node, one = graph.nodes[index], graph.holds[index]
    return _Item(
        node.name, {index: int(one.own * share)}, one.alias, tuple(dict.fromkeys(node.reads)), one.saves,
        int(one.kept * share), int(one.scratch * share), int(one.back * share),
    )  # fmt: skip


def _item_of_region(graph: Graph, region: Region, training: bool) -> _Item:
    share = region.length / region.extent
    inner = [_item_of(graph, i, share) for i in region.ops]
    loose = {i: int(one.grad * share) for i, one in enumerate(graph.holds)}
    forward = _peak(_walk(inner, set(), loose, training=False))
    back = 0
    if training:
        # the slice once more with all that autograd keeps; gradients of what is read whole are made, and added up
        whole = {i for i, cut in region.inputs if cut is None or cut.prefix}
        loose |= {i: graph.holds[i].grad for i in whole}
        back = _peak(_walk(inner, set(region.outputs), loose, training=True, passing=whole))
    reads = tuple(dict.fromkeys(i for i, _ in region.inputs))
    made = {i: graph.sizes[i] for i in region.outputs}
    name = f"{graph.nodes[region.ops[0]].name}..{graph.nodes[region.ops[-1]].name} in {region.slices}"
    return _Item(name, made, (), reads, reads, 0, forward, back)


def _peak(curve: list[tuple[str, int]]) -> int:
    return max((nbytes for _, nbytes in curve), default=0)


def _walk(
    items: Sequence[_Item], outputs: set[int], grads: dict[int, int], training: bool, passing: Container[int] = ()
) -> list[tuple[str, int]]:
    """Bytes alive at the fullest instant of each item, forward and, when training, backward. `passing`: results whose
    gradients are taken away at once."""
    lies: dict[int, frozenset[int]] = {}  # result -> the results whose memory it lies in
    size: dict[int, int] = {}
    last: dict[int, int] = {}  # memory -> the last item that reads it, forward
    saver: dict[int, int] = {}  # memory -> the first item that keeps it for backward
    for at, item in enumerate(items):
        below = frozenset().union(*(lies.get(i, frozenset()) for i in item.alias)) if item.alias else frozenset()
        for i, nbytes in item.made.items():
            lies[i] = below | {i} if nbytes else below
            size[i] = nbytes
        for i in (*item.reads, *item.made):
            for memory in lies.get(i, ()):
                last[memory] = at
        if training:
            for i in item.saves:
                for memory in lies.get(i, ()):
                    saver.setdefault(memory, at)
    for i in outputs:
        for memory in lies.get(i, ()):
            last[memory] = len(items)
    alive, curve = 0, []
    ends: dict[int, list[int]] = {}
    for memory, at in last.items():
        ends.setdefault(at, []).append(memory)
    kept = 0
    for at, item in enumerate(items):
        alive += sum(item.made.values())
        kept += item.kept if training else 0
        curve.append((item.label, alive + kept + item.scratch))
        alive -= sum(size[memory] for memory in ends.get(at, ()) if memory not in saver)
    if not training:
        return curve
    freed: dict[int, list[int]] = {}
    for memory, at in saver.items():
        if last[memory] < len(items):
            freed.setdefault(at, []).append(memory)
    slopes: dict[int, int] = {}  # memory -> bytes of its gradient, alive
    for at in reversed(range(len(items))):
        item = items[at]
        new = 0
        for i in item.reads:
            if item.alias and not any(item.made.values()):
                continue  # the gradient of a view is a view
            new += grads.get(i, 0)
        curve.append((f"{item.label}, backward", alive + kept + sum(slopes.values()) + new + item.back))
        mine = sum(slopes.pop(i, 0) for i in item.made)
        if item.alias and not any(item.made.values()):
            target = next((i for i in item.reads if grads.get(i)), None)
            if target is not None:
                slopes[target] = max(slopes.get(target, 0), mine)
        else:
            for i in item.reads:
                if grads.get(i) and i not in passing:
                    slopes[i] = grads[i]
        alive -= sum(size[memory] for memory in freed.get(at, ()))
        kept -= item.kept
    return curve
