"""Which ops are computed in slices, along what, in how many: chosen from byte counts alone. No tensor in here.

A region grows from one op upward to whatever must be whole: attention's keys, say, which are then computed before it,
perhaps in a region of their own. Regions are added where the curve passes the budget, and cut no finer than it asks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from penstock.autochunk.liveness import LEAVES, Graph, Plan, Region, Step, plan_of
from penstock.autochunk.slice_rules import Blocked, Cut, Node, through_view

VISITS = 2e-5
"""Seconds that one more op costs, whatever its size."""
BANDWIDTH = 1e10
"""Bytes per second at which a slice reads again what is whole: weights, keys and values."""
SPEED = 1e11
"""Operations per second. All three are of a laptop, and only their proportions matter."""


def choose(graph: Graph, budget: int | None, training: bool, recomputing: bool = False) -> Plan:
    """The cheapest plan found whose peak is within the budget, or else the one with the lowest peak.

    A beam search: sets of regions, one more each round, until those within the budget have had a round to be bettered.
    `recomputing`: gradients are asked for alone, so a region whose results only leave computes nothing forward.
    """
    lowest = plan_of(graph, [], training, recomputing)
    assert lowest is not None
    if budget is None or lowest.peak <= budget:
        return lowest
    pool, beam, enough, last = list(candidates(graph)), [lowest], [], False
    while beam:
        found: dict[tuple[Any, ...], Plan] = {}
        for plan in beam:
            for tried in beside(graph, plan.regions, pool):
                made = plan_of(graph, tried, training, recomputing)
                if made is not None:
                    lowest = min(lowest, made, key=lambda one: one.peak)
                    if _above(made, budget) < _above(plan, budget):
                        found.setdefault(tuple((frozenset(one.cuts.items()), one.copies) for one in made.regions), made)
        within = [one for one in found.values() if one.peak <= budget]
        enough += sorted(within, key=_rank)[:MOST]
        beam = [] if last else sorted(found.values(), key=lambda one: (*_above(one, budget), *_rank(one)))[:WIDTH]
        last = bool(enough)
    if not enough:
        return lowest
    coarse = [coarsened(graph, one, budget, training, recomputing) for one in enough]
    return min(coarse, key=lambda one: cost(graph, one, training, recomputing))


WIDTH = 4
"""Sets of regions that go on into the next round."""
MOST = 12
"""Sets of regions of a round whose cost is compared."""


def beside(graph: Graph, regions: Sequence[Region], pool: Sequence[Region]) -> Iterator[list[Region]]:
    """Each region of the pool with those that are there: in place of the ones it overlaps, taking from them what it
    needs, and with what they leave."""
    taken = _own(regions)
    for one in pool:
        kept = [region for region in regions if not _overlap(region, one)]
        yield [*kept, one]
        if len(kept) < len(regions):
            yield [*(rest for region in regions if (rest := _without(graph, region, _own([one])))), one]
            rest = _without(graph, one, taken)
            if rest is not None:
                yield [*regions, rest]


def _own(regions: Sequence[Region]) -> set[int]:
    """Ops that are computed in these regions alone."""
    return {i for region in regions for i in region.cuts if i not in region.copies}


def _without(graph: Graph, region: Region, taken: set[int]) -> Region | None:
    """The region's ops that are not taken; None where too few are left or a list of results would have to enter."""
    cuts = {i: cut for i, cut in region.cuts.items() if i not in taken or i in region.copies}
    inputs = {
        (source, need): None
        for i, cut in cuts.items() for source, need in graph.reads(i, cut) if cuts.get(source, graph) != need
    }  # fmt: skip
    if len(cuts) < 2 or any(graph.nodes[i].several for i, _ in inputs):
        return None
    return replace(region, cuts=cuts, inputs=tuple(inputs))


def _rank(plan: Plan) -> tuple[int, int]:
    return len(plan.regions), sum(len(region.cuts) for region in plan.regions)


def _above(plan: Plan, budget: int) -> tuple[int, int]:
    """How far the curve is above the budget, and then how high it is."""
    return sum(max(nbytes - budget, 0) for _, nbytes in plan.curve), plan.peak


def _overlap(one: Region, other: Region) -> bool:
    return any(i in other.cuts and i not in other.copies for i in one.cuts if i not in one.copies)


def coarsened(graph: Graph, plan: Plan, budget: int, training: bool, recomputing: bool = False) -> Plan:
    """The same regions in as few slices as the budget allows, of equal length."""
    regions = [replace(region, outputs=()) for region in plan.regions]
    for at, region in enumerate(regions):
        low, high = 1, region.slices  # slices: too few below `low`, enough at `high`
        while low < high:
            middle = (low + high) // 2
            others = [*regions[:at], _cut_in(region, middle), *regions[at + 1 :]]
            tried = plan_of(graph, others, training, recomputing)
            low, high = (low, middle) if tried is not None and tried.peak <= budget else (middle + 1, high)
        regions[at] = _cut_in(region, high)
    found = plan_of(graph, regions, training, recomputing)
    assert found is not None
    return found


def _cut_in(region: Region, slices: int) -> Region:
    return replace(region, length=-(-region.extent // slices))


def cost(graph: Graph, plan: Plan, training: bool, recomputing: bool = False) -> float:
    """Seconds that slicing adds, roughly: more ops, reading again what every slice needs whole, and in training the
    products that are computed once more for their gradients."""
    seconds = 0.0
    left = set(graph.outputs) - {i for step in plan.steps for i in read_by(graph, step)}
    for region in plan.regions:
        whole = sum(graph.sizes[i] for i, cut in region.inputs if cut is None or cut.prefix)
        again = sum(graph.sizes[i] for i in region.copies)
        visits = VISITS * len(region.cuts) * region.slices
        seconds += (((region.slices - 1) * whole + 2 * again) / BANDWIDTH + visits) * (3 if training else 1)
        if training and not (recomputing and left.issuperset(region.outputs)):
            seconds += sum(_operations(graph.nodes[i]) for i in region.cuts if i not in graph.cheap) / SPEED
    return seconds


def read_by(graph: Graph, step: Step) -> Sequence[int]:
    """Results that a step reads."""
    return graph.nodes[step].reads if isinstance(step, int) else [i for i, _ in step.inputs]


def _operations(node: Node) -> float:
    """Of a product or an attention."""
    attention = "query" in node.names
    inner = 2 * node.shapes[1][-2] if attention else node.shapes[min(1, len(node.shapes) - 1)][-1]
    return 2.0 * prod(node.shape) * inner


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
