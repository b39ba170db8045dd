"""A supervised step under PyTorch's FSDP2 with CPU offload, block by block, as one side of a race."""

import os

import torch
import torch.distributed as dist
import transformers
from plain import DTYPES, gpt2, shape_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from turns import Turns, flags


def main() -> None:
    """One side of a race."""
    options = flags(__doc__ or "")
    turns = Turns()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", str(20000 + os.getpid() % 20000))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(gpt2(torch.float32, **shape_of(options))).train()
    mesh = init_device_mesh(device, (1,))
    settings = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=DTYPES[options.dtype], reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=device == "cuda"),
    }
    for block in model.transformer.h:
        fully_shard(block, **settings)
    fully_shard(model, **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)
    tokens = torch.randint(1, options.vocab, (options.rows, options.prompt + options.new)).to(device)

    def step() -> None:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    turns.take(step)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
