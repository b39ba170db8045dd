"""How much work a PPO iteration is: floating-point operations, honestly and by the published formula. Pure: no torch.

Honestly: every product that is needed is counted once where the engine does it once. Generating reads keys and values
from its cache; attention is counted over the tokens that are seen; a block that backward runs again counts again; a
head counts for the states that it reads. Norms, activations and softmax are left out, as everybody does.
"""

from dataclasses import dataclass

from penstock.models.config import DecoderConfig
from penstock.models.lora_targets import LoraSpec, lora_targets_of
from penstock.planner import footprint


@dataclass(frozen=True)
class Rows:
    """Rows of equal length. Example: Rows(8, 400, 112)."""

    count: int
    prompt: int
    new: int

    @property
    def length(self) -> int:
        return self.prompt + self.new


def rollout_flops(config: DecoderConfig, rows: Rows) -> float:
    """A prefill, then one token after the other beside a KV cache; one state per token goes through the head."""
    decoding = sum(footprint.flops_of(config, [(1, rows.prompt + i)]) for i in range(1, rows.new))
    prefill = footprint.flops_of(config, [(rows.prompt, rows.prompt)])
    return rows.count * (prefill + decoding + footprint.head_flops(config, rows.new))


def score_flops(config: DecoderConfig, rows: Rows, lora_rank: int = 0) -> float:
    """All four models read whole rows; actor and reference read the head behind the response's states."""
    blocks = 4 * footprint.flops_of(config, [(rows.length, rows.length)]) + 2 * footprint.head_flops(config, rows.new)
    return rows.count * (blocks + 2 * adapter_flops(config, rows.length, lora_rank))


def train_flops(config: DecoderConfig, rows: Rows, *, recompute: bool, lora_rank: int = 0) -> float:
    """One pass of actor and critic over the rows: forward, backward, and forward once more with `recompute`.

    Backward of a product is two: for its input and for its weight; a frozen weight needs the first only. Attention has
    no weights, and each of its two products has two in backward.
    """
    attention = attention_flops(config, rows.length)
    linear = footprint.flops_of(config, [(rows.length, rows.length)]) - attention
    head = footprint.head_flops(config, rows.new)
    adapters = adapter_flops(config, rows.length, lora_rank)
    times = 2 if lora_rank else 3
    once_more = int(recompute)
    model = linear * (times + once_more) + attention * (3 + once_more) + adapters * (3 + once_more)
    return rows.count * (2 * model + times * head)


def attention_flops(config: DecoderConfig, length: int) -> float:
    """Queries with the keys they see, and weights with values: of one row, all layers."""
    return config.num_layers * 4.0 * config.num_heads * config.head_dim * length * (length + 1) / 2


def adapter_flops(config: DecoderConfig, tokens: int, lora_rank: int) -> float:
    """Of one model's adapters, which are at every product but the head's."""
    if not lora_rank:
        return 0.0
    spec = LoraSpec(lora_rank)
    return 2.0 * lora_rank * tokens * sum(t.height + t.width for t in lora_targets_of(config) if spec.wants(t))


def published_experience_flops(parameters: dict[str, int], rows: Rows) -> float:
    """As Colossal-AI's benchmark counted in 2023 (applications/ChatGPT, PerformanceEvaluator): 2 per parameter and
    token, and generating as if each token read the whole row again. For comparison with published tables only.
    """
    generated = (rows.prompt + rows.length - 1) * rows.new / 2
    read = rows.length * sum(parameters.values())
    return 2.0 * rows.count * (parameters["actor"] * generated + read)


def published_train_flops(parameters: dict[str, int], rows: Rows) -> float:
    """The same of one pass over the rows; recomputation was not counted."""
    return 2.0 * 3 * rows.count * rows.length * (parameters["actor"] + parameters["critic"])
