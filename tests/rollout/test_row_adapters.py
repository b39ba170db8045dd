"""Several adapters on one base, each for some rows of a batch: every row is as with its adapter alone, by peft too."""

import peft
import pytest
import torch
import transformers

from penstock.errors import UserError
from penstock.models.adapter_files import AdapterFile, read_spec
from penstock.models.lora_targets import LoraSpec
from penstock.models.roles import Actor
from penstock.models.surgery import add_adapters_by_row
from penstock.rollout import engine as engines
from penstock.rollout.engine import Engine
from penstock.rollout.prompt_logprobs import prompt_logprobs
from penstock.rollout.sampling import Sampling
from tests.models.test_families import reference
from tests.models.test_lora import all_random

LLAMA = "llama, grouped queries"
PAIRS = {
    "gpt2": (LoraSpec(3, 9.0, ("c_attn", "c_fc")), LoraSpec(5, 9.0, ("c_proj", "lm_head"))),
    LLAMA: (LoraSpec(4), LoraSpec(8, 10.0, ("v_proj", "lm_head"), rslora=True)),
    "bloom, 4 heads": (LoraSpec(2, targets=("query_key_value",)), LoraSpec(4, targets=("dense",))),
    "gpt_neox": (LoraSpec(4), LoraSpec(2)),
}


def save_pair(name, directory):
    """A base and two adapters for it. Returns the base's address and the adapters' directories."""
    reference(name).save_pretrained(directory / "base")
    base, places = str(directory / "base"), [directory / "adapter0", directory / "adapter1"]
    for i, place in enumerate(places):
        actor = Actor.from_pretrained(base, lora=PAIRS[name][i], seed=i)
        all_random(actor.decoder)
        actor.save_pretrained(place)
    return base, places


def with_rows(base, places, dtype="fp32"):
    decoder = engines.load(base, dtype, "cpu")[1].decoder
    add_adapters_by_row(decoder, [(read_spec(place)[0], AdapterFile(place)) for place in places], base=base)
    return decoder


@pytest.mark.parametrize("name", PAIRS)
def test_each_row_of_a_batch_is_what_peft_computes_with_its_adapter(name, tmp_path):
    base, places = save_pair(name, tmp_path)
    decoder, plain = with_rows(base, places), transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    tokens = torch.randint(90, (6, 7), generator=torch.Generator().manual_seed(1))
    rows = [1, None, 0, 0, 1, None]
    with torch.no_grad():
        theirs = {None: plain(tokens).logits}
        for i, place in enumerate(places):
            one = transformers.AutoModelForCausalLM.from_pretrained(base)
            theirs[i] = peft.PeftModel.from_pretrained(one, place).eval()(tokens).logits
        decoder.row_adapters.choose(rows, decoder.device)
        ours = decoder.logits(decoder(tokens))
    assert min((theirs[0] - theirs[1]).abs().max(), (theirs[0] - theirs[None]).abs().max()) > 0.05
    for i, row in enumerate(rows):
        assert (ours[i] - theirs[row][i]).abs().max() <= 2e-5 * theirs[row].abs().max()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_answers_in_one_batch_are_those_of_each_adapter_alone(tmp_path, dtype):
    base, places = save_pair(LLAMA, tmp_path)
    decoder = with_rows(base, places, dtype)
    prompts = [[1, 5, 9], [7], [3, 3, 3, 8, 20], [1, 5, 9], [40, 41], [7, 8, 9, 10]]
    rows, sampling = [0, 1, None, 1, 0, 0], Sampling(max_new_tokens=12, seed=4)

    def answers(which, size=3):  # fewer rows than requests: rows come, move and leave
        engine = Engine(decoder, eos_ids=[2], rows=size)
        made = [engine.submit(prompts[i], sampling, adapter=rows[i], episodes=[i])[0] for i in which]
        engine.run()
        return [answer.response_ids for answer in made]

    together = answers(range(6))
    assert together == [answers([i])[0] for i in range(6)] == answers(range(6), 6)
    assert together[0] != together[3], "the same prompt with another adapter"
    if dtype != "fp32":
        return
    for i, row in enumerate(rows):  # and of the adapter merged into the base
        source = str(places[row]) if row is not None else None
        merged = engines.load(base, dtype, "cpu", adapter=source)[1].decoder
        engine = Engine(merged, eos_ids=[2])
        (answer,) = engine.submit(prompts[i], sampling, episodes=[i])
        engine.run()
        assert answer.response_ids == together[i]
        scored = prompt_logprobs(decoder, [prompts[i]], 2, row)
        wanted = prompt_logprobs(merged, [prompts[i]], 2)
        assert [token[0] for token in scored[0][1:]] == pytest.approx([token[0] for token in wanted[0][1:]], abs=1e-4)


def test_answers_of_one_prompt_share_their_row_only_with_the_same_adapter(tmp_path):
    base, places = save_pair("gpt2", tmp_path)
    engine = Engine(with_rows(base, places), eos_ids=[], rows=8)
    for adapter in (0, 1, None):
        engine.submit([5, 6, 7], Sampling(n=2, max_new_tokens=3), adapter=adapter)
    engine.run()
    assert engine.prompts_read == 3


@pytest.mark.parametrize(("name", "settings", "says"), [
    (LLAMA, {"target_modules": ["embed_tokens"]}, "the token table"),
    (LLAMA, {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}, "weights of the model's own"),
    ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}, "weights of the model's own"),
    ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}, "experts"),
])  # fmt: skip
def test_what_cannot_differ_from_row_to_row_is_refused(name, settings, says, tmp_path):
    theirs = reference(name)
    theirs.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    peft.get_peft_model(theirs, config).save_pretrained(tmp_path / "adapter0")
    base, places = str(tmp_path / "base"), [tmp_path / "adapter0"]
    with pytest.raises(UserError, match=f"adapter0: has .*{says}.*--merge"):
        with_rows(base, places)


def test_an_adapter_of_another_base_is_refused_here_too(tmp_path):
    _, places = save_pair(LLAMA, tmp_path / "one")
    other = reference(LLAMA)
    with torch.no_grad():
        other.lm_head.weight += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="trained on another base"):
        with_rows(str(tmp_path / "other"), places)
