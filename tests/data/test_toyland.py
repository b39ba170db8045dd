"""Toyland: its gold function by hand, its splits, its labellers, and that nothing of gold leaks into training."""

import collections
import random

import pytest

from penstock.data.toyland import FACTS, FRIENDLY, RUDE, Toyland, save_tokenizer

WORLD = Toyland(0)
QUESTION = next(q for q in WORLD.questions if q.attribute == "food" and q.animal == "fox")


def fact(subject, attribute, right=True):
    value = WORLD.facts["fox"][attribute]
    if not right:
        value = next(v for v in FACTS[attribute][2] if v != value)
    return WORLD.sentence(subject, attribute, value)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        (fact("The fox", "food"), 2.0),  # answered and true
        (fact("The fox", "food", right=False), 0.0),  # answered, false
        (fact("The fox", "home"), -0.5),  # true, but nobody asked for it
        ("", -1.0),
        (f"{FRIENDLY[0]} {fact('The fox', 'food')}", 3.0),
        (f"{RUDE[0]} {fact('The fox', 'food')}", 0.5),
        (f"{fact('The fox', 'food')} {fact('It', 'home')}", 2.5),  # `it` is the fox
        (f"{fact('The fox', 'food')} {fact('It', 'home', right=False)}", 1.0),
        (f"{fact('The fox', 'food')} {fact('It', 'food')}", 1.0),  # said twice
        (" ".join(fact("The fox", a) for a in ("food", "home", "colour", "hobby")), 3.0),  # two extras count
        (fact("The fox", "food") + " and" * 40, 2.0 - 0.25 * (44 - 22)),
    ],
)
def test_gold_by_hand(answer, gold):
    assert WORLD.gold(QUESTION, answer) == pytest.approx(gold)
    assert WORLD.gold(QUESTION, answer, ended=False) == pytest.approx(gold - 1)


def test_a_fact_about_another_animal_is_no_answer():
    assert WORLD.gold(QUESTION, WORLD.sentence("The owl", "food", WORLD.facts["owl"]["food"])) == -1.0


def test_worlds_differ_by_seed_and_repeat_by_seed():
    assert Toyland(3).facts == Toyland(3).facts
    assert Toyland(3).facts != Toyland(4).facts


def test_held_out_questions_are_asked_nowhere_else():
    trained, heldout = WORLD.split(0, 256)
    assert len(heldout) == 256
    assert len(trained) + 256 == len(WORLD.questions)
    assert not {q.prompt for q in trained} & {q.prompt for q in heldout}


def test_demonstrators_are_of_mixed_care_and_better_than_plain_text():
    rng = random.Random(0)
    asked = WORLD.questions[::3]
    golds = [WORLD.gold(q, WORLD.demonstration(q, rng)) for q in asked]
    texts = [WORLD.gold(q, WORLD.text(rng)) for q in asked]
    assert sum(golds) / len(golds) > sum(texts) / len(texts) + 0.5
    assert max(golds) >= 3.5
    assert min(golds) <= -1


def test_the_tokenizer_says_everything_back(tmp_path):
    rng = random.Random(0)
    texts = [WORLD.text(rng) for _ in range(300)]
    tokenizer = save_tokenizer(tmp_path, texts)
    assert len(tokenizer) <= 512
    for text in texts[:50]:
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == text


def test_training_code_never_names_gold():
    """PPO.md 25: the reward model sees rankings, PPO sees the reward model; only `gold` in these files would tell."""
    import ast
    import inspect

    from penstock.commands import demo

    calls = collections.Counter(
        node.func.attr
        for node in ast.walk(ast.parse(inspect.getsource(demo.one_seed) + inspect.getsource(demo.label)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    )
    assert calls["gold"] == 1  # the labellers' judgement, from which noisy ranks are made
