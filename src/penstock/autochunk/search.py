"""Chooses the ops that are computed in slices, the dimension and the number of slices, from byte counts only.

A region grows from one op upward to the ops that must be whole, such as attention's keys, which are then computed
before it, perhaps in a region of their own. The search adds regions where the curve of bytes is above the budget, and
makes as few slices as the budget allows. It knows no tensors.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from penstock.autochunk.liveness import LEAVES, Graph, Plan, Read, Region, Step, plan_of
from penstock.autochunk.slice_rules import Blocked, Cut, Node, through_view

VISITS = 2e-5
"""Seconds that one more op costs, whatever its size."""
BANDWIDTH = 1e10
"""Bytes per second at which a slice reads again what is whole: weights, keys and values."""
SPEED = 1e11
"""Operations per second. All three are of a laptop, and only their proportions matter."""
WIDTH = 4
"""Number of plans that go on into the next round of the search."""
COMPARED = 12
"""Number of plans of a round whose cost is compared."""


def choose(graph: Graph, budget: int | None, training: bool, recomputing: bool = False) -> Plan:
    """The cheapest plan found whose peak is within the budget, else the plan with the lowest peak.

    A beam search: each round adds a region to each plan; the search ends one round after a plan is within the budget.
    `recomputing`: only gradients are asked for, so a region whose results are only returned computes nothing forward.
    """
    lowest = plan_of(graph, [], training, recomputing)
    assert lowest is not None
    if budget is None or lowest.peak <= budget:
        return lowest
    pool, beam, enough, is_last_round = list(candidates(graph)), [lowest], [], False
    while beam:
        better: dict[tuple[Any, ...], Plan] = {}
        for plan in beam:
            for regions in additions(graph, plan.regions, pool):
                larger = plan_of(graph, regions, training, recomputing)
                if larger is None:
                    continue
                lowest = min(lowest, larger, key=lambda plan: plan.peak)
                if _excess(larger, budget) < _excess(plan, budget):
                    better.setdefault(tuple(_identity(region) for region in larger.regions), larger)
        enough += sorted((plan for plan in better.values() if plan.peak <= budget), key=_complexity)[:COMPARED]
        ranked = sorted(better.values(), key=lambda plan: (*_excess(plan, budget), *_complexity(plan)))
        beam = [] if is_last_round else ranked[:WIDTH]
        is_last_round = bool(enough)
    if not enough:
        return lowest
    coarse = [coarsened(graph, plan, budget, training, recomputing) for plan in enough]
    return min(coarse, key=lambda plan: cost(graph, plan, training, recomputing))


def additions(graph: Graph, regions: Sequence[Region], pool: Sequence[Region]) -> Iterator[list[Region]]:
    """Each region of the pool together with `regions`: instead of those that it overlaps, with the overlap taken from
    them, or with the overlap taken from it."""
    taken = {i for region in regions for i in region.owned}
    for new in pool:
        owned = new.owned
        kept = [region for region in regions if owned.isdisjoint(region.owned)]
        yield [*kept, new]
        if len(kept) < len(regions):
            yield [*(smaller for region in regions if (smaller := _without(graph, region, owned))), new]
            smaller = _without(graph, new, taken)
            if smaller is not None:
                yield [*regions, smaller]


def _without(graph: Graph, region: Region, taken: set[int]) -> Region | None:
    """The region without the ops `taken`; None if one op is left, or if a list of results would be an input."""
    cuts = {i: cut for i, cut in region.cuts.items() if i not in taken or i in region.copies}
    inputs: dict[Read, None] = {}  # an ordered set
    for i, cut in cuts.items():
        inputs |= {read: None for read in graph.reads(i, cut) if not _is_inside(cuts, read)}
    if len(cuts) < 2 or any(graph.nodes[i].is_list for i, _ in inputs):
        return None
    return replace(region, cuts=cuts, inputs=tuple(inputs))


def _is_inside(cuts: dict[int, Cut], read: Read) -> bool:
    index, cut = read
    return index in cuts and cuts[index] == cut


def _identity(region: Region) -> tuple[Any, ...]:
    return frozenset(region.cuts.items()), region.copies


def _complexity(plan: Plan) -> tuple[int, int]:
    return len(plan.regions), sum(len(region.cuts) for region in plan.regions)


def _excess(plan: Plan, budget: int) -> tuple[int, int]:
    """How far the curve is above the budget, then its peak."""
    return sum(max(nbytes - budget, 0) for _, nbytes in plan.curve), plan.peak


def coarsened(graph: Graph, plan: Plan, budget: int, training: bool, recomputing: bool = False) -> Plan:
    """The same regions in as few slices of equal length as the budget allows."""
    regions = [replace(region, outputs=()) for region in plan.regions]
    for at, region in enumerate(regions):
        low, high = 1, region.slices  # fewer than `low` slices are too few, `high` slices are enough
        while low < high:
            middle = (low + high) // 2
            coarser = plan_of(
                graph, [*regions[:at], _with_slices(region, middle), *regions[at + 1 :]], training, recomputing
            )
            low, high = (low, middle) if coarser is not None and coarser.peak <= budget else (middle + 1, high)
        regions[at] = _with_slices(region, high)
    result = plan_of(graph, regions, training, recomputing)
    assert result is not None
    return result


def _with_slices(region: Region, slices: int) -> Region:
    return replace(region, length=-(-region.extent // slices))


def cost(graph: Graph, plan: Plan, training: bool, recomputing: bool = False) -> float:
    """Seconds that slicing adds, roughly: additional ops, repeated reads of what every slice needs whole, and in
    training the products that are computed again for their gradients."""
    seconds = 0.0
    returned = set(graph.outputs) - {i for step in plan.steps for i in read_by(graph, step)}
    for region in plan.regions:
        whole = sum(graph.sizes[i] for i, cut in region.inputs if cut is None or cut.prefix)
        copied = sum(graph.sizes[i] for i in region.copies)
        visits = VISITS * len(region.cuts) * region.slices
        seconds += (((region.slices - 1) * whole + 2 * copied) / BANDWIDTH + visits) * (3 if training else 1)
        if training and not (recomputing and returned.issuperset(region.outputs)):
            seconds += sum(_operations(graph.nodes[i]) for i in region.cuts if i not in graph.cheap) / SPEED
    return seconds


def read_by(graph: Graph, step: Step) -> Sequence[int]:
    """Results that a step reads."""
    return graph.nodes[step].reads if isinstance(step, int) else [i for i, _ in step.inputs]


def _operations(node: Node) -> float:
    """Of a product or an attention."""
    if "query" in node.names:
        return 4.0 * prod(node.shape) * node.shapes[1][-2]
    return 2.0 * prod(node.shape) * node.shapes[min(1, len(node.shapes) - 1)][-1]


# --- growing ----------------------------------------------------------------------------------------------------------


def candidates(graph: Graph) -> Iterator[Region]:
    """Every region that grows from an op and a dimension of its result; regions of the same ops appear once."""
    seen = set()
    for end in reversed(range(len(graph.nodes))):
        node = graph.nodes[end]
        if node.op in LEAVES or node.is_list or not graph.holds[end].own:
            continue  # instead of a view, the op whose memory it shares
        cuts = [Cut(dim, extent) for dim, extent in enumerate(node.shape) if extent != 1]
        for cut, copying in ((cut, copying) for cut in cuts for copying in (False, True)):
            grown = grow(graph, end, cut, copying)
            for region in (grown, joined(graph, grown)) if grown else ():
                if len(region.cuts) > 1 and _identity(region) not in seen:
                    seen.add(_identity(region))
                    yield region


class _Growth:
    """A region while it grows."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.inside: dict[int, Cut] = {}
        self.copies: set[int] = set()
        self.inputs: dict[Read, None] = {}  # an ordered set
        self.barred = 0
        """Ops that run before the region, as bits."""

    def add_input(self, index: int, cut: Cut | None) -> None:
        """The region reads this result from outside."""
        self.inputs[index, cut] = None
        self.barred |= self.graph.before[index] | 1 << index

    def is_barred(self, index: int) -> bool:
        return bool(self.barred >> index & 1)

    def reads(self, index: int, cut: Cut, copying: bool) -> list[Read] | None:
        """What a slice of the op reads; None if the op cannot be sliced this way inside the region."""
        graph = self.graph
        try:
            reads = graph.reads(index, cut)
            for source, need in reads:
                if graph.nodes[source].is_list:  # a piece and the list that it belongs to are inside, or neither
                    assert need is not None
                    if self.is_barred(source) and not (copying and source in graph.cheap):
                        return None
                    graph.reads(source, need)
        except Blocked:
            return None
        return reads

    def region(self, extent: int) -> Region:
        return Region(dict(self.inside), frozenset(self.copies), tuple(self.inputs), extent, 1)


def grow(graph: Graph, end: int, cut: Cut, copying: bool) -> Region | None:
    """The largest region that ends in this cut of an op's result. `copying`: cheap ops that must be whole for other ops
    are computed a second time in slices, so that their results need not be kept."""
    growth = _Growth(graph)
    wanted: dict[int, set[Cut]] = {end: {cut}}
    for index in reversed(range(end + 1)):
        cuts = wanted.get(index)
        if not cuts:
            continue
        node, barred = graph.nodes[index], growth.is_barred(index)
        possible = len(cuts) == 1 and node.op not in LEAVES and (not barred or (copying and index in graph.cheap))
        reads = growth.reads(index, next(iter(cuts)), copying) if possible else None
        if reads is None:
            if node.is_list:
                return None
            for need in cuts:
                growth.add_input(index, need)
            continue
        growth.inside[index] = next(iter(cuts))
        if barred:
            growth.copies.add(index)
        for source, source_cut in reads:
            if source_cut is None or source_cut.prefix:
                growth.add_input(source, source_cut)
            else:
                wanted.setdefault(source, set()).add(source_cut)
    if end not in growth.inside:
        return None
    for index, node in enumerate(graph.nodes):  # all pieces of a list that is inside
        for source in node.reads[:1]:
            if graph.nodes[source].is_list and source in growth.inside and source not in growth.copies:
                growth.inside.setdefault(index, growth.inside[source])
    return growth.region(cut.extent)


def joined(graph: Graph, region: Region) -> Region:
    """The region with every later op that can be computed from its slices, so that fewer results leave it."""
    growth = _Growth(graph)
    growth.inside, growth.copies = dict(region.cuts), set(region.copies)
    for index, cut in region.inputs:
        growth.add_input(index, cut)
    owned = sum(1 << i for i in region.owned)
    for index, node in enumerate(graph.nodes):
        if index in growth.inside or node.op in LEAVES or growth.is_barred(index):
            continue
        if not any(i in growth.inside for i in node.reads):
            continue
        for cut in _cuts_after(graph, growth, node):
            reads = growth.reads(index, cut, copying=False)
            if reads is not None and all(_is_available(growth, owned, read) for read in reads):
                growth.inside[index] = cut
                owned |= 1 << index
                for source, need in reads:
                    if source not in growth.inside:
                        growth.add_input(source, need)
                break
    return growth.region(region.extent)


def _is_available(growth: _Growth, owned: int, read: Read) -> bool:
    """Whether a slice can read it: inside the region with the same cut, or before the region's `owned` ops (bits)."""
    source, graph = read[0], growth.graph
    if source in growth.inside:
        return _is_inside(growth.inside, read)
    return not graph.before[source] & owned and not graph.nodes[source].is_list


def _cuts_after(graph: Graph, growth: _Growth, node: Node) -> Iterator[Cut]:
    """Cuts of a node's result that may follow from the cuts of its arguments."""
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
