"""Filmland: questions about films for a model that was really pre-trained, and a hidden gold function for its answers.

The world of `penstock demo --real` and of `benchmarks/real`. Gold is the sentiment of an answer by VADER (Hutto and
Gilbert 2014), a lexicon nobody here wrote, with staying on the question and brevity. It judges words, not truth.
No model is trained on it; labellers see it through noise (`labellers.comparisons`).
"""

import functools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from penstock.errors import UserError

FILMS = [
    "Casablanca", "Jaws", "The Godfather", "Titanic", "Jurassic Park", "The Matrix", "Inception", "Toy Story",
    "Finding Nemo", "The Lion King", "Star Wars", "The Wizard of Oz", "Gone with the Wind", "Psycho", "Vertigo",
    "Rear Window", "Citizen Kane", "Singin' in the Rain", "Some Like It Hot", "The Sound of Music", "Mary Poppins",
    "Lawrence of Arabia", "Doctor Zhivago", "The Graduate", "Rocky", "Taxi Driver", "Raging Bull", "Chinatown",
    "Apocalypse Now", "Alien", "Blade Runner", "The Terminator", "Back to the Future", "Ghostbusters", "Top Gun",
    "Dirty Dancing", "The Breakfast Club", "Stand by Me", "Rain Man", "Pretty Woman", "Home Alone", "Goodfellas",
    "The Silence of the Lambs", "Schindler's List", "Forrest Gump", "Pulp Fiction", "The Shawshank Redemption",
    "Braveheart", "Fargo", "Good Will Hunting", "Saving Private Ryan", "The Truman Show", "The Sixth Sense",
    "Fight Club", "American Beauty", "Gladiator", "Memento", "Amelie", "Shrek", "Wall-E", "Spirited Away",
    "The Lord of the Rings", "Pirates of the Caribbean", "Lost in Translation", "The Incredibles", "Ratatouille",
    "Brokeback Mountain", "The Departed", "Casino Royale", "Slumdog Millionaire", "The Dark Knight", "Avatar",
    "The Social Network", "Black Swan", "The King's Speech", "Brazil", "Life of Pi", "Gravity", "Interstellar",
    "Whiplash", "Mad Max", "The Martian", "La La Land", "Moonlight", "Rashomon", "Dunkirk", "Black Panther", "Parasite",
    "Joker", "Knives Out", "Metropolis", "Modern Times", "Seven Samurai", "Tokyo Story", "Bicycle Thieves",
    "Cinema Paradiso",
]  # fmt: skip
ASPECTS = {
    # what is asked about: words that speak of it
    "the acting": r"act(?:ing|ors?|ress\w*|s|ed)|perform\w*|cast|play(?:s|ed|ing)",
    "the story": r"stor(?:y|ies)|plots?|narrative\w*|tales?",
    "the music": r"music\w*|scores?|soundtrack|songs?|melod\w*",
    "the ending": r"end(?:s|ing|ings|ed)?|final\w*|conclu\w*|climax\w*",
    "the camera work": r"camera\w*|cinemato\w*|shots?|visual\w*|photograph\w*|imag(?:es?|ery)",
    "the dialogue": r"dialog\w*|lines?|scripts?|words?|conversation\w*|writing",
    "the main character": r"characters?|hero\w*|protagonist\w*|leads?",
    "the opening scene": r"open(?:s|ing|ed)|begin\w*|first|starts?",
    "the pace": r"pac(?:e|es|ed|ing)|slow\w*|fast\w*|quick\w*|tempo|rhythm\w*",
    "the humour": r"humou?r\w*|funn\w*|comed\w*|comic\w*|jok(?:e|es|ing)|laugh\w*|wit|witty",
    "the costumes": r"costum\w*|cloth(?:es|ing)|dress\w*|wardrobe|outfits?",
    "the direction": r"direct\w*|filmmak\w*",
}
WORDINGS = (
    "Write one or two sentences about {aspect} of the film {film}.",
    "Describe {aspect} of the film {film} in one or two sentences.",
    "In one or two sentences, what is {aspect} of the film {film} like?",
    "What do you think of {aspect} of the film {film}? One or two sentences are enough.",
    "A friend asks about {aspect} of the film {film}. Answer in one or two sentences.",
    "Review {aspect} of the film {film} in two short sentences.",
)
HELDOUT_FILMS = 24
"""Films that no training prompt names."""
LABEL_NOISE = 0.4
"""Standard deviation of a labeller's judgement, in units of gold."""
BRIEF = 25
"""Words that cost nothing."""


@dataclass(frozen=True)
class FilmQuestion:
    """A question. Example: FilmQuestion("Describe the music of the film Jaws in ...", "Jaws", "the music")."""

    text: str
    film: str
    aspect: str

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The user's turn, as data files hold it."""
        return [{"role": "user", "content": self.text}]


class Filmland:
    """Films as `toyland.Toyland` has animals, for the demo."""

    @property
    def questions(self) -> list[FilmQuestion]:
        """All, of both splits."""
        return prompts("train") + prompts("heldout")

    def split(self, seed: int, heldout: int) -> tuple[list[FilmQuestion], list[FilmQuestion]]:
        """The training questions in random order, and `heldout` of the others, which are those of every seed."""
        questions = prompts("train")
        random.Random(f"split {seed}").shuffle(questions)
        return questions, prompts("heldout", heldout)

    def gold(self, question: FilmQuestion, answer: str, ended: bool = True) -> float:
        """See the function `gold`."""
        return gold([question], [answer], [ended])[0]


def prompts(split: Literal["train", "heldout"], count: int | None = None) -> list[FilmQuestion]:
    """The first `count` questions of a split (default: all, 5,184 and 1,728), the same ones on every call.

    The splits share no film. Every run of questions is even: with 24 of them, each held-out film is asked about once.
    """
    rng = random.Random("films")
    films = rng.sample(FILMS, len(FILMS))
    films = films[:HELDOUT_FILMS] if split == "heldout" else films[HELDOUT_FILMS:]
    forms = {film: [(wording, aspect) for wording in WORDINGS for aspect in ASPECTS] for film in films}
    for film in films:
        rng.shuffle(forms[film])
    questions = [
        FilmQuestion(forms[film][i][0].format(aspect=forms[film][i][1], film=film), film, forms[film][i][1])
        for i in range(len(WORDINGS) * len(ASPECTS))
        for film in films
    ]
    if count is not None and count > len(questions):
        raise UserError(f"{count} {split} prompts: there are {len(questions)} of them; ask for fewer.")
    return questions[:count]


def gold(questions: Sequence[FilmQuestion], answers: Sequence[str], ended: Sequence[bool] | None = None) -> list[float]:
    """How good each answer is: -2.5 to +2.5, less where it is long. `ended`: which ended by themselves; default: all.

    gold = sentiment in -1..1 (VADER's compound of the answer without the film's name)
         + 1 where it names the film + 0.5 where it speaks of what was asked
         - 0.05 per word above 25 - 0.5 where it has more than two sentences - 0.5 where it did not end; empty: -1.
    """
    whole = [True] * len(answers) if ended is None else ended
    return [_gold(*given) for given in zip(questions, answers, whole, strict=True)]


def _gold(question: FilmQuestion, answer: str, ended: bool) -> float:
    if not answer.strip():
        return -1.0
    opinion, named = _title(question.film).subn("it", answer)  # "The Silence of the Lambs" is no praise
    spoken = re.search(rf"\b(?:{ASPECTS[question.aspect]})\b", opinion, re.IGNORECASE)
    sentences = re.findall(r"[^.!?]*\w[^.!?]*", opinion)
    score: float = lexicon().polarity_scores(opinion)["compound"]
    score += 1.0 * bool(named) + 0.5 * bool(spoken)
    score -= 0.05 * max(len(answer.split()) - BRIEF, 0) + 0.5 * (len(sentences) > 2)
    return score if ended else score - 0.5


@functools.cache
def _title(film: str) -> re.Pattern[str]:
    """The film's name, with or without its article, in any case and between any spaces."""
    words = r"\s+".join(map(re.escape, film.removeprefix("The ").split()))
    return re.compile(rf"\b(?:the\s+)?{words}(?!\w)", re.IGNORECASE)


@functools.cache
def lexicon() -> Any:
    """VADER. Raises UserError where it is not installed."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise UserError(
            "The gold judge of films needs VADER's lexicon: pip install 'penstock[real]' (vaderSentiment)."
        ) from error
    return SentimentIntensityAnalyzer()
