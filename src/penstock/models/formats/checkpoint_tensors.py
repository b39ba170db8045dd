"""A decoder's weights as the tensors of a Hugging Face checkpoint: their entries, and in that order their values."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from penstock.models.decoder import Decoder
from penstock.models.families import weights_of
from penstock.models.families.weights import Weight
from penstock.models.safetensors_writer import Entry

CLASSIFIER_HEAD = "score.weight"


def entries(decoder: Decoder, family: Any, score: Tensor | None) -> Iterator[Entry]:
    """The tensors of a checkpoint; with a score head, no language-model head."""
    if score is not None:
        yield Entry(CLASSIFIER_HEAD, score.dtype, tuple(score.shape))
    for weight in _saved(decoder, family, score):
        ours = torch.empty_like(decoder.get_parameter(weight.ours), device="meta", dtype=decoder.feed.dtype)
        for name, tensor in weight.write(ours, decoder.config).items():
            if not weight.expert:  # the first expert's stands for all
                yield Entry(name, tensor.dtype, weight.stored_shape(tuple(tensor.shape), decoder.config))


def tensors(decoder: Decoder, family: Any, score: Tensor | None) -> Iterator[Tensor]:
    """The tensors of `entries`, on the CPU."""
    if score is not None:
        yield score.detach().cpu()
    group_of = {name: group for group, names in decoder.groups() for name in names}
    experts: list[Tensor] = []  # each with its part of one tensor
    for weight in _saved(decoder, family, score):
        with decoder.feed.visit(group_of[weight.ours]):
            ours = decoder.get_parameter(weight.ours).detach()
            # copies on the CPU, which outlive the visit
            theirs = [
                tensor.clone(memory_format=torch.contiguous_format).cpu()
                for tensor in weight.write(ours, decoder.config).values()
            ]
        experts += theirs if weight.expert is not None else []
        if weight.expert is None:
            yield from theirs
        elif len(experts) == decoder.config.num_experts:
            yield torch.cat(experts)
            experts.clear()


def _saved(decoder: Decoder, family: Any, score: Tensor | None) -> Iterator[Weight]:
    heads = {"head", "head_bias"} if score is not None else set()
    parameters = {name for name, _ in decoder.named_parameters()} - heads
    return (weight for weight in weights_of(family, decoder.config) if weight.ours in parameters)
