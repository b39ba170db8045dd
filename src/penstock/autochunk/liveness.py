"""What a graph holds when it is run by a plan: the order of steps, and how many bytes are alive at each of them.

Byte counts alone, no tensor: `regions.py` asks it hundreds of times to choose, and `slices.py` runs what was chosen.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace

from penstock.autochunk.slice_rules import Blocked, Cut, Node, needs, refs

LEAVES = ("input", "weight")


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


def plan_of(graph: Graph, regions: Sequence[Region], training: bool, recomputing: bool = False) -> Plan | None:
    """The order of steps with these regions, and its curve; None where they wait for each other."""
    steps = _order(graph, regions)
    return None if steps is None else Plan(tuple(steps), tuple(_curve(graph, steps, training, recomputing)))


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


def _curve(graph: Graph, steps: Sequence[Step], training: bool, recomputing: bool) -> list[tuple[str, int]]:
    items = [
        _item_of(graph, step, 1.0) if isinstance(step, int) else _item_of_region(graph, step, training)
        for step in steps
    ]
    if recomputing:
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
