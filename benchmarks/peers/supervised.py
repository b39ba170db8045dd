"""A supervised step of GPT-2 by another library, as one side of a race.

deepspeed   ZeRO-3 with weights and optimizer offloaded to the CPU
fsdp2       PyTorch's FSDP2 with CPU offload, block by block
peft        transformers + peft: adapters on every product but the head
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import transformers
from plain import DTYPES, Optimizer, gpt2, shape_of
from turns import Turns, flags

Step = Callable[[torch.Tensor], object]
"""One step on tokens [B, T], all trained."""


def deepspeed_zero3(options: Any) -> Step:
    """Weights and states on the CPU; torch's AdamW."""
    import deepspeed

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

    def step(tokens: torch.Tensor) -> None:
        engine.backward(engine(tokens, labels=tokens, use_cache=False).loss)
        engine.step()

    return step


def fsdp2_offload(options: Any) -> Step:
    """fp32 weights on the CPU, computing in the dtype."""
    import torch.distributed as dist
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    model = transformers.GPT2LMHeadModel(gpt2(torch.float32, **shape_of(options))).train()
    settings = {
        "mesh": dist.device_mesh.init_device_mesh("cuda" if on_gpu else "cpu", (1,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=DTYPES[options.dtype], reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=on_gpu),
    }
    for module in (*model.transformer.h, model):
        fully_shard(module, **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)

    def step(tokens: torch.Tensor) -> None:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def peft_lora(options: Any) -> Step:
    """Adapters in the dtype of the weights."""
    import peft

    dtype = DTYPES[options.dtype]
    model = transformers.GPT2LMHeadModel(gpt2(dtype, **shape_of(options))).to(dtype)
    config = peft.LoraConfig(
        r=options.rank, lora_alpha=2 * options.rank, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True
    )
    adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=False).train()
    for name, weight in adapted.named_parameters():
        weight.requires_grad_("lora_" in name)
    learning = torch.nn.ParameterList([weight for weight in adapted.parameters() if weight.requires_grad])
    optimizer = Optimizer(learning)
    return lambda tokens: optimizer.update(adapted(tokens, labels=tokens, use_cache=False).loss)


def main() -> None:
    """One side of a race."""
    libraries = {"deepspeed": deepspeed_zero3, "fsdp2": fsdp2_offload, "peft": peft_lora}
    options = flags(__doc__ or "", by=list(libraries))
    turns = Turns()
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({**alone, "MASTER_PORT": str(20000 + os.getpid() % 20000), **os.environ})
    torch.manual_seed(0)
    step = libraries[options.by](options)
    device = "cuda" if torch.cuda.is_available() and options.by != "peft" else "cpu"
    tokens = torch.randint(1, options.vocab, (options.rows, options.prompt + options.new)).to(device)
    turns.take(lambda: step(tokens))


if __name__ == "__main__":
    main()
