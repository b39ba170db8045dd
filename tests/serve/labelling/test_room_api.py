"""The room over HTTP: import, labelling by several people, figures, exports that training and Argilla read."""

import itertools
import json
import threading
from collections import Counter

import pytest

from penstock.data.formats import read
from penstock.serve.labelling import label_studio
from penstock.serve.labelling.export import ARRAYS, EXPORTS
from tests.conftest import cli
from tests.serve.conftest import eventually, running, save_chatty
from tests.serve.labelling.conftest import ranked, skipped
from tests.serve.labelling.test_access import hire


@pytest.fixture
def room(tmp_path):
    with running(tmp_path / "data", save_chatty(tmp_path / "tiny"), save_chatty(tmp_path / "other", seed=1)) as server:
        yield server


@pytest.fixture(scope="module")
def empty_room(tmp_path_factory):
    """For requests that change nothing."""
    with running(
        tmp_path_factory.mktemp("room") / "data", save_chatty(tmp_path_factory.mktemp("m") / "tiny")
    ) as server:
        yield server


def add(server, *items, **options):
    reply = server.ask("POST", "/api/labelling/items", {"items": list(items), **options})
    assert reply.status == 201, reply.body
    return reply.json


def following(server, key):
    return server.ask("POST", "/api/label/next", key=key).json["item"]


def judge(server, key, item, judgement):
    return server.ask("POST", f"/api/label/items/{item['id']}", judgement, key=key)


def label_all(server, key, by):
    """Ranks until nothing is left; returns the items."""
    items = []
    while item := following(server, key):
        reply = judge(server, key, item, ranked(item, by))
        assert reply.status == 200, reply.body
        items.append(item)
    return items


def exported(server, what):
    reply = server.ask("GET", f"/api/labelling/export?what={what}")
    assert reply.status == 200
    return json.loads(reply.body) if what in ARRAYS else [json.loads(line) for line in reply.body.splitlines()]


QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a weir?"}]
WEIR = {"prompt": QUESTION, "responses": ["A low dam.", "A fish.", "A dam across a river."], "id": "weir"}


# --- in and out -------------------------------------------------------------------------------------------------------
def test_what_goes_in_is_ranked_and_comes_out_for_training(room, tmp_path):
    add(room, WEIR, {"prompt": "plain text", "chosen": "a", "rejected": "b"})
    token = hire(room, "ada")["token"]
    item = following(room, token)
    assert item["prompt"] == QUESTION
    assert sorted(item["answers"]) == sorted(WEIR["responses"])
    places = {"A dam across a river.": 0, "A low dam.": 0, "A fish.": 1}
    fish = str(item["answers"].index("A fish."))
    judgement = ranked(item, places.get, edits={fish: "A dam, not a fish."}, note="nice")
    assert judge(room, token, item, judgement).json == {"done": 1, "left": 1}
    label_all(room, token, lambda text: text)
    lines = exported(room, "rankings")
    (tmp_path / "rankings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, edited, plain = read(str(tmp_path / "rankings.jsonl"), "comparisons").records
    assert (first.messages, first.responses, first.ranks) == (tuple(QUESTION), tuple(WEIR["responses"]), (0, 1, 0))
    assert (edited.responses, edited.ranks) == (("A dam, not a fish.", "A fish."), (0, 1))
    assert (plain.prompt, plain.responses, plain.ranks) == ("plain text", ("a", "b"), (0, 1))
    assert {line["labeller"] for line in lines} == {"ada"}
    assert lines[0]["source_id"] == "weir"
    (tmp_path / "rewritten.jsonl").write_text("".join(json.dumps(line) + "\n" for line in exported(room, "rewritten")))
    (taught,) = read(str(tmp_path / "rewritten.jsonl"), "demonstrations").records
    assert taught.messages == (*QUESTION, {"role": "assistant", "content": "A dam, not a fish."})


def test_what_was_flagged_is_not_learned(room, tmp_path):
    add(room, WEIR, {**WEIR, "responses": ["x", "y"]})
    for flag in ("harmful", None):
        token = hire(room, "ada")["token"]
        item = following(room, token)
        assert judge(room, token, item, ranked(item, str, flag=flag)).status == 200
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in exported(room, "rankings")))
    data = read(str(tmp_path / "r.jsonl"), "comparisons")
    assert [record.responses for record in data.records] == [("x", "y")]
    assert "1 with weight 0 left out" in data.decision


def test_the_same_import_again_adds_nothing(room):
    assert add(room, WEIR, {**WEIR, "id": "other"}) == {"added": 1, "known": 1}
    assert add(room, WEIR) == {"added": 0, "known": 1}
    assert add(room, {**WEIR, "ranking": [0, 1, 2]}, gold=True) == {"added": 1, "known": 0}


@pytest.mark.parametrize(("item", "param"), [
    ({"prompt": "x", "responses": ["a"]}, "responses"),
    ({"prompt": "x", "responses": ["a", "a"]}, "responses"),
    ({"prompt": "x", "responses": [str(i) for i in range(10)]}, "responses"),
    ({"prompt": "x", "responses": ["a", ""]}, "responses[1]"),
    ({"prompt": "x", "responses": "ab"}, "responses"),
    ({"prompt": ["x"], "responses": ["a", "b"]}, "prompt[0]"),
    ({"prompt": "x"}, "responses"),
    ({"text": "x"}, "fields"),
    ({}, "fields"),
    ({"prompt_ids": [1], "response_ids": [[1], [2]], "ranking": [0, 1]}, "prompt_ids"),
    ({"prompt": QUESTION, "responses": ["a", "b"], "tools": [{"name": "f"}]}, "tools"),
    ({"fields": {"a": "b"}}, "fields"),
    ({"fields": {"prompt": "b"}}, "responses"),
    ({"fields": {"prompt": "b", "response_1": "a", "response_2": 3}}, "responses[1]"),
])  # fmt: skip
def test_an_object_that_is_no_item_is_named_and_nothing_is_added(empty_room, item, param):
    reply = empty_room.ask("POST", "/api/labelling/items", {"items": [WEIR, item]})
    assert reply.status == 400
    assert reply.error["param"] == f"items[1].{param}"
    assert empty_room.ask("GET", "/api/labelling").json["items"] == 0


def test_gold_items_need_their_ranking(empty_room):
    for item in (WEIR, {"prompt": "x"}):
        reply = empty_room.ask("POST", "/api/labelling/items", {"items": [item], "gold": True})
        assert reply.error["param"] in ("items[0].ranking", "items[0].responses")


# --- Argilla ----------------------------------------------------------------------------------------------------------
def test_argillas_records_come_in_as_its_sdk_writes_them_and_go_out_as_it_reads_them(room):
    """The record below is what argilla 2.8.0's Record.to_dict writes."""
    record = {
        "id": "a1", "fields": {"instruction": "Name a river.", "response_2": "The Po.", "response_1": "A river."},
        "metadata": {"response_1_model": "m1"}, "suggestions": {}, "vectors": {}, "status": "pending",
        "responses": {"quality": [{"value": [{"value": "response_2", "rank": 1}, {"value": "response_1", "rank": 2}],
                                   "user_id": "0b4c2f7e-3c7a-4b0e-9a52-2f1d6a0c1f11"}]},
        "_server_id": None,
    }  # fmt: skip
    unranked = {"id": "a2", "fields": {"prompt": QUESTION, "answer-1": "x", "answer-10": "z", "answer-2": "y"}}
    add(room, record, unranked)
    token = hire(room, "ada")["token"]
    label_all(room, token, lambda text: text in ("A river.", "z"))
    first, second = exported(room, "argilla")
    assert set(first) == set(record)
    assert first["fields"] == {"prompt": "Name a river.", "response_1": "The Po.", "response_2": "A river."}
    assert second["fields"] == {"prompt": QUESTION, "response_1": "x", "response_2": "y", "response_3": "z"}
    assert [value["value"] for value in first["responses"]["ranking"]] == [
        [{"value": "response_1", "rank": 1}, {"value": "response_2", "rank": 2}]
    ]
    tied = second["responses"]["ranking"][0]["value"]
    assert tied == [{"value": f"response_{i}", "rank": 1} for i in (1, 2)] + [{"value": "response_3", "rank": 3}]
    assert first["status"] == "completed"
    argilla = pytest.importorskip("argilla", reason="not a part of the development tools")
    again = argilla.Record.from_dict(first)
    assert again.to_dict()["responses"] == first["responses"]


# --- Label Studio -----------------------------------------------------------------------------------------------------
RANKER = {"from_name": "rank", "to_name": "answers", "type": "ranker"}
CONFIG = """<View><Text name="prompt" value="$prompt"/><List name="answers" value="$items"/>
<Ranker name="rank" toName="answers"><Bucket name="1"/><Bucket name="2"/><Bucket name="3"/></Ranker></View>"""


def task(*ids, annotations=(), **data):
    return {"data": {"items": [{"id": i, "title": "", "body": f"It is {i}."} for i in ids], **data},
            "annotations": [{"result": [{**RANKER, "value": {"ranker": value}}]} for value in annotations]}  # fmt: skip


def test_label_studios_tasks_come_in_and_go_out_with_rankings(room):
    pair = {"data": {"prompt": "Which?", "answer1": "this", "answer2": "that"}, "annotations": []}
    add(room, task("x", "y", "z", prompt="Name one."), pair)
    label_all(room, hire(room, "ada")["token"], lambda text: text == "It is y.")
    first, second = exported(room, "label-studio")
    assert [entry["body"] for entry in first["data"]["items"]] == ["It is x.", "It is y.", "It is z."]
    (annotation,) = first["annotations"]
    buckets = {"1": ["response_1", "response_3"], "2": ["response_2"]}
    assert annotation["result"][0] == {"id": annotation["result"][0]["id"], **RANKER, "value": {"ranker": buckets}}
    assert second["data"]["prompt"] == "Which?"
    sdk = pytest.importorskip("label_studio_sdk.label_interface", reason="not a part of the development tools")
    interface = sdk.LabelInterface(CONFIG)
    assert interface.validate_task({"data": first["data"]})
    assert interface.validate_annotation(annotation)


@pytest.mark.parametrize(
    ("value", "ranking"),
    [
        ({"rank": ["b", "c", "a"]}, [[1], [2], [0]]),  # a list that was sorted: the ranker has no buckets
        ({"1": ["c"], "3": ["a", "b"], "2": [], "_": []}, [[2], [0, 1]]),
        ({"good": ["c", "a"], "bad": ["b"]}, None),
        ({"1": ["c"], "2": ["a"], "_": ["b"]}, None),
        ({"1": "c"}, None),
    ],
)
def test_a_known_ranking_is_read_from_label_studios_annotation(value, ranking):
    item = label_studio.item_of(task("a", "b", "c", annotations=[value], prompt="p"), gold=True)
    assert item.get("ranking") == ranking
    assert "ranking" not in label_studio.item_of(task("a", "b", "c", annotations=[value], prompt="p"), gold=False)


def test_what_label_studio_cancelled_says_nothing():
    said = {"result": [{"type": "pairwise", "value": {"selected": "right"}}]}
    pair = {"data": {"prompt": "p", "answer1": "x", "answer2": "y"}, "annotations": [{**said, "was_cancelled": True}]}
    assert "ranking" not in label_studio.item_of(pair, gold=True)
    pair["annotations"].append(said)
    assert label_studio.item_of(pair, gold=True)["ranking"] == [[1], [0]]


def test_an_export_comes_in_again_as_gold(room):
    add(room, WEIR, {"prompt": "p", "responses": ["a", "b"]})
    label_all(room, hire(room, "ada")["token"], lambda text: -len(text))
    records, tasks, lines = (exported(room, what) for what in (*ARRAYS, "rankings"))
    assert add(room, *records, gold=True) == {"added": 2, "known": 0}
    assert add(room, *tasks, gold=True) == {"added": 0, "known": 2}
    assert add(room, *lines, gold=True) == {"added": 0, "known": 2}
    assert room.ask("GET", "/api/labelling").json["gold_items"] == 2


def test_an_empty_room_exports_an_empty_list(empty_room):
    assert [exported(empty_room, what) for what in EXPORTS] == [[]] * 4


# --- judgements -------------------------------------------------------------------------------------------------------
def test_a_judgement_that_is_none_is_refused(room):
    add(room, WEIR)
    token = hire(room, "ada")["token"]
    item = following(room, token)
    good = ranked(item, str)
    for changes in (
        {"ranking": None}, {"outcome": "skipped"}, {"ranking": [[0], [1]]}, {"ranking": [0, 1, 2, 3]}, {"ranking": 7},
        {"outcome": "best"}, {"edits": {"9": "x"}}, {"edits": {"0": ""}}, {"flag": "boring"}, {"seconds": -1},
        {"extra": 1}, {"note": "\0"}, {"edits": {"0": "\ud800"}}, {"ranking": [[0, [1]], 2]},
    ):  # fmt: skip
        assert judge(room, token, item, {**good, **changes}).status == 400, changes
    assert judge(room, token, item, {**skipped(), "edits": {"0": "x"}}).status == 400
    assert judge(room, token, {"id": "item_" + "0" * 24}, good).status == 404
    assert judge(room, token, item, good).status == 200
    assert judge(room, token, item, {**good, "note": "changed"}).status == 409


def test_labellers_see_nothing_of_who_wrote_what_is_gold_and_how_well_they_do(room):
    origin = [{"model": f"secret {i}", "digest": "secret"} for i in range(3)]
    add(room, {**WEIR, "shown": origin})
    add(room, {**WEIR, "ranking": [2, 0, 1], "shown": origin}, gold=True)
    room.ask("PATCH", "/api/labelling", {"gold_every": 1})
    token = hire(room, "ada")["token"]
    for path, method in (("me", "GET"), ("next", "POST"), ("undo", "POST"), ("next", "POST")):
        body = room.ask(method, f"/api/label/{path}", key=token).body
        assert not [word for word in (b"secret", b"gold", b"accuracy", b"alpha") if word in body]
    item = following(room, token)
    assert set(item) == {"id", "prompt", "answers", "leased_until", "judgement"}
    assert judge(room, token, item, ranked(item, str)).json.keys() == {"done", "left"}


def test_settings_are_checked_and_guidelines_are_shown(room):
    assert room.ask("PATCH", "/api/labelling", {"guidelines": "**Be kind.**", "lease_minutes": 5}).status == 200
    assert room.ask("GET", "/api/label/me").json["guidelines"] == "**Be kind.**"
    for changes in ({"labellers_per_item": 0}, {"lease_minutes": 0}, {"gold_every": -1}, {"colour": "red"}):
        assert room.ask("PATCH", "/api/labelling", changes).status == 400
    assert room.ask("GET", "/api/labelling").json["settings"]["lease_minutes"] == 5


def test_an_item_that_is_removed_goes_with_its_judgements_and_the_audit_trail_stays(room):
    add(room, WEIR)
    token = hire(room, "ada")["token"]
    (item,) = label_all(room, token, str)
    assert room.ask("DELETE", f"/api/labelling/items/{item['id']}").status == 204
    assert room.ask("DELETE", f"/api/labelling/items/{item['id']}").status == 404
    assert exported(room, "rankings") == []
    events = [json.loads(line) for line in room.ask("GET", "/api/labelling/audit").body.splitlines()]
    assert [(event["actor"], event["action"]) for event in events] == [
        ("owner", "import"), ("owner", "token"), ("ada", "lease"), ("ada", "ranked"), ("owner", "remove")
    ]  # fmt: skip
    assert events[3]["item_id"] == item["id"]
    assert events[3]["detail"]["ranking"]


# --- many at once -----------------------------------------------------------------------------------------------------
def test_labellers_over_http_get_each_item_as_often_as_they_shall(room):
    """Four labellers, two of whom fall ill with an item in their hands; the figures are those of the export."""
    room.ask("PATCH", "/api/labelling", {"labellers_per_item": 2, "gold_every": 0})
    add(room, *({"prompt": f"q{i}", "responses": [f"{i}a", f"{i}b", f"{i}c"]} for i in range(20)))
    tokens = [hire(room, f"labeller {i}")["token"] for i in range(4)]
    for token in tokens[:2]:
        following(room, token)
    ill = [
        row
        for row in room.ask("GET", "/api/labelling").json["labellers"]
        if row["name"] in ("labeller 0", "labeller 1")
    ]
    for labeller in ill:
        room.ask("DELETE", f"/api/labelling/labellers/{labeller['id']}")
    tastes = (lambda text: text, lambda text: text[-1] != "b")
    people = zip(tokens[2:], tastes, strict=True)
    threads = [threading.Thread(target=label_all, args=(room, token, taste)) for token, taste in people]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = exported(room, "rankings")
    assert Counter(Counter(line["prompt"] for line in lines).values()) == {2: 20}
    figures = room.ask("GET", "/api/labelling").json
    assert (figures["judgements"], figures["open_items"], figures["items_compared"]) == (40, 0, 20)
    assert figures["pair_agreement"] == pytest.approx(1 / 3)  # a<b<c against b<a=c: only b before c


# --- the server's part ------------------------------------------------------------------------------------------------
def test_prompts_alone_are_answered_by_the_models_and_then_ranked(room):
    draft = {"models": ["tiny", "other"], "answers": 3, "max_tokens": 8, "temperature": 1.0}
    add(room, {"prompt": QUESTION}, {"prompt": "Once upon"}, {"messages": QUESTION[1:]}, draft=draft)
    assert eventually(lambda: room.ask("GET", "/api/labelling").json["open_items"] == 3)
    items = label_all(room, hire(room, "ada")["token"], str)
    assert [len(item["answers"]) for item in items] == [3, 3, 3]
    lines = exported(room, "rankings")
    assert [Counter(answer["model"] for answer in line["shown"]) for line in lines] == [{"tiny": 2, "other": 1}] * 3
    answer = lines[0]["shown"][0]
    assert answer["sampling"].keys() == {"temperature", "max_tokens", "seed"}
    chat = {"model": "tiny", "messages": QUESTION, "n": 2, **answer["sampling"]}
    texts = [choice["message"]["content"] for choice in room.post(chat).json["choices"]]
    assert lines[0]["responses"][:2] == texts  # the same as the API's


def test_what_no_model_can_answer_is_named(room):
    too_long = {"prompt": [{"role": "user", "content": "long " * 400}]}
    add(room, too_long, draft={"models": ["tiny"], "answers": 2, "max_tokens": 4})
    add(room, {"prompt": QUESTION}, draft={"models": ["tiny"], "answers": 2, "max_tokens": 4, "temperature": 0})
    assert eventually(lambda: len(room.ask("GET", "/api/labelling").json["problems"]) == 2)
    problems = room.ask("GET", "/api/labelling").json["problems"]
    assert "context" in problems[0]["problem"]
    assert "raise the temperature" in problems[1]["problem"]
    reply = room.ask("POST", "/api/labelling/items", {"items": [WEIR], "draft": {"models": ["nobody"]}})
    assert (reply.status, reply.error["code"]) == (404, "model_not_found")
    reply = room.ask("POST", "/api/labelling/items", {"items": [WEIR], "draft": {"models": ["tiny"], "keep": 2}})
    assert (reply.status, reply.error["param"]) == (400, "draft.keep")


def test_the_reward_model_that_was_trained_from_the_room_says_what_to_ask_first(tmp_path):
    """The loop: rankings out, `penstock reward`, served beside the room; what it cannot tell apart comes first."""
    rows = [{"prompt": f"Question {i}?", "responses": ["yes " * (i + 2), "no " * (i + 2)]} for i in range(12)]
    model = save_chatty(tmp_path / "tiny")
    with running(tmp_path / "data", model) as server:
        add(server, *rows)
        label_all(server, hire(server, "ada")["token"], lambda text: text.startswith("no"))
    out = tmp_path / "rankings.jsonl"
    flags = ["--rankings", "--out", out, "--data-dir", tmp_path / "data"]
    assert cli("data", "export", *flags) == 0
    assert cli("reward", "--model", model, "--data", out, "--out", tmp_path / "taste", "--steps", 4,
                  "--heldout", 0.5, "--max-length", 64) == 0  # fmt: skip
    with running(tmp_path / "data", model, f"taste={tmp_path / 'taste'}") as server:
        fresh = [{"prompt": f"New {i}?", "responses": ["yes " * (3 * i + 1), "no"]} for i in range(6)]
        add(server, *fresh)

        def scores(row):
            body = {"model": "taste", "text_1": row["prompt"], "text_2": row["responses"], "apply_chat_template": False}
            return [score["score"] for score in server.post(body, "/v1/score").json["data"]]

        def scored():
            with server.service.store.reading() as connection:
                return connection.exec_driver_sql("SELECT count(scored_by) FROM label_items").scalar()

        assert eventually(lambda: scored() == 6)
        margins = {row["prompt"]: abs(scores(row)[0] - scores(row)[1]) for row in fresh}
        asked = [item["prompt"] for item in label_all(server, hire(server, "bo")["token"], str)]
        assert asked == sorted(asked, key=margins.get)
        assert asked != sorted(asked)

        draft = {"models": ["tiny"], "answers": 6, "keep": 2, "max_tokens": 8, "temperature": 1.0}
        add(server, {"prompt": "Once upon"}, draft=draft)
        assert eventually(lambda: server.ask("GET", "/api/labelling").json["open_items"] == 1)
        label_all(server, hire(server, "cy")["token"], str)
        (line,) = [line for line in exported(server, "rankings") if line["prompt"] == "Once upon"]
        body = {"model": "tiny", "prompt": "Once upon", "n": 6, **line["shown"][0]["sampling"]}
        texts = [choice["text"] for choice in server.post(body, "/v1/completions").json["choices"]]
        score_of = dict(zip(texts, scores({"prompt": "Once upon", "responses": texts}), strict=True))
        pairs = itertools.combinations(dict.fromkeys(texts), 2)
        assert line["responses"] == [*min(pairs, key=lambda pair: abs(score_of[pair[0]] - score_of[pair[1]]))]
