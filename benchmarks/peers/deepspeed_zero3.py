"""A supervised step under DeepSpeed ZeRO-3 with weights and optimizer offloaded to the CPU, as one side of a race."""

import os

import deepspeed
import torch
import transformers
from plain import DTYPES, gpt2, shape_of
from turns import Turns, flags


def main() -> None:
    """One side of a race."""
    options = flags(__doc__ or "")
    turns = Turns()
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", str(20000 + os.getpid() % 20000))
    torch.manual_seed(0)
    offload = {"device": "cpu", "pin_memory": False}
    model = transformers.GPT2LMHeadModel(gpt2(DTYPES[options.dtype], **shape_of(options)))
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": options.rows, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
            "bf16": {"enabled": options.dtype == "bf16"}, "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}},
            "zero_optimization": {"stage": 3, "offload_param": offload, "offload_optimizer": offload},
        },
    )  # fmt: skip
    tokens = torch.randint(1, options.vocab, (options.rows, options.prompt + options.new)).to(engine.device)

    def step() -> None:
        engine.backward(engine(tokens, labels=tokens, use_cache=False).loss)
        engine.step()

    turns.take(step)


if __name__ == "__main__":
    main()
