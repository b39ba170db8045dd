"""How many bytes are alive at each step of a graph that runs by a plan, and in which order its steps run.

It knows byte counts, no tensors: `search` calls it hundreds of times to choose a plan, and `execute` runs the plan.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace

from penstock.autochunk.slice_rules import Blocked, Cut, Node, needs, refs

LEAVES = ("input", "weight")

Read = tuple[int, Cut | None]
"""(op, the cut of its result that is read); None: the whole result."""


@dataclass(frozen=True)
class Bytes:
    """The memory of one op that is computed whole."""

    own: int = 0
    """New memory of its result."""
    alias: tuple[int, ...] = ()
    """Ops whose memory its result shares."""
    scratch: int = 0
    """Additional memory while the op runs."""
    saves: tuple[int, ...] = ()
    """Ops whose results autograd saves for it; may include the op itself."""
    kept: int = 0
    """Other memory that autograd keeps for it."""
    grad: int = 0
    """Of its result's gradient; 0 if it has none."""
    back: int = 0
    """Additional memory while its backward runs."""


@dataclass(frozen=True)
class Graph:
    """Ops in the order they run, the memory of each, and the ops whose results the module returns."""

    nodes: tuple[Node, ...]
    holds: tuple[Bytes, ...]
    outputs: tuple[int, ...]
    cheap: frozenset[int] = frozenset()
    """Ops that may be computed twice rather than kept: no matrix products."""
    sizes: tuple[int, ...] = ()
    """Bytes of each result, new memory or not."""
    before: tuple[int, ...] = field(init=False, compare=False)
    """The set of ops that each op depends on, as bits."""
    known: dict[tuple[int, Cut], list[Read] | str] = field(default_factory=dict, compare=False)
    """Cache of `reads`: the result, or the reason why the op is Blocked."""

    def __post_init__(self) -> None:
        before: list[int] = []
        for node in self.nodes:
            mask = 0
            for i in node.reads:
                mask |= before[i] | 1 << i
            before.append(mask)
        object.__setattr__(self, "before", tuple(before))

    def reads(self, index: int, cut: Cut) -> list[Read]:
        """What a slice of the op's result reads: one entry for each tensor argument, in order. Raises Blocked."""
        if (index, cut) not in self.known:
            node = self.nodes[index]
            try:
                cuts = needs(node, cut)
            except Blocked as error:
                self.known[index, cut] = str(error)
            else:
                arguments = zip(node.names, node.args, strict=True)
                self.known[index, cut] = [(ref.index, cuts.get(name)) for name, arg in arguments for ref in refs(arg)]
        result = self.known[index, cut]
        if isinstance(result, str):
            raise Blocked(result)
        return result


@dataclass(frozen=True)
class Region:
    """Ops that are computed slice by slice."""

    cuts: dict[int, Cut]
    """Op -> the cut of its result."""
    copies: frozenset[int]
    """The ops of `cuts` that are also computed elsewhere, because that is cheaper than to keep their results."""
    inputs: tuple[Read, ...]
    """What the region reads from outside."""
    extent: int
    length: int
    """Of a slice; the last slice may be shorter."""
    outputs: tuple[int, ...] = ()
    """Ops whose results are read outside; set when the whole plan is known."""

    @property
    def slices(self) -> int:
        return -(-self.extent // self.length)

    @property
    def ops(self) -> list[int]:
        """In the order they run."""
        return sorted(self.cuts)

    @property
    def owned(self) -> set[int]:
        """Ops that are computed in this region only."""
        return self.cuts.keys() - self.copies


Step = int | Region


@dataclass(frozen=True)
class Plan:
    """The steps in the order they run: single ops, and regions."""

    steps: tuple[Step, ...]
    curve: tuple[tuple[str, int], ...]
    """(label of the step, most bytes alive during it), forward and then backward."""

    @property
    def peak(self) -> int:
        """Bytes."""
        return max((nbytes for _, nbytes in self.curve), default=0)

    @property
    def regions(self) -> list[Region]:
        return [step for step in self.steps if isinstance(step, Region)]


def plan_of(graph: Graph, regions: Sequence[Region], training: bool, recomputing: bool = False) -> Plan | None:
    """The plan that computes these regions in slices; None if two regions depend on each other."""
    steps = _order(graph, regions)
    return None if steps is None else Plan(tuple(steps), tuple(_curve(graph, steps, training, recomputing)))


def _order(graph: Graph, regions: Sequence[Region]) -> list[Step] | None:
    """Regions run as late as possible. Ops whose results are not read are dropped."""
    region_of = {i: at for at, region in enumerate(regions) for i in region.owned}
    single = [i for i, node in enumerate(graph.nodes) if i not in region_of and node.op not in LEAVES]
    # A unit of work is (its last op, its region or -1), so that units sort by their last op.
    reads: dict[tuple[int, int], Sequence[int]] = {(i, -1): graph.nodes[i].reads for i in single}
    reads |= {(max(region.cuts), at): [i for i, _ in region.inputs] for at, region in enumerate(regions)}
    done = {i for i, node in enumerate(graph.nodes) if node.op in LEAVES}
    waiting, ordered = sorted(reads), []
    while waiting:
        ready = next((unit for unit in waiting if done.issuperset(reads[unit])), None)
        if ready is None:
            return None
        waiting.remove(ready)
        ordered.append(ready)
        index, at = ready
        done |= {index} if at < 0 else {i for i, owner in region_of.items() if owner == at}
    wanted = set(graph.outputs)
    steps: list[Step] = []
    for index, at in reversed(ordered):
        if at >= 0:
            outputs = tuple(i for i in regions[at].ops if i in wanted and i not in regions[at].copies)
            if outputs:
                pruned = _pruned(graph, regions[at], outputs)
                steps.append(pruned)
                wanted.update(i for i, _ in pruned.inputs)
        elif index in wanted:
            steps.append(index)
            wanted.update(graph.nodes[index].reads)
    return steps[::-1]


def _pruned(graph: Graph, region: Region, outputs: tuple[int, ...]) -> Region:
    """The region with the ops and inputs that these outputs need, and no others."""
    wanted, inputs = set(outputs), set()
    for i in reversed(region.ops):
        if i in wanted:
            for source, need in graph.reads(i, region.cuts[i]):
                if source in region.cuts and region.cuts[source] == need:
                    wanted.add(source)
                else:
                    inputs.add((source, need))
    cuts = {i: cut for i, cut in region.cuts.items() if i in wanted}
    kept = tuple(read for read in region.inputs if read in inputs)
    return replace(region, outputs=outputs, cuts=cuts, copies=region.copies & wanted, inputs=kept)


@dataclass(frozen=True)
class _StepBytes:
    """The memory of a step: `Bytes` of an op, or of a whole region."""

    label: str
    made: dict[int, int]
    """Result -> bytes of new memory."""
    alias: tuple[int, ...]
    reads: tuple[int, ...]
    saves: tuple[int, ...]
    kept: int
    scratch: int
    back: int

    @property
    def is_view(self) -> bool:
        return bool(self.alias) and not any(self.made.values())


def _curve(graph: Graph, steps: Sequence[Step], training: bool, recomputing: bool) -> list[tuple[str, int]]:
    sizes = [
        _op_bytes(graph, step, 1.0) if isinstance(step, int) else _region_bytes(graph, step, training) for step in steps
    ]
    if recomputing:  # a region whose results are only returned computes nothing forward
        read = {i for step in sizes for i in step.reads}
        for at, step in enumerate(sizes):
            if isinstance(steps[at], Region) and read.isdisjoint(step.made):
                sizes[at] = replace(step, made=dict.fromkeys(step.made, 0), scratch=0)
    grads = {i: nbytes.grad for i, nbytes in enumerate(graph.holds)}
    return _walk(sizes, set(graph.outputs), grads, training)


def _op_bytes(graph: Graph, index: int, share: float) -> _StepBytes:
    node, nbytes = graph.nodes[index], graph.holds[index]
    made, kept, scratch, back = (int(n * share) for n in (nbytes.own, nbytes.kept, nbytes.scratch, nbytes.back))
    reads = tuple(dict.fromkeys(node.reads))
    return _StepBytes(node.name, {index: made}, nbytes.alias, reads, nbytes.saves, kept, scratch, back)


def _region_bytes(graph: Graph, region: Region, training: bool) -> _StepBytes:
    share = region.length / region.extent
    inner = [_op_bytes(graph, i, share) for i in region.ops]
    grads = {i: int(nbytes.grad * share) for i, nbytes in enumerate(graph.holds)}
    forward = _peak(_walk(inner, set(), grads, training=False))
    back = 0
    if training:
        # Each slice runs again with all that autograd keeps. Gradients of inputs that are read whole are added up.
        whole = {i for i, cut in region.inputs if cut is None or cut.prefix}
        grads |= {i: graph.holds[i].grad for i in whole}
        back = _peak(_walk(inner, set(region.outputs), grads, training=True, passing=whole))
    reads = tuple(dict.fromkeys(i for i, _ in region.inputs))
    made = {i: graph.sizes[i] for i in region.outputs}
    name = f"{graph.nodes[region.ops[0]].name}..{graph.nodes[region.ops[-1]].name} in {region.slices}"
    return _StepBytes(name, made, (), reads, reads, 0, forward, back)


def _peak(curve: list[tuple[str, int]]) -> int:
    return max((nbytes for _, nbytes in curve), default=0)


def _walk(
    steps: Sequence[_StepBytes], outputs: set[int], grads: dict[int, int], training: bool, passing: Container[int] = ()
) -> list[tuple[str, int]]:
    """(label, most bytes alive) of each step forward and, when training, backward. `grads`: result -> bytes of its
    gradient. `passing`: results whose gradients do not stay alive after the step that makes them."""
    memory_of: dict[int, frozenset[int]] = {}  # result -> the results whose memory it shares
    last: dict[int, int] = {}  # memory -> the last step that reads it, forward
    saver: dict[int, int] = {}  # memory -> the first step that keeps it for backward
    size = {i: nbytes for step in steps for i, nbytes in step.made.items()}
    for at, step in enumerate(steps):
        shared = frozenset(memory for i in step.alias for memory in memory_of.get(i, ()))
        for i, nbytes in step.made.items():
            memory_of[i] = shared | {i} if nbytes else shared
        last |= {memory: at for i in (*step.reads, *step.made) for memory in memory_of.get(i, ())}
        for i in step.saves if training else ():
            for memory in memory_of.get(i, ()):
                saver.setdefault(memory, at)
    last |= {memory: len(steps) for i in outputs for memory in memory_of.get(i, ())}
    freed = [0] * (len(steps) + 1)  # bytes that die after each step, forward
    freed_back = [0] * len(steps)  # the same in backward; outputs stay alive
    for memory, at in last.items():
        if memory not in saver:
            freed[at] += size[memory]
        elif at < len(steps):
            freed_back[saver[memory]] += size[memory]
    alive, kept, curve = 0, 0, []
    for at, step in enumerate(steps):
        alive += sum(step.made.values())
        kept += step.kept if training else 0
        curve.append((step.label, alive + kept + step.scratch))
        alive -= freed[at]
    return curve + _walk_back(steps, alive + kept, grads, freed_back, passing) if training else curve


def _walk_back(
    steps: Sequence[_StepBytes], alive: int, grads: dict[int, int], freed: Sequence[int], passing: Container[int]
) -> list[tuple[str, int]]:
    curve = []
    slopes: dict[int, int] = {}  # result -> bytes of its gradient that are alive
    for at in reversed(range(len(steps))):
        step = steps[at]
        new = 0 if step.is_view else sum(grads.get(i, 0) for i in step.reads)  # the gradient of a view is a view
        curve.append((f"{step.label}, backward", alive + sum(slopes.values()) + new + step.back))
        slope = sum(slopes.pop(i, 0) for i in step.made)
        learning = [i for i in step.reads if grads.get(i)]
        if step.is_view and learning:
            slopes[learning[0]] = max(slopes.get(learning[0], 0), slope)
        elif not step.is_view:
            slopes |= {i: grads[i] for i in learning if i not in passing}
        alive -= freed[at] + step.kept
    return curve
