"""/v1/score: a reward model's numbers are transformers' own of the same rows, centred and scaled as in training."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers

from penstock.data.toyland import save_tokenizer
from penstock.models.roles import RewardModel
from tests.conftest import PATIENCE, save_tiny
from tests.serve.conftest import TEXTS, eventually, running, save_chatty, worker_of

MEAN, STD = 0.25, 1.5
TALK = [{"role": "user", "content": "What is a weir?"}, {"role": "assistant", "content": "A low dam."}]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A server with a reward model `taste` and a model that chats, `tiny`."""
    directory = tmp_path_factory.mktemp("scored")
    model = RewardModel.from_pretrained(save_tiny(directory / "base", 3, vocab_size=400, max_length=128))
    model.mean, model.std = MEAN, STD
    model.save_pretrained(directory / "taste")
    save_tokenizer(directory / "taste", TEXTS, vocab_size=400)
    with running(directory / "data", str(directory / "taste"), save_chatty(directory / "tiny")) as server:
        yield server


@pytest.fixture(scope="module")
def theirs(scored):
    path = scored.service.catalogue.sources["taste"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)

    def score(prompt, answer):
        """Of texts that are tokenized one by one, as an answer is made, with the end of sequence behind them."""
        texts = [tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, answer)]
        ids = [tokenizer.bos_token_id, *texts[0], *texts[1], tokenizer.eos_token_id]
        with torch.no_grad():
            return (model(torch.tensor([ids])).logits.item() - MEAN) / STD

    return score


def chat(query, document):
    return f"{query}\n", f"{document}\n"  # by the tokenizer's own template


def values(server, **body):
    reply = server.post({"model": "taste", **body}, "/v1/score")
    assert reply.status == 200, reply.body
    assert [(score["index"], score["object"]) for score in reply.json["data"]] == [
        (i, "score") for i in range(len(reply.json["data"]))
    ]
    return [score["score"] for score in reply.json["data"]]


def test_scores_are_transformers_own(scored, theirs):
    query, documents = "What is a weir?", ["A low dam.", "No.", "A low dam across a river, over which water runs."]
    wanted = [theirs(*chat(query, document)) for document in documents]
    assert len({round(score, 3) for score in wanted}) == 3
    assert values(scored, queries=query, documents=documents) == pytest.approx(wanted, abs=1e-4)
    assert values(scored, text_1=query, text_2=documents[1]) == pytest.approx(wanted[1:2], abs=1e-4)
    assert values(scored, queries=[query] * 3, documents=documents) == pytest.approx(wanted, abs=1e-4)
    plain = {"queries": "What is a weir? ", "documents": "A low dam.", "apply_chat_template": False}
    assert values(scored, **plain) == pytest.approx([theirs("What is a weir? ", "A low dam.")], abs=1e-4)


def test_a_conversation_is_scored_at_its_last_turn(scored, theirs):
    assert values(scored, messages=TALK) == pytest.approx([theirs(*chat("What is a weir?", "A low dam."))], abs=1e-4)
    both = values(scored, messages=[TALK, [*TALK[:1], {"role": "assistant", "content": "No."}]])
    assert both == pytest.approx([theirs(*chat("What is a weir?", text)) for text in ("A low dam.", "No.")], abs=1e-4)


def test_the_answer_has_vllms_shape(scored):
    reply = scored.post({"model": "taste", "queries": "hi", "documents": ["a", "b"]}, "/v1/score").json
    assert (reply["object"], reply["model"]) == ("list", "taste")
    assert reply["usage"]["prompt_tokens"] == reply["usage"]["total_tokens"] > 4
    cards = scored.ask("GET", "/v1/models").json["data"]
    assert [(card["id"], card["task"]) for card in cards] == [("taste", "score"), ("tiny", "generate")]


@pytest.mark.parametrize(("change", "status", "param"), [
    ({}, 400, "messages"), ({"queries": "x"}, 400, "messages"), ({"documents": ["x"]}, 400, "messages"),
    ({"queries": "x", "documents": "y", "messages": TALK}, 400, "messages"),
    ({"documents": "y", "messages": TALK}, 400, "messages"),
    ({"queries": "x", "text_1": "z", "documents": "y"}, 400, "text_1"),
    ({"messages": TALK, "apply_chat_template": False}, 400, "apply_chat_template"),
    ({"messages": [{**TALK[0], "tool_calls": [{}]}, TALK[1]]}, 400, "messages[0].tool_calls"),
    ({"messages": [TALK, [{**TALK[0], "audio": {}}, TALK[1]]]}, 400, "messages[1][0].audio"),
    ({"queries": ["x", "y"], "documents": ["a", "b", "c"]}, 400, "queries"), ({"queries": []}, 400, "queries"),
    ({"messages": TALK[:1]}, 400, "messages"), ({"messages": TALK[:1] * 2}, 400, "messages[1]"),
    ({"queries": "x", "documents": ["a"] * 257}, 400, "documents"),
    ({"queries": "x", "documents": ["a", "word " * 130]}, 400, "documents[1]"),
    ({"queries": "x", "documents": "y", "truncate_prompt_tokens": 5}, 400, "truncate_prompt_tokens"),
    ({"queries": "x", "documents": "y", "model": "none"}, 404, "model"),
    ({"queries": "x", "documents": "y", "model": "tiny"}, 400, "model"),
])  # fmt: skip
def test_what_cannot_be_scored_is_refused_by_name(scored, change, status, param):
    reply = scored.post({"model": "taste", **change}, "/v1/score")
    assert (reply.status, reply.error["param"]) == (status, param)


def test_the_end_of_a_server_waits_for_scores(scored, tmp_path, monkeypatch):
    with ThreadPoolExecutor(1) as pool:
        with running(tmp_path, scored.service.catalogue.sources["taste"]) as server:
            reward, begun = server.service.catalogue.models["taste"], threading.Event()
            worker = worker_of(reward)
            score = worker.score

            def late(number, rows):
                begun.set()
                assert eventually(lambda: server.service.draining)
                return score(number, rows)

            worker.score = late
            monkeypatch.setattr(reward, "parts", lambda rows: [slice(i, i + 1) for i in range(len(rows))])
            body = {"model": "taste", "queries": "hi", "documents": ["a", "b"]}
            reply = pool.submit(server.post, body, "/v1/score")
            assert begun.wait(PATIENCE)
        assert reply.result().status == 200


def test_a_reward_model_does_not_chat(scored):
    reply = scored.post({"model": "taste", "messages": TALK[:1]})
    assert (reply.status, reply.error["code"]) == (400, "model_not_supported")
    assert "/v1/score" in reply.error["message"]
