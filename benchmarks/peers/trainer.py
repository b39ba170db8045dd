"""What the scripts around TRL's trainers share: a step in its turn, and a tokenizer of words that are numbers."""

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from turns import Turns


class StepInTurn(transformers.TrainerCallback):
    """A step of the trainer is a turn: from the request to its last callback."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_train_begin(self, *_: object, **__: object) -> None:
        """Before the first step."""
        self._next()

    def on_step_end(self, *_: object, **__: object) -> None:
        """After each one."""
        self.turns.done()
        self._next()

    def _next(self) -> None:
        if not self.turns.wait():
            raise SystemExit(0)


def tokenizer(vocabulary: int, eos: int = 1) -> transformers.PreTrainedTokenizerFast:
    """The word "7" is token 7; padding is 0. With an `eos` outside of the vocabulary no model samples it."""
    words = {str(i): i for i in range(vocabulary) if i not in (0, eos)} | {"<pad>": 0, "<eos>": eos}
    tokens = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>")
