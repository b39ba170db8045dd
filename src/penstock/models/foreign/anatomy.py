"""Takes a model of transformers apart: embedding, layers, last norm, head, and how the base model calls its layers.

Nothing is known of an architecture. Its base model's forward runs once, with its layers replaced by recorders, and what
they see says where the states go in and come out, which modules run before and behind the layers, and what becomes of
the logits. Where that is not a chain of layers, NoChain says why.
"""

import contextlib
import inspect
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

ROWS, LENGTH = 2, 5
"""Of the tokens that a model is asked with."""
STYLES = (0, 1, 2, 3)
"""What a layer returns: the states alone, or a tuple of so many that begins with them."""
MORE_THAN_STATES = "its layers hand each other more than states"


class NoChain(ValueError):
    """A model that cannot be taken apart, and why."""


class Reached(Exception):
    """The last layer has been called: what follows is not computed."""


@dataclass
class Anatomy:
    """A model of transformers in parts."""

    model: Any
    body: Any
    """The base model: all but the head."""
    layers: list[nn.Module]
    embed: nn.Module
    """The token table, `weight` [V, D]."""
    head: nn.Module
    """`weight` [V, D], and perhaps `bias` [V]."""
    slot: int | str = 0
    """Where the states are among a layer's arguments."""
    style: int = 0
    """See STYLES."""
    before: list[nn.Module] = field(default_factory=list)
    """Modules with weights that run before the first layer."""
    carried: tuple[int | str, ...] = ()
    """Other arguments of layers that are computed from the embedding's weights (Zamba: the embeddings themselves)."""
    handed: tuple[int, ...] = ()
    """Which others of a layer's outputs the next layer is called with: they must be None. The first layer's are, see
    `_check_handed`."""
    state_scale: float = 1.0
    logit_scale: float = 1.0
    """What states and logits are multiplied by, at the head."""
    logit_cap: float = 0.0
    """Logits become cap * tanh(logits / cap); 0: they do not."""

    @property
    def cache_name(self) -> str | None:
        """The base model's argument for a cache. None: it has none that transformers' Cache fits."""
        names = inspect.signature(self.body.forward).parameters
        return next((name for name in ("past_key_values", "cache_params") if name in names), None)


@contextlib.contextmanager
def forwards(replaced: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, these modules run these functions, without hooks: FSDP2's gather the weights of a layer."""
    for module, function in replaced.items():
        module.__dict__["forward"] = module.__dict__["_compiled_call_impl"] = function
    try:
        yield
    finally:
        for module in replaced:
            module.__dict__.pop("forward", None)
            module.__dict__.pop("_compiled_call_impl", None)


def take_apart(model: Any) -> Anatomy:
    """The parts of a causal language model on `meta`. Raises ValueError where they do not form a chain."""
    body, head = model.base_model, model.get_output_embeddings()
    if body is model:  # in some, base_model_prefix is another name
        body = next((child for child in model.children() if hasattr(child, "get_input_embeddings")), model)
    if body is model or getattr(head, "weight", None) is None:
        raise NoChain("it has no base model with a head on top")
    layers = _layers(body)
    embed = body.get_input_embeddings()
    if getattr(embed, "weight", None) is None:
        raise NoChain("its token embedding is no table of weights")
    anatomy = Anatomy(model, body, layers, embed, head)
    outside = [module for module in body.modules() if module not in _inside(layers) and _own(module)]
    with torch.device("cpu"), _zeros(outside):  # a model that is made on `meta` is asked with real tokens
        _learn_calls(anatomy, outside)
        _learn_head(anatomy)
    return anatomy


def _layers(body: nn.Module) -> list[nn.Module]:
    """The list of modules with most weights."""
    lists = [module for module in body.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise NoChain("it has no list of layers")
    count = max(lists, key=lambda each: sum(weight.numel() for weight in each.parameters()))
    return list(count)


def _inside(layers: Sequence[nn.Module]) -> set[nn.Module]:
    return {module for layer in layers for module in layer.modules()}


def _own(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters(recurse=False)]


@contextlib.contextmanager
def _zeros(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, the weights of these modules are zeros on the CPU, whose pages are not touched."""
    kept = [(module, name, getattr(module, name)) for module in modules for name in _own(module)]
    for module, name, weight in kept:
        setattr(module, name, nn.Parameter(torch.zeros(weight.shape, dtype=weight.dtype, device="cpu")))
    try:
        yield
    finally:
        for module, name, weight in kept:
            setattr(module, name, weight)


def arguments_of(slot: int | str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The states among a layer's arguments."""
    return kwargs.get(slot) if isinstance(slot, str) else args[slot] if slot < len(args) else None


def wrapped(states: Tensor, style: int, others: Sequence[Any] = (None,) * max(STYLES)) -> Any:
    """As a layer returns it; see STYLES."""
    return (states, *others[: style - 1]) if style else states


def _learn_calls(anatomy: Anatomy, outside: Sequence[nn.Module]) -> None:
    """Runs the base model with layers that record, in each style until the states arrive where they should."""
    errors = []
    for style in STYLES:
        try:
            _record(anatomy, outside, style)
            return
        except NoChain:
            raise
        except Exception as error:  # transformers' own code, given a layer's output in the wrong style
            errors.append(f"{type(error).__name__}: {error}")
    raise NoChain(f"its layers are not a chain of states: {errors[0]}")


def _record(anatomy: Anatomy, outside: Sequence[nn.Module], style: int) -> None:
    calls: list[tuple[int, tuple[Any, ...], dict[str, Any]]] = []
    markers: list[Tensor] = []
    order: list[nn.Module | None] = []  # None: the layers
    others = [object() for _ in range(max(STYLES))]

    def layer(i: int) -> Callable[..., Any]:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            calls.append((i, args, kwargs))
            if i == 0:
                anatomy.slot = _slot(args, kwargs)
                order.append(None)
            states = arguments_of(anatomy.slot, args, kwargs)
            markers.append(torch.zeros_like(states))
            return wrapped(markers[-1], style, others)

        return recorded

    def module(each: nn.Module) -> Callable[..., Any]:
        forward = each.forward

        def called(*args: Any, **kwargs: Any) -> Any:
            order.append(each)
            return forward(*args, **kwargs)

        return called

    tokens = torch.zeros(ROWS, LENGTH, dtype=torch.int64, device="cpu")
    recorders = {each: layer(i) for i, each in enumerate(anatomy.layers)}
    watched = {each: module(each) for each in outside if each is not anatomy.body}
    with torch.enable_grad(), forwards({**recorders, **watched}):
        anatomy.body(input_ids=tokens, use_cache=False)
    if [i for i, _, _ in calls] != list(range(len(anatomy.layers))):
        raise NoChain("it does not run each of its layers once, in their order")
    for marker, (_, args, kwargs) in zip(markers, calls[1:], strict=False):
        if arguments_of(anatomy.slot, args, kwargs) is not marker:
            raise TypeError("states change between layers")
    anatomy.style = style
    cut = order.index(None)
    anatomy.before = [each for each in order[:cut] if each is not None]
    if anatomy.body in outside or set(outside) - set(order):
        raise NoChain("it has weights outside its layers that no module of its own uses")
    if set(anatomy.before) & set(order[cut:]):
        raise NoChain("a module runs before its layers and again behind or between them")
    slots = {slot for _, args, kwargs in calls for slot in _learned(anatomy.slot, args, kwargs)}
    anatomy.carried = tuple(sorted(slots, key=str))
    anatomy.handed = tuple(
        i for i in range(len(others)) if any(value is others[i] for _, a, k in calls for value in (*a, *k.values()))
    )
    if anatomy.handed:
        _check_handed(anatomy, *calls[0][1:])
    values = [value for _, args, kwargs in calls for value in (*args, *kwargs.values())]
    if any(isinstance(value, dict | list | UserDict) and not value for value in values):
        raise NoChain("its layers share a place in which they leave each other tensors")


def _check_handed(anatomy: Anatomy, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Runs the first layer, of zeros. RWKV's hands the next one None where text is read whole; GLM-MoE-DSA's hands it
    the tokens that attention sees."""
    layer = anatomy.layers[0]
    with torch.no_grad(), _zeros(list(layer.modules())):
        others = layer(*args, **kwargs)[1:]
    if any(others[i] is not None for i in anatomy.handed if i < len(others)):
        raise NoChain(MORE_THAN_STATES)


def _learned(slot: int | str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int | str]:
    """The slots of other arguments than the states that have a gradient."""
    numbered: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    every = [(i, value) for i, value in numbered if i != slot]
    slots = [i for i, value in every if isinstance(value, Tensor) and value.requires_grad]
    leaves = pytree.tree_leaves([value for i, value in every if i not in slots])
    if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
        raise NoChain("its layers read tensors, inside other arguments, that are computed from the embedding")
    return slots


def _slot(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str:
    """The first floating tensor."""
    every: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for i, value in every:
        if isinstance(value, Tensor) and value.is_floating_point():
            return i
    raise TypeError("a layer is called without states")


class _States(tuple):
    """What a base model returns: its states, and nothing else that is asked for."""

    def __getattr__(self, name: str) -> Any:
        return self[0] if name == "last_hidden_state" else None


def _learn_head(anatomy: Anatomy) -> None:
    """What the model does between its last states and its logits, from numbers that go through it."""
    seen: list[Tensor] = []
    generator = torch.Generator("cpu").manual_seed(0)
    weight: Tensor = anatomy.head.weight  # type: ignore[assignment]
    states = torch.randn(1, LENGTH, weight.shape[1], generator=generator, device="cpu").to(weight.dtype)
    grid = torch.linspace(-20, 20, LENGTH * len(weight), device="cpu").view(1, LENGTH, -1).to(weight.dtype)
    outputs = []
    for logits in (grid, torch.full_like(grid, 1e4)):

        def head(x: Tensor, logits: Tensor = logits) -> Tensor:
            seen.append(x)
            return logits.clone()

        with torch.no_grad(), forwards({anatomy.body: lambda *_, **__: _States((states,)), anatomy.head: head}):
            tokens = torch.zeros(1, LENGTH, dtype=torch.int64, device="cpu")
            outputs.append(anatomy.model(input_ids=tokens, use_cache=False).logits.float())
    anatomy.state_scale = _factor(states.float(), seen[0].float(), "its last states", weight.dtype)
    high = float(outputs[1].flatten()[0])
    capped = high * torch.tanh(grid.float() / high) if high else grid.float()
    if _near(outputs[0], capped, weight.dtype) and not _near(outputs[0], grid.float(), weight.dtype):
        anatomy.logit_cap = high
        return
    anatomy.logit_scale = _factor(grid.float(), outputs[0], "its logits", weight.dtype)


def _factor(before: Tensor, after: Tensor, what: str, dtype: torch.dtype) -> float:
    """What `before` was multiplied by."""
    if before.shape == after.shape:
        factor = float((before * after).double().sum() / before.double().square().sum())
        factor = 1.0 if abs(factor - 1) < 1e-3 else factor
        if _near(before * factor, after, dtype):
            return factor
    raise NoChain(f"{what} are changed in another way than by a factor or a soft cap")


def _near(x: Tensor, y: Tensor, dtype: torch.dtype) -> bool:
    return torch.allclose(x, y, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5)
