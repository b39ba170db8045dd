"""Filmland: its gold function by hand, beside VADER itself, and splits that share no film."""

import itertools
import re

import pytest

from penstock.data.filmland import ASPECTS, FILMS, HELDOUT_FILMS, FilmQuestion, gold, prompts
from penstock.errors import UserError

JAWS = FilmQuestion("Describe the music of the film Jaws.", "Jaws", "the music")


@pytest.fixture(scope="module")
def compound():
    """The oracle: VADER's own score of a text."""
    vader = pytest.importorskip("vaderSentiment.vaderSentiment", reason="FILMLAND IS NOT TESTED: no vaderSentiment")
    return lambda text: vader.SentimentIntensityAnalyzer().polarity_scores(text)["compound"]


def test_gold_by_hand(compound):
    praise = "is great and it makes the audience happy."
    long = "The music of Jaws is great" + " and" * 25
    cases = [
        (f"The music of Jaws {praise}", compound(praise) + 1.5),
        (f"The score of JAWS {praise}", compound(praise) + 1.5),
        (f"Jaws {praise}", compound(praise) + 1.0),
        (f"The film {praise}", compound(praise)),
        (f"Its songs {praise}", compound(praise) + 0.5),
        ("The music of Jaws has notes.", 1.5),
        ("The music of Jaws is a boring mess.", compound("a boring mess.") + 1.5),
        (long, compound(long) + 1.5 - 0.05 * 6),
        ("The music of Jaws. It has notes. It has bars.", 1.0),
        ("", -1.0),
        ("  \n", -1.0),
    ]
    scores = gold([JAWS] * len(cases), [text for text, _ in cases])
    assert scores == pytest.approx([score for _, score in cases])
    text = cases[0][0]
    assert gold([JAWS], [text], [False]) == pytest.approx([cases[0][1] - 0.5])


def test_better_answers_have_more_gold(compound):
    """From a good answer down: each is worse than the one before in one way that anybody would agree with."""
    answers = [
        "The music of Jaws is brilliant and wonderfully thrilling.",
        "The music of Jaws is good.",
        "The music of Jaws is two notes.",
        "The music of Jaws is bad.",
        "The shark is bad.",
        "The shark is bad, and I hate it." + " It is an awful, boring, ugly mess." * 4,
    ]
    scores = gold([JAWS] * len(answers), answers)
    assert all(better > worse + 0.05 for better, worse in itertools.pairwise(scores))


def test_a_film_with_a_sad_name_costs_nothing(compound):
    asked = [FilmQuestion("", film, "the story") for film in FILMS]
    scores = gold(asked, [f"The story of {question.film} is set in a house." for question in asked])
    assert scores == pytest.approx([1.5] * len(FILMS))
    lambs = FilmQuestion("", "The Silence of the Lambs", "the story")
    assert gold([lambs], ["I saw silence of the lambs, a story."]) == pytest.approx([1.5])  # the article may go
    assert gold([lambs], ["I saw lambs, a story."]) == pytest.approx([0.5])


def test_every_aspect_is_named_by_its_own_question():
    for aspect, words in ASPECTS.items():
        others = [other for other in ASPECTS if other != aspect and re.search(rf"\b(?:{words})\b", other)]
        assert re.search(rf"\b(?:{words})\b", aspect), aspect
        assert others == [], aspect


def test_splits_share_no_film_and_no_question():
    train, heldout = prompts("train"), prompts("heldout")
    assert len(set(FILMS)) == len(FILMS)
    assert {q.film for q in train}.isdisjoint(q.film for q in heldout)
    assert {q.film for q in train} | {q.film for q in heldout} == set(FILMS)
    assert (len(train), len(heldout)) == (5184, 1728)
    assert len({q.text for q in train + heldout}) == 5184 + 1728
    assert not any(film in q.text for q in train for film in {h.film for h in heldout})


def test_a_part_of_a_split_is_even_and_always_the_same():
    heldout = prompts("heldout", 2 * HELDOUT_FILMS)
    assert heldout == prompts("heldout", 2 * HELDOUT_FILMS)
    assert len({q.film for q in heldout[:HELDOUT_FILMS]}) == HELDOUT_FILMS
    assert len({(q.film, q.aspect, q.text) for q in heldout}) == 2 * HELDOUT_FILMS
    assert len({q.aspect for q in heldout}) == len(ASPECTS)
    with pytest.raises(UserError, match=r"2000 heldout prompts: there are 1728"):
        prompts("heldout", 2000)


def test_a_prompt_is_a_users_turn():
    assert JAWS.prompt == [{"role": "user", "content": JAWS.text}]
