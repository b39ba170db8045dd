"""A served model ends its answers where the template, the tokenizer and both configs say, and reads text as trained."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from penstock.data.records import Prompt
from penstock.errors import UserError
from penstock.serve.config import ServeConfig
from penstock.serve.models import catalogue
from penstock.serve.models.catalogue import Catalogue
from tests.conftest import CHATML
from tests.serve.conftest import eventually, paused, running, save_chatty, worker_of
from tests.serve.test_server import write_checkpoint


def served_model(directory):
    """The model of a server."""
    with running(directory / "data", f"model={directory}") as server:
        return server.service.catalogue.models["model"]


def test_a_served_model_ends_at_every_end_and_says_so(make_tokenizer, tiny_model, capsys):
    directory = make_tokenizer(template=CHATML)
    tiny_model("model", vocab_size=320, hf={"eos_token_id": 1})
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    model = served_model(directory)
    assert set(model.encoder.eos_ids) == {1, 2, 3}
    assert "an answer ends at <eos> (tokenizer, config) or <|im_end|> (chat template) or <|im_start|> (config)" in (
        capsys.readouterr().err
    )


def test_a_model_that_cannot_be_served_leaves_the_worker(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    write_checkpoint(run, 1, seed=0)
    with running(tmp_path / "data", str(run), follow=True) as server:
        models = worker_of(server.service.catalogue.models["run"]).models
        read = []

        def removed(path):
            read.append(len(models))
            raise FileNotFoundError(path)

        monkeypatch.setattr(catalogue, "fingerprint", removed)
        write_checkpoint(run, 2, seed=7)
        assert eventually(lambda: read)
        assert read == [2]
        assert eventually(lambda: len(models) == 1)
        assert server.post({"model": "run", "prompt": [1, 40], "max_tokens": 3}, "/v1/completions").status == 200


def test_a_served_model_without_any_end_answers_to_the_limit(make_tokenizer, tiny_model, capsys):
    directory = make_tokenizer(eos_token=None, extra_special_tokens=["<think>"])
    tiny_model("model", vocab_size=330, hf={})
    model = served_model(directory)
    assert not model.encoder.eos_ids
    assert "names no token that ends an answer, so all go on to their limit" in capsys.readouterr().err
    ids = model.encoder.tokenizer("<bos><think>Hm").input_ids
    assert model.decode(ids) == "<think>Hm"


def test_requests_with_arguments_of_their_own_may_come_at_once(make_tokenizer, tiny_model):
    class Crowded(dict):
        """Other threads' requests push out at once what one has kept."""

        def __setitem__(self, key, value):
            super().__setitem__(key, value)
            self.clear()

    directory = make_tokenizer(template="{% if brief %}Be brief. {% endif %}" + CHATML, eos_token="<|im_end|>")
    tiny_model("model", vocab_size=320, hf={})
    model = served_model(directory)
    model._encoders = Crowded()
    prompt = Prompt(messages=({"role": "user", "content": "hi"},), where="messages")
    told = model.encoder_with({"brief": True}).encode_prompt(prompt)
    assert told[-len(model.encoder.encode_prompt(prompt)) :] == model.encoder.encode_prompt(prompt) != told


def save_adapter(base, directory, seed, **settings):
    """An adapter of peft's that adds something."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", target_modules=["c_attn"], **settings)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(directory)
    return str(directory)


def test_adapters_answer_by_name_in_one_batch_each_as_alone(tmp_path):
    base = save_chatty(tmp_path / "base")
    adapters = [save_adapter(base, tmp_path / name, i, r=4 + i) for i, name in enumerate(("left", "right.v2"))]
    (tmp_path / "left" / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    names = ["base", "left", "right.v2"]
    with running(tmp_path / "data", base, lora_modules=(adapters[0], f"right.v2={adapters[1]}"), rows=6) as server:
        cards = server.ask("GET", "/v1/models").json["data"]
        assert [card["id"] for card in cards] == names
        ask = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 12, "seed": 1, "min_tokens": 12}

        def texts(run):
            replies = list(run(lambda name: server.post({**ask, "model": name}), names * 2))
            assert {reply.status for reply in replies} == {200}
            return [reply.json["choices"][0]["message"]["content"] for reply in replies]

        alone = texts(map)
        assert len(set(alone)) == 3
        model, scheduler = server.service.catalogue.models["base"], server.service.scheduler
        before = scheduler.steps
        arrived = threading.Event()

        def all_arrived():
            if scheduler.outstanding == 6:
                arrived.set()
            return arrived.is_set()

        with paused(model, all_arrived, after=1), ThreadPoolExecutor(6) as pool:
            assert texts(pool.map) == alone
        assert scheduler.steps - before <= 2 * 12, "six answers of twelve tokens were made one after the other"
        ends = {name: model.encoder.eos_ids for name, model in server.service.catalogue.models.items()}
        assert ends == {"base": (2,), "left": (2, 0), "right.v2": (2,)}
        prints = {server.post({**ask, "model": name}).json["system_fingerprint"] for name in names}
        assert len(prints) == 3


@pytest.mark.parametrize(("flags", "says"), [
    ({"model": ("a=x", "b=y"), "lora_modules": ("c=z",)}, "adapters of one model"),
    ({"model": ("a=x",), "lora_modules": ("c=z",), "follow": True}, "without --follow"),
    ({"model": ("a=x",), "lora_modules": ("a=z",)}, "a is the model's own name"),
    ({"model": ("a=x",), "lora_modules": ("c=z", "c=w")}, "--lora-modules c=w: there is a model named c"),
])  # fmt: skip
def test_adapters_that_cannot_be_served_are_refused_at_once(flags, says):
    with pytest.raises(UserError, match=says):
        Catalogue(ServeConfig(**flags))
