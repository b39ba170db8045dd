"""Where every chunk lives, and how many slots there are: decided from ids and byte counts
alone, without torch. The engine calls it before it allocates, the forecast where nothing is allocated.

[Note: one arithmetic for plan and engine] Nothing in a forecast is fitted to measurements: it runs these functions too.
Where forecast and engine disagree, one of the two has a mistake.

[Note: gradients add up in fp32] A sum of hundreds of micro-batches in bf16 loses what is smaller than a 256th of it.
Where blocks are run again in backward all micro-batches share a visit: gradients of 16-bit weights add up, and are
reduced over ranks, in an fp32 slot as large as one visit's, and come home rounded once. Elsewhere a model is visited
for each micro-batch (`Row.add_up`), and the homes themselves are fp32: 2 bytes more for each trained weight.

[Note: a shadow on the host] Where weights stay on the device and optimizer states in host memory, a copy of this rank's
share of the weights stands beside the states and is what an update writes. The new share goes up once, into the weights
themselves, where ranks gather theirs; nothing comes down but gradients.
"""

from collections import Counter
from collections.abc import Container, Hashable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from penstock.memory.chunks import ITEMSIZE, Chunk, Weight
from penstock.memory.placement import AUTO, DISK, HOST, SHARD, STRATEGIES, Placement, Row, TierName, bits_of

STATES: dict[int, dict[str, tuple[str, int]]] = {
    32: {"exp_avg": ("float32", 1), "exp_avg_sq": ("float32", 1)},
    8: {
        "exp_avg": ("uint8", 1), "exp_avg_sq": ("uint8", 1),
        "exp_avg_scale": ("float32", 256), "exp_avg_sq_scale": ("float32", 256),
    },
}  # fmt: skip
"""What AdamW keeps beside a weight, by the bits of its moments: name -> (dtype, elements of the weight per element).
Names are torch's own; memory.adamw explains codes and scales."""
SUMS = "float32"
"""The dtype in which gradients add up."""
PIECE = 1 << 22
"""Elements that one set of buffers between a disk and the update holds."""
SETS, SET_BYTES = 3, PIECE * 14
"""A weight of up to 4 bytes, or of 2 and its remainder, and two moments."""
RING_BYTES = 6 << 23
"""Of the buffers between a disk and a device: tiers.BLOCK for each of its threads, and two that are copied."""
LANDING_BYTES = PIECE * 4
"""What gradients on the device pass through on their way to an update in host memory."""
GATHER_BYTES = 1 << 24
"""What of shards that ranks gather for a checkpoint is on the device at once: homes.gather."""
UPDATE_TILE = 1 << 20
"""Elements that an update works on at once where it is not compiled: adamw.TILE."""
UPDATE_WIDTH = {32: 8, 8: 28}
"""Bytes that each of them takes meanwhile, by the bits of the moments; a split master takes 4 more."""
UPDATE_ROOM = UPDATE_TILE * (max(UPDATE_WIDTH.values()) + 4)
"""Bytes of host memory that an update leaves free for that."""
SMALL_BUDGET = 2 * 10**9
"""Bytes of a device budget under which a GPU's libraries get workspaces of 4 MiB."""
RESERVED = 0.25
"""Default share of a device budget that is left to activations."""
PAGE = 4096

Layout = tuple[Sequence[Chunk], Sequence[tuple[str, ...]]]
"""A model's chunks, and its visits: groups that are needed at once, in order."""


@dataclass(frozen=True)
class Placed:
    """A chunk and the row of the table that its bytes follow."""

    chunk: Chunk
    row: Row


@dataclass(frozen=True)
class Model:
    """One model's chunks and visits."""

    name: str
    placed: tuple[Placed, ...]
    visits: tuple[tuple[str, ...], ...]
    """Groups that are needed at once, in order."""
    choices: tuple[tuple[str, ...], ...] = ()
    """Per visit, its last groups, of which tokens choose."""
    per_token: int = 0
    """How many a token chooses."""

    def moving(self, world: int) -> list[Chunk]:
        """Chunks whose weights must be fetched before they are used."""
        return [placed.chunk for placed in self.placed if not resident(placed.row, world)]

    def passing(self, world: int) -> list[Chunk]:
        """Trained chunks whose gradients leave the memory that autograd writes."""
        return [p.chunk for p in self.placed if p.chunk.trained and not in_place(p.chunk, p.row, world)]


def resident(row: Row, world: int) -> bool:
    """Whether weights are used where they lie."""
    return row.params.tier == "device" and (world == 1 or not row.params.sharded)


def gradient_dtype(chunk: Chunk, row: Row) -> str:
    """Of a chunk's gradients at home. See [Note: gradients add up in fp32]."""
    return SUMS if row.add_up else chunk.dtype


def gradient_bytes(chunk: Chunk, row: Row) -> int:
    """Bytes of a trained chunk's gradients at home, whole."""
    return chunk.numel * ITEMSIZE[gradient_dtype(chunk, row)]


def shadowed(row: Row) -> bool:
    """Whether a trained chunk's weights have a copy in host memory. See [Note: a shadow on the host]."""
    return row.params.tier == "device" and row.optimizer.tier == "host"


def in_place(chunk: Chunk, row: Row, world: int) -> bool:
    """Whether autograd adds straight into the home of the gradients."""
    on_device = row.grads.tier == "device" and (world == 1 or not row.grads.sharded)
    return on_device and gradient_dtype(chunk, row) == SUMS


def recomputes(moves: bool, recompute: bool | None) -> bool:
    """Whether backward runs blocks once more. `recompute` None: where weights move."""
    return moves if recompute is None else recompute


def states_of(dtype: str, bits: int) -> dict[str, tuple[str, int]]:
    """STATES, and before them the `remainder` of a split master where the weight has 16 bits."""
    return STATES[bits] if dtype == "float32" else {"remainder": ("int16", 1), **STATES[bits]}


def state_bytes(numel: int, dtype: str, bits: int) -> int:
    """Bytes of AdamW's states for so many elements."""
    return sum(numel // per * ITEMSIZE[state_dtype] for state_dtype, per in states_of(dtype, bits).values())


def sharing_groups(keys: Sequence[AbstractSet[Hashable]]) -> list[list[int]]:
    """Indices of the sets, grouped: sets with a common key, directly or through a third set, are in one group.

    The keys of a model are its frozen weights: models of one group step side by side, so that shared weights are
    fetched once for all of them, and their gradients exist at the same time.
    """
    groups: list[list[int]] = []
    for index, key_set in enumerate(keys):
        sharing = [group for group in groups if any(keys[member] & key_set for member in group)]
        merged = sorted(member for group in [*sharing, [index]] for member in group)
        groups = [group for group in groups if group not in sharing] + [merged]
    return sorted(groups)


def shared_keys(chunks: Iterable[Chunk]) -> set[Hashable]:
    """What identifies a model's frozen weights in all models that are made of them."""
    return {chunk.shared for chunk in chunks if chunk.shared is not None}


# --- placement --------------------------------------------------------------------------------------------------------


class _Room:
    """Bytes that are left on each tier; None: no end. Tiers that do not exist are not in it."""

    def __init__(self, left: dict[TierName, int | None]) -> None:
        self._left = dict(left)

    @property
    def tiers(self) -> list[Placement]:
        """The fastest first."""
        return [placement for placement in (SHARD, HOST, DISK) if placement.tier in self._left]

    def fits(self, nbytes: int, placements: Sequence[Placement]) -> bool:
        """Whether one of them has room for so many bytes."""
        return any((left := self._left[each.tier]) is None or left >= nbytes for each in placements)

    def take(self, nbytes: int, placements: Sequence[Placement], shadow: int = 0) -> Placement:
        """The first with room for so many bytes; on the host for `shadow` more."""
        for placement in placements:
            needed = nbytes + (shadow if placement.tier == "host" else 0)
            if self.fits(needed, [placement]):
                self.give(placement.tier, -needed)
                return placement
        return placements[-1]  # too little everywhere: the tier itself raises

    def give(self, tier: TierName, nbytes: int) -> None:
        """Adds to what is left."""
        left = self._left[tier]
        self._left[tier] = None if left is None else left + nbytes

    def take_weights(self, models: Sequence[Layout], world: int) -> list[list[Placement]]:
        """Of each chunk of each model; what models share is taken once."""
        shared: dict[Hashable, Placement] = {}
        taken = []
        for chunks, _ in models:
            taken.append([shared.get(chunk.shared) or self.take(chunk.nbytes // world, self.tiers) for chunk in chunks])
            pairs = zip(chunks, taken[-1], strict=True)
            shared |= {chunk.shared: placement for chunk, placement in pairs if chunk.shared is not None}
        return taken


def place(
    name: str, models: Sequence[Layout], world: int, budgets: dict[TierName, int | None], reserve: int | None = None,
    recompute: bool | None = None,
) -> list[list[Placed]]:  # fmt: skip
    """Every chunk's row under a strategy, for models that are prepared together.

    `budgets` are the bytes left on each tier (None: no end); `reserve` bytes of the device are left to activations;
    `recompute` as in `recomputes`.

    [Note: gemini_auto] It places chunk by chunk: the device is filled first, then host memory, then the disk; weights
    before gradients before optimizer states, because a weight is read in every pass and a state once a step; and within
    each the models in order. So it has to see all models at once. A disk holds no gradients: where host memory does not
    hold both, it is weights that go there.
    """
    name, bits = bits_of(name)
    if name != AUTO:
        row = STRATEGIES[name]
        row = replace(row, bits=bits, add_up=not recomputes(not resident(row, world), recompute))
        return [[Placed(chunk, row) for chunk in chunks] for chunks, _ in models]
    left = dict(budgets)
    device, host = left.get("device"), left.get("host")
    gemini = replace(STRATEGIES["gemini"], bits=bits, add_up=not recomputes(world > 1, recompute))
    if device is not None and not _all_fits(models, world, device, reserve, gemini):
        slots = sum(largest_of_each([weight_slots(chunks, visits) for chunks, visits in models]))
        trained = [([chunk for chunk in chunks if chunk.trained], visits) for chunks, visits in models]
        slots += sum(largest_of_each([gradient_slots(chunks, visits) for chunks, visits in trained]))
        activations = int((device - slots) * RESERVED) if reserve is None else reserve
        left["device"] = max(device - slots - activations, 0)
    if host is not None:
        between = SETS * SET_BYTES + RING_BYTES + LANDING_BYTES
        left["host"] = max(host - between - UPDATE_TILE * (UPDATE_WIDTH[bits] + 4), 0)
    room = _Room(left)
    params = room.take_weights(models, world)
    moves = world > 1 or any(weights.tier != "device" for of_model in params for weights in of_model)
    add_up = not recomputes(moves, recompute)
    nbytes = _gradient_bytes(models, replace(gemini, add_up=add_up)) // world
    in_ram = [each for each in room.tiers if each.tier != "disk"]
    if not room.fits(nbytes, in_ram) and (host := left.get("host")):  # a disk holds no gradients: weights make room
        aside = min(nbytes, host)
        room = _Room({**left, "host": host - aside})
        params = room.take_weights(models, world)
        room.give("host", aside)
    grads = room.take(nbytes, in_ram)
    placed = []
    for (chunks, _), weights_of_chunks in zip(models, params, strict=True):
        rows = []
        for chunk, weights in zip(chunks, weights_of_chunks, strict=True):
            states = weights
            if chunk.trained:  # an update runs where its states are, and weights do not come to the device for it
                slower = [each for each in room.tiers if each.tier != "device" or weights.tier == "device"]
                shadow = chunk.nbytes // world if weights.tier == "device" else 0
                states = room.take(state_bytes(chunk.numel // world, chunk.dtype, bits), slower, shadow)
            rows.append(Placed(chunk, Row(weights, grads, states, bits, add_up)))
        placed.append(rows)
    return placed


def _gradient_bytes(models: Sequence[Layout], row: Row) -> int:
    """Bytes of gradients at once, as `homes` counts them: models share them, but those of one sharing group do not."""
    nbytes = [sum(gradient_bytes(chunk, row) for chunk in chunks if chunk.trained) for chunks, _ in models]
    groups = sharing_groups([shared_keys(chunks) for chunks, _ in models])
    return max(sum(nbytes[i] for i in group) for group in groups)


def _all_fits(models: Sequence[Layout], world: int, device: int, reserve: int | None, row: Row) -> bool:
    """Whether everything may stay on the device: then nothing moves and no slot is needed."""
    if world > 1:
        return False  # shards are gathered into slots
    at_home = sum(homes([[Placed(chunk, row) for chunk in chunks] for chunks, _ in models], world).values())
    return at_home + (int(device * RESERVED) if reserve is None else reserve) <= device


def homes(
    models: Iterable[Sequence[Placed]], world: int, pooled: int = 0, existing: Container[Hashable] = ()
) -> dict[TierName, int]:
    """Bytes that models' weights, gradients and optimizer states take at home, per tier and rank.

    Models step one at a time, so they share the gradients' bytes, of which `pooled` exist already; those of one sharing
    group step side by side and do not. Shared weights have one home; `existing`: keys of those that have it already.
    """
    needs: Counter[TierName] = Counter()
    counted: set[Hashable] = set()
    models = list(models)
    grads: list[Counter[TierName]] = [Counter() for _ in models]
    for placed, grads_of_model in zip(models, grads, strict=True):
        for chunk, row in ((each.chunk, each.row) for each in placed):
            if chunk.shared is not None:
                if chunk.shared in counted or chunk.shared in existing:
                    continue
                counted.add(chunk.shared)
            needs[row.params.tier] += _on(row.params.tier, chunk.nbytes // _parts(row.params, world))
            if chunk.trained:
                count = chunk.numel // _parts(row.optimizer, world)
                for dtype, per in states_of(chunk.dtype, row.bits).values():
                    needs[row.optimizer.tier] += _on(row.optimizer.tier, count // per * ITEMSIZE[dtype])
                if shadowed(row):
                    needs["host"] += count * ITEMSIZE[chunk.dtype]
                grads_of_model[row.grads.tier] += gradient_bytes(chunk, row) // _parts(row.grads, world)
    groups = sharing_groups([shared_keys(each.chunk for each in placed) for placed in models])
    for tier in {tier for counter in grads for tier in counter}:
        needs[tier] += max(max(sum(grads[i][tier] for i in group) for group in groups) - pooled, 0)
    return dict(needs)


def _parts(placement: Placement, world: int) -> int:
    return world if placement.sharded else 1


def _on(tier: TierName, nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE if tier == "disk" else nbytes


MASTER = 4
"""Bytes of a trained weight's element on FSDP2, of its gradient's, and of each of its moments'."""


def shard_homes(weights: Iterable[Weight], shards: int) -> Counter[str]:
    """Bytes of a rank's shards on FSDP2: weights, grads, optimizer; staged: copies in host memory of what a
    checkpoint keeps. It cuts each weight's first dimension."""
    nbytes: Counter[str] = Counter()
    for weight in weights:
        count = -(-weight.shape[0] // shards) * (weight.numel // weight.shape[0])
        nbytes["weights"] += count * (MASTER if weight.trained else ITEMSIZE[weight.dtype])
        if weight.trained:
            nbytes["grads"] += count * MASTER
            nbytes["optimizer"] += 2 * count * MASTER
            nbytes["staged"] += 3 * count * MASTER
    return nbytes


UNSTAGED = "checkpoints keep training waiting: --host-memory has no room for copies of what they keep of {}, {}"


def stages(homes: Mapping[str, int], used: int, budget: int | None) -> bool:
    """Whether copies of these `shard_homes` have room in host memory: a checkpoint is then written beside training."""
    return budget is None or used + homes["staged"] <= budget


def buffers(models: Iterable[Sequence[Placed]]) -> dict[str, int]:
    """Bytes of host memory between tiers: for weights from a disk to the device, for states between a disk and an
    update, for gradients from the device to an update in host memory."""
    every = [placed for of_model in models for placed in of_model]
    trained = [placed.row for placed in every if placed.chunk.trained]
    on_disk = any("disk" in (row.params.tier, row.optimizer.tier) for row in trained)
    lands = any(row.grads.tier == "device" != updated_on(row) for row in trained)
    return {
        "disk_buffers": RING_BYTES if any(placed.row.params.tier == "disk" for placed in every) else 0,
        "update_buffers": SETS * SET_BYTES if on_disk else 0,
        "gradient_buffer": LANDING_BYTES if lands else 0,
    }


def updated_on(row: Row) -> TierName:
    """Where an update runs: where its states are in RAM."""
    return "device" if row.optimizer.tier == "device" else "host"


# --- slots ------------------------------------------------------------------------------------------------------------


def weight_slots(chunks: Sequence[Chunk], visits: Sequence[Sequence[str]], ahead: int = 1) -> list[int]:
    """Bytes of the fewest slots that let a model's chunks pass with `ahead` visits prefetched; `chunks` are those that
    move, `visits` the groups that are needed at once, in order."""
    sizes = _by_group((chunk.group, chunk.nbytes) for chunk in chunks)
    needs = []
    for i in range(len(visits)):
        near = {group for step in range(ahead + 1) for group in visits[(i + step) % len(visits)]}
        needs.append([nbytes for group in near for nbytes in sizes.get(group, ())])
    return largest_of_each(needs)


def settling_bytes(chunk: Chunk, row: Row, world: int, again: bool) -> int:
    """Bytes beside a visit's slots that its gradients take on their way home: this rank's part of the sum over ranks,
    and, after another visit, what it is added to, where that comes from elsewhere. See sink.Sink.settle."""
    if not (world > 1 and chunk.trained and row.grads.sharded):
        return 0
    comes = ITEMSIZE[gradient_dtype(chunk, row)] if again and row.grads.tier != "device" else 0
    return chunk.numel // world * (ITEMSIZE[SUMS] + comes)


def gradient_slots(chunks: Sequence[Chunk], visits: Sequence[Sequence[str]]) -> list[int]:
    """Bytes of the slots that one visit's gradients need; `chunks` are those whose gradients leave."""
    sizes = _by_group((chunk.group, chunk.numel * ITEMSIZE[SUMS]) for chunk in chunks)
    return largest_of_each([[nbytes for group in groups for nbytes in sizes.get(group, ())] for groups in visits])


def _by_group(sizes: Iterable[tuple[str, int]]) -> dict[str, list[int]]:
    by_group: dict[str, list[int]] = {}
    for group, nbytes in sizes:
        by_group.setdefault(group, []).append(nbytes)
    return by_group


def largest_of_each(needs: Sequence[Sequence[int]]) -> list[int]:
    """Slots that serve each of several needs, which never come at the same time: the i-th largest for the i-th."""
    ordered = [sorted(sizes, reverse=True) for sizes in needs]
    return [max(sizes[i] for sizes in ordered if i < len(sizes)) for i in range(max(map(len, ordered), default=0))]


def filled(slots: Sequence[int], models: Sequence[Sequence[Chunk]], room: int | None) -> list[int]:
    """More slots, as far as `room` bytes reach (None: without end), until the largest model stays in them whole.

    A model that stays is not fetched again for every token it generates.
    """
    largest = max(models, key=lambda chunks: sum(chunk.nbytes for chunk in chunks), default=[])
    wanted = Counter(chunk.nbytes for chunk in largest) - Counter(slots)
    result, total = list(slots), sum(slots)
    for nbytes in sorted(wanted.elements()):
        if room is not None and total + nbytes > room:
            break
        result.append(nbytes)
        total += nbytes
    return result


def fit_at_once(chunks: Iterable[Chunk], slots: Iterable[int]) -> bool:
    """Whether slots of so many bytes hold all of these chunks. See [Note: one lease for a rollout] in stream.py."""
    sizes, rooms = (sorted(nbytes, reverse=True) for nbytes in ((chunk.nbytes for chunk in chunks), slots))
    return len(sizes) <= len(rooms) and all(nbytes <= room for nbytes, room in zip(sizes, rooms, strict=False))


@dataclass(frozen=True)
class Slots:
    """What the two arenas are cut into, bytes each."""

    weights: list[int]
    gradients: list[int]
    least: int
    """Bytes of the fewest slots that work."""

    @property
    def nbytes(self) -> int:
        """All of them."""
        return sum(self.weights) + sum(self.gradients)


def cut(models: Sequence[Model], world: int, room: int | None, reserve: int | None = None, ahead: int = 1) -> Slots:
    """The slots for these models in `room` bytes of device memory, of which `reserve` are left to activations.

    Where room is too small the fewest that work are given, and `least` is what they take.

    [Note: slots are cut once] One cut serves all phases. If the budget suffices, there are slots enough for the whole
    actor, which then stays while it generates.
    """
    moving = [model.moving(world) for model in models]
    pairs = list(zip(models, moving, strict=True))
    weights = largest_of_each([weight_slots(chunks, model.visits, ahead) for model, chunks in pairs])
    gradients = largest_of_each([gradient_slots(model.passing(world), model.visits) for model in models])
    least = sum(weights) + sum(gradients)
    if room is not None:
        spare = max(room - least, 0)
        room = sum(weights) + (int(spare * (1 - RESERVED)) if reserve is None else max(spare - reserve, 0))
    return Slots(filled(weights, moving, room), gradients, least)


# --- groups that tokens choose of -----------------------------------------------------------------------------------


def few_tokens(model: Model, world: int, link: float, flops: float, slots: int = 0) -> int:
    """The most tokens of a visit for which the experts that they choose come sooner than all of a block's.

    `link` and `flops` are what moves and is computed per second. n tokens that choose k of E experts, each as likely as
    any, choose E (1 - (1 - k/E)^n) different ones. All experts come while the block before computes; the chosen ones
    are known once the block has begun, and it waits for them. `slots`: bytes of slots; what more they hold than two
    visits need stays from pass to pass where all come, and of what is chosen nothing is counted to stay. 0: nothing
    moves of which tokens choose.
    """
    moving = Counter[str]()
    for chunk in model.moving(world):
        moving[chunk.group] += chunk.nbytes
    at = next((i for i, groups in enumerate(model.choices) if any(moving[group] for group in groups)), None)
    if at is None:
        return 0
    choices, per_token = model.choices[at], model.per_token
    own = [group for group in model.visits[at] if group not in choices]
    numel = Counter[str]()
    for placed in model.placed:
        numel[placed.chunk.group] += placed.chunk.numel
    rest, experts = (sum(moving[group] for group in groups) / link for groups in (own, choices))
    spare = max(slots - sum(weight_slots(model.moving(world), model.visits)), 0)
    ahead = (rest + experts) * (1 - min(spare / sum(moving.values()), 1))
    share = per_token / len(choices)
    fixed = 2 * sum(numel[group] for group in own) / flops
    called = 2 * share * sum(numel[group] for group in choices) / flops
    few = 0
    for tokens in range(1, MOST_FEW + 1):
        chosen = max(rest, tokens * fixed) + (1 - (1 - share) ** tokens) * experts + tokens * called
        if chosen < max(ahead, tokens * (fixed + called)):
            few = tokens
    return few


MOST_FEW = 256
"""Tokens that no mixture is so wide for that many experts were left out."""
