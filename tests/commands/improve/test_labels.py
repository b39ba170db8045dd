"""What votes become: sides that stay, openings, the page's pairs and thumbs."""

from penstock.commands.improve.labels import Label, digest_of, held_out, opening, page_lines, single
from penstock.data.records import Comparison, Prompt, Vote
from penstock.serve.store import open_store


def chat(*texts):
    roles = ("user", "assistant")
    return Prompt(where="-", messages=tuple({"role": roles[i % 2], "content": t} for i, t in enumerate(texts)))


def test_a_conversation_is_on_one_side_whichever_turn_was_judged():
    system = Prompt(where="-", messages=({"role": "system", "content": "Be kind."}, *chat("Hello  there").messages))
    keys = {opening(chat("hello there")), opening(chat("Hello there", "Hi", "And you?")), opening(system)}
    assert keys == {"hello there"}
    assert opening(Prompt(where="-", prompt="Hello  THERE")) == "hello there"


def test_the_share_of_conversations_is_held_out_and_more_only_adds_to_it():
    keys = [str(i) for i in range(5000)]
    held = [key for key in keys if held_out(key, 0, 0.2)]
    assert 0.18 < len(held) / len(keys) < 0.22
    assert {key for key in keys if held_out(key, 1, 0.2)} != set(held)
    assert not any(held_out(key, 0, 0.0) for key in keys)


def test_the_page_s_votes_are_each_used_once(tmp_path):
    store = open_store(str(tmp_path), None)
    conversation = store.add_conversation("", "")["id"]

    def answers(question, *texts):
        asked = store.add_message(conversation, None, "user", question)["id"]
        rows = [store.add_message(conversation, asked, "assistant", text) for text in texts]
        store.save_answers([{**row, "finish_reason": "stop"} for row in rows])
        return [row["id"] for row in rows]

    left, right = answers("first", "a", "b")
    store.vote_pair((left, right), right)
    up, down = answers("second", "c", "d")
    store.vote_thumb(up, 1)
    store.vote_thumb(down, -1)
    (alone,) = answers("third", "e")
    store.vote_thumb(alone, -1)
    lines = page_lines(store.votes())
    store.close()
    assert [(line["responses"], line["ranking"]) for line in lines["comparisons"]] == [
        (["a", "b"], [1, 0]), (["c", "d"], [0, 1]),
    ]  # fmt: skip
    assert [(line["response"], line["label"]) for line in lines["votes"]] == [("e", False)]


def test_a_comparison_is_two_votes():
    record = Comparison(where="-", prompt="p", responses=("x", "y", "z"), ranks=(1, 0, 1))
    alone = Vote(where="-", prompt="q", response="w", label=True)
    labels = [Label(record, "1", "p", False, 1), Label(alone, "2", "q", False, 1)]
    assert [(vote.response, vote.label) for vote in single(labels)] == [("y", True), ("z", False), ("w", True)]
    assert digest_of(labels) == digest_of(labels[::-1])
