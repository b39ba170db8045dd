"""One step of TRL's GRPO (its newest release), as one side of a race.

Groups of answers to random prompts, KL to a reference in the loss, one update on all of them; no answer ends early,
because the tokenizer's EOS is no token of the model. With `--autocast bf16` weights, gradients and optimizer are fp32
and products are bf16: TRL's default, and how it keeps the master weights that we keep.
"""

import tempfile

import torch
import transformers
from datasets import Dataset
from plain import DTYPES, gpt2, shape_of
from trainer import StepInTurn, tokenizer
from trl import GRPOConfig, GRPOTrainer
from turns import Turns, flags, reward_of

STEPS = 10_000
"""Steps that the trainer is configured for; the race ends before."""


def main() -> None:
    """One side of a race."""
    options = flags(__doc__ or "", autocast=["no", "bf16"], recompute=["no", "yes"])
    turns = Turns()
    torch.manual_seed(0)
    config = gpt2(DTYPES[options.dtype], **shape_of(options), pad_token_id=0)
    config.bos_token_id = config.eos_token_id = None
    prompts = torch.randint(1, options.vocab, (max(options.rows, 64), options.prompt)).tolist()
    with tempfile.TemporaryDirectory() as directory:
        transformers.GPT2LMHeadModel(config).save_pretrained(f"{directory}/model")  # the reference is read from it too
        trainer = GRPOTrainer(
            f"{directory}/model", lambda completion_ids, **_: [reward_of(ids) for ids in completion_ids],
            GRPOConfig(
                output_dir=directory, per_device_train_batch_size=options.micro, num_generations=options.group,
                gradient_accumulation_steps=options.rows // options.micro, max_completion_length=options.new,
                beta=0.04, max_steps=STEPS, learning_rate=1e-6, report_to="none",
                save_strategy="no", logging_strategy="no", use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
                bf16=options.autocast == "bf16", gradient_checkpointing=options.recompute == "yes",
                model_init_kwargs={"dtype": DTYPES[options.dtype]},
            ),
            Dataset.from_list([{"prompt": " ".join(map(str, prompt))} for prompt in prompts]),
            processing_class=tokenizer(options.vocab, eos=options.vocab), callbacks=[StepInTurn(turns)],
        )  # fmt: skip
        trainer.train()


if __name__ == "__main__":
    main()
