"""A decoder whose blocks are the layers of a model of transformers, as they are there.

[Note: what a layer is called with] A layer of transformers gets masks, rotary tables and caches as arguments, and each
architecture has its own. So the first part of the program runs the base model's forward with recorders in the layers'
places: it embeds the tokens and notes what every layer would have been called with. Each layer then runs by itself on
the states. The last part runs the forward once more, past layers that do nothing, to what is behind them.

[Note: theirs in our hands] Linear layers become ours (models.linear): gradients go to their place, adapters and packed
weights fit them. Buffers that files hold are weights that do not learn. Modules whose weights are tied become one
module, so that every weight has one owner. Dropout is off, in training too.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.errors import UserError
from penstock.memory.program import Part
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.foreign.anatomy import MORE_THAN_STATES, Reached, arguments_of, forwards, take_apart, wrapped
from penstock.models.foreign.build import skeleton
from penstock.models.linear import Linear, linear, precise

CHECKS = 3
"""Steps of a model's cache that are compared with whole rows."""


@dataclass
class Past:
    """What a model keeps of the tokens that it has read."""

    cache: Any = None
    """transformers' cache, of whatever class the model makes. None: it has made none."""


@dataclass
class Calls:
    """The context of a micro-batch: what each layer is called with. The program's first part fills it."""

    past: Past | None = None
    """Where text is made."""
    layers: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    """Per layer its arguments, the states among them replaced by None."""
    tokens: Tensor | None = None
    outputs: dict[nn.Module, tuple[torch.Size, torch.dtype]] = field(default_factory=dict)
    """Of modules before the layers: the shapes and dtypes of what they returned."""
    shapes: list[torch.Size] = field(default_factory=list)
    """Of the states and of each tensor that is carried beside them. Empty: nothing is carried."""
    carried: list[dict[int | str, int]] = field(default_factory=list)
    """Per layer, which of `shapes` an argument is."""

    def split(self, x: Tensor) -> list[Tensor]:
        """The states and what is carried beside them, which go from layer to layer as one flat tensor."""
        if not self.shapes:
            return [x]
        pieces = x.split([shape.numel() for shape in self.shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def join(self, pieces: list[Tensor]) -> Tensor:
        """The inverse of `split`."""
        return torch.cat([piece.reshape(-1) for piece in pieces]) if self.shapes else pieces[0]


class ForeignDecoder(Decoder):
    """See the module. `blocks[i]` is layer i, `body` the base model around them."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """As Decoder's. Raises ValueError for a model that is no chain of layers."""
        assert config.foreign is not None
        nn.Module.__init__(self)  # not Decoder's: these weights have other owners
        self.config = config
        model = skeleton(json.loads(config.foreign.text), dtype or torch.get_default_dtype())
        self.anatomy = take_apart(model)
        named = {id(weight): name for name, weight in reversed(list(model.named_parameters(remove_duplicate=False)))}
        head_name = next(name for name, module in model.named_modules() if module is self.anatomy.head)
        with torch.device("meta"):
            head, bias = self.anatomy.head.weight, getattr(self.anatomy.head, "bias", None)
            self.head = None if config.tied else nn.Parameter(torch.empty_like(head))  # type: ignore[arg-type]
            self.head_bias = None if bias is None else nn.Parameter(torch.empty_like(bias))
        del self.anatomy.head, self.anatomy.model
        self.embed = self.anatomy.embed  # type: ignore[assignment]
        self.blocks = nn.ModuleList(self.anatomy.layers)
        self.body = self.anatomy.body
        _one_owner_each(self.body)
        for module in self.modules():
            _make_ours(module)
        self.theirs = {name: named[id(weight)] for name, weight in self.named_parameters() if id(weight) in named}
        """The names of weights in transformers' model, by ours."""
        self.theirs |= {"head": f"{head_name}.weight", "head_bias": f"{head_name}.bias"}
        uses = Counter(module for layer in self.blocks for module in layer.modules())
        self.shared = tuple(f"{name}." for name, module in self.named_modules() if uses[module] > 1)
        """The prefixes of weights that several layers use."""
        self._sharing = [any(uses[module] > 1 for module in layer.modules()) for layer in self.blocks]
        self.balance: Any = None
        self.cached = self.anatomy.cache_name is not None
        """Whether text is made with a cache of transformers'."""
        self.unchecked = CHECKS
        """Steps of the cache that are still to be compared with whole rows; see rollout.in_step."""
        self._complete(device, generator)

    # --- what differs from a decoder of ours --------------------------------------------------------------------------

    @property
    def feed(self) -> Any:
        """See Decoder.feed. Buffers go where the weights go."""
        return self._feed

    @feed.setter
    def feed(self, feed: Any) -> None:
        if feed.moves and feed.sink is not None and not feed.recompute:  # theirs keep views of weights that move
            raise UserError(
                f"--keep-activations: the layers of {self.config.family} are transformers' own, and where weights move "
                "they are run again in backward; leave it out."
            )
        self._feed = feed
        if feed.device is not None:
            self._move_buffers(feed.device)

    def _move_buffers(self, device: torch.device) -> None:
        for module in self.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)

    def to_empty(self, *, device: Any, recurse: bool = True) -> "ForeignDecoder":
        """Weights without values. Buffers are computed already and keep theirs."""
        for module in self.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    module._parameters[name] = nn.Parameter(
                        torch.empty_like(weight, device=device), weight.requires_grad
                    )
        self._move_buffers(torch.device(device))
        return self

    def train(self, mode: bool = True) -> "ForeignDecoder":
        """Leaves the layers as they answer: without dropout, as in every decoder of ours."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        return self.feed.device or self.embed.weight.device  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype  # type: ignore[return-value]

    @property
    def head_weight(self) -> Tensor:
        """[V, D], the token table when tied."""
        return self.embed.weight if self.head is None else self.head  # type: ignore[return-value]

    @torch.no_grad()
    def draw(self, name: str, weight: Tensor, generator: torch.Generator | None) -> None:
        if weight.dim() < 2 and not name.endswith("bias"):
            nn.init.ones_(weight)  # norms and gains
        else:
            super().draw(name, weight, generator)

    def _products(self, states: Tensor) -> list[tuple[Tensor, Tensor]]:
        products = super()._products(states)
        if self.head_bias is not None:
            products.append((torch.ones_like(states[..., :1]), self.head_bias[:, None]))
        return products

    def logits(self, hidden: Tensor) -> Tensor:
        if self.head_bias is None:
            return super().logits(hidden)
        with self.feed.visit(*self.reads()):
            return linear(precise(hidden), self.head_weight) + self.head_bias

    # --- the program --------------------------------------------------------------------------------------------------

    def groups(self) -> list[tuple[str, list[str]]]:
        names = [name for name, _ in self.named_parameters()]
        prefix = {module: f"{name}." for name, module in self.named_modules()}
        before = tuple(prefix[module] for module in self.anatomy.before)
        groups: dict[str, list[str]] = {"tokens": ["embed.weight"], "embed": [], "shared": []}
        groups |= {f"blocks.{i}": [] for i in range(len(self.blocks))} | {"last": [], "head": []}
        for name in names:
            if name.startswith("blocks."):
                group = "shared" if name.startswith(self.shared) else ".".join(name.split(".")[:2])
            elif name.startswith("head"):
                group = "head"
            else:
                group = "embed" if name.startswith(before) else "last"
            if name != "embed.weight":
                groups[group].append(name)
        return [(group, members) for group, members in groups.items() if members]

    def reads(self) -> tuple[str, ...]:
        table = ("tokens",) if self.head is None else ()
        return (*table, "head") if self.head is not None or self.head_bias is not None else table

    def parts(self) -> list[Part]:
        blocks = []
        for i, sharing in enumerate(self._sharing):
            groups = (f"blocks.{i}", "shared") if sharing else (f"blocks.{i}",)
            blocks.append(Part(groups, partial(self._layer, i)))
        return [Part(("tokens", "embed"), self._embed), *blocks, Part(("last",), self._behind)]

    def begin(self, tokens: Tensor, cache: Any = None, valid: Tensor | None = None, computed: Any = None) -> Any:
        """Rows are always padded."""
        return Calls(cache)

    def past(self) -> Past | None:
        """For text that is about to be made. None: the model has no cache of transformers', and reads whole rows."""
        return Past() if self.cached else None

    def rows_can_leave(self, past: Past) -> bool:
        """Whether all that is kept of rows lies in a cache whose rows can be chosen, and nothing in modules."""
        from transformers import DynamicCache

        inside = (value for module in self.body.modules() for value in vars(module).values())
        return type(past.cache) is DynamicCache and not any(isinstance(value, Tensor) for value in inside)

    def _run_body(self, context: Calls, replaced: dict[nn.Module, Callable[..., Any]]) -> Any:
        """The base model's forward, some of its modules replaced."""
        options: dict[str, Any] = {"use_cache": context.past is not None}
        if context.past is not None:
            options[str(self.anatomy.cache_name)] = context.past.cache
        with forwards(replaced):
            return self.body(input_ids=context.tokens, **options)

    def _embed(self, tokens: Tensor, context: Calls) -> Tensor:
        """tokens [B, T] -> the states that layer 0 reads; what every layer is called with goes to the context."""
        anatomy, last, noted = self.anatomy, len(self.blocks) - 1, [*self.anatomy.before]
        pieces: list[Tensor] = []
        context.tokens, context.layers, context.carried = tokens, [], []

        def layer(i: int) -> Callable[..., Any]:
            def recorded(*args: Any, **kwargs: Any) -> Any:
                x = arguments_of(anatomy.slot, args, kwargs)
                pieces[:1] = pieces[:1] or [x]
                context.carried.append(
                    {slot: _place(pieces, arguments_of(slot, args, kwargs)) for slot in anatomy.carried}
                )
                for slot in (anatomy.slot, *anatomy.carried):
                    args, kwargs = _with(slot, None, args, kwargs)
                context.layers.append((args, kwargs))
                if i == last:
                    raise Reached
                return wrapped(x, anatomy.style)

            return recorded

        def watched(module: nn.Module) -> Callable[..., Any]:
            forward = module.forward

            def called(*args: Any, **kwargs: Any) -> Tensor:
                y = forward(*args, **kwargs)
                context.outputs[module] = y.shape, y.dtype
                return y

            return called

        layers = {block: layer(i) for i, block in enumerate(self.blocks)}
        with contextlib.suppress(Reached):
            self._run_body(context, layers | {module: watched(module) for module in noted})
        assert len(context.layers) == len(self.blocks), "the base model did not call its last layer"
        if context.past is not None and context.past.cache is None:
            context.past.cache = _cache_in(context.layers[0])
        context.shapes = [piece.shape for piece in pieces] if anatomy.carried else []
        return context.join(pieces)

    def _layer(self, i: int, x: Tensor, context: Calls) -> Tensor:
        args, kwargs = context.layers[i]
        pieces = context.split(x)
        for slot, place in {self.anatomy.slot: 0, **context.carried[i]}.items():
            args, kwargs = _with(slot, pieces[place], args, kwargs)
        y = self.blocks[i](*args, **kwargs)
        if isinstance(y, tuple | list):
            if any(y[1 + other] is not None for other in self.anatomy.handed if 1 + other < len(y)):
                raise UserError(f"{self.config.family}: {MORE_THAN_STATES}; it is not trained here.")
            y = y[0]
        return context.join([y, *pieces[1:]])

    def _behind(self, x: Tensor, context: Calls) -> Tensor:
        """What the base model makes of the last layer's states."""
        states = context.split(x)[0]
        zeros: dict[nn.Module, Callable[..., Any]] = {
            module: partial(_zeros, shape, dtype, states.device) for module, (shape, dtype) in context.outputs.items()
        }
        passed = {block: partial(_constant, wrapped(states, self.anatomy.style)) for block in self.blocks}
        return self._run_body(Calls(tokens=context.tokens), zeros | passed)[0]


def decoder_of(config: DecoderConfig, **options: Any) -> Decoder:
    """A decoder of that config, of ours or of transformers' layers; options as Decoder's."""
    return ForeignDecoder(config, **options) if config.foreign else Decoder(config, **options)


def _constant(value: Any, *_: Any, **__: Any) -> Any:
    return value


def _zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device, *_: Any, **__: Any) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def _with(
    slot: int | str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with this value in a slot."""
    if isinstance(slot, str):
        return args, kwargs | {slot: value}
    return (*args[:slot], value, *args[slot + 1 :]), kwargs


def _cache_in(call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    """transformers' cache among a layer's arguments."""
    from transformers import Cache

    return next((value for value in (*call[0], *call[1].values()) if isinstance(value, Cache)), None)


def _place(pieces: list[Tensor], tensor: Tensor) -> int:
    """Which of the carried tensors this is; a new one joins them."""
    for i, piece in enumerate(pieces):
        if i and piece is tensor:
            return i
    pieces.append(tensor)
    return len(pieces) - 1


def _make_ours(module: nn.Module) -> None:
    """A linear layer of torch becomes one of ours, with the same weights."""
    if type(module) is nn.Linear or (isinstance(module, nn.Linear) and _is_linear(module)):
        module.__class__ = Linear
        module.scales = module.lora = None  # type: ignore[assignment]
        module.exact = False  # type: ignore[assignment]


def _is_linear(module: nn.Linear) -> bool:
    """Whether a subclass (Falcon's) computes what nn.Linear does: tried on small numbers."""
    generator = torch.Generator("cpu").manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator, device="cpu") for shape in ((3, 2), (4, 2), (4,)))
    weights = {"weight": weight} if module.bias is None else {"weight": weight, "bias": bias}
    try:
        result = torch.func.functional_call(module, weights, (x,))
    except Exception:  # of a class that nobody here knows: it stays what it is
        return False
    expected = F.linear(x, **weights)
    return isinstance(result, Tensor) and result.shape == expected.shape and bool(torch.allclose(result, expected))


def _one_owner_each(body: nn.Module) -> None:
    """Modules whose weights are tied become one module. Raises ValueError where a weight has two owners still."""
    owner: dict[int, nn.Module] = {}
    for parent in list(body.modules()):
        for name, child in list(parent.named_children()):
            weights = _ids(child)
            first = owner.get(weights[0], child) if weights else child
            if first is not child and _ids(first) == weights:
                setattr(parent, name, first)
            else:
                owner |= dict.fromkeys(weights, child)
    every = [weight for module in body.modules() for weight in _ids(module)]
    if len(every) != len(set(every)):
        raise ValueError("modules of different kinds share a weight in it")


def _ids(module: nn.Module) -> list[int]:
    return [id(weight) for weight in module.parameters(recurse=False)]
