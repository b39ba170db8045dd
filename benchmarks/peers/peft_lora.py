"""A supervised step through adapters by transformers + peft: every product but the head, as one side of a race."""

import peft
import torch
import transformers
from plain import DTYPES, Optimizer, gpt2, shape_of
from turns import Turns, flags


def main() -> None:
    """One side of a race."""
    options = flags(__doc__ or "")
    turns = Turns()
    torch.manual_seed(0)
    dtype = DTYPES[options.dtype]
    model = transformers.GPT2LMHeadModel(gpt2(dtype, **shape_of(options))).to(dtype)
    config = peft.LoraConfig(
        r=options.rank, lora_alpha=2 * options.rank, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True
    )
    adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=False).train()
    adapted.requires_grad_(False)
    for name, weight in adapted.named_parameters():
        weight.requires_grad_("lora_" in name)
    learning = torch.nn.ParameterList([weight for weight in adapted.parameters() if weight.requires_grad])
    optimizer = Optimizer(learning)
    tokens = torch.randint(1, options.vocab, (options.rows, options.prompt + options.new))
    turns.take(lambda: optimizer.update(adapted(tokens, labels=tokens, use_cache=False).loss))


if __name__ == "__main__":
    main()
