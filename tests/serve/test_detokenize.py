"""Text while it comes: the pieces end to end are the whole, and none of them holds half of anything."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.data.chat import Encoder
from penstock.data.toyland import save_tokenizer
from penstock.serve.detokenize import BYTES, TextStream, Vocabulary, decoder_of

WORDS = "a penstock \u00e4 \u6c34 \U0001f30a caf\u00e9 na\u00efve \u65e5\u672c\u8a9e \U0001f469\u200d\U0001f680 stop"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    tokenizer = save_tokenizer(tmp_path_factory.mktemp("words"), [WORDS], vocab_size=330)
    return Encoder(tokenizer, eos_ids=[2], vocab_size=330, max_length=10_000)


def pieces_of(encoder, ids, stops=()):
    text = TextStream(decoder_of(encoder), stops)
    pieces = []
    for token in ids:
        pieces.append(text.push(token))
        if text.ended:
            return pieces, text
    return [*pieces, text.finish()], text


def ids_of(encoder, text):
    return encoder.tokenizer(text, add_special_tokens=False).input_ids


@settings(max_examples=300)
@given(st.lists(st.integers(3, 329), max_size=60))
def test_pieces_of_any_tokens_are_the_whole_text(encoder, ids):
    pieces, text = pieces_of(encoder, ids)
    whole = encoder.decode(ids).replace("\0", "")  # no text: PostgreSQL does not store it
    assert "".join(pieces) == whole
    assert text.length == len(whole)


def test_nul_is_not_shown(encoder):
    [nul] = [word for word, byte in BYTES.items() if byte == 0]
    token = encoder.tokenizer.convert_tokens_to_ids(nul)
    assert encoder.decode([token]) == "\0"
    pieces, _ = pieces_of(encoder, [*ids_of(encoder, "a pen"), token, *ids_of(encoder, "stock")])
    assert "".join(pieces) == "a penstock"


@settings(max_examples=300)
@given(st.text(alphabet="a \u00e4\u6c34\U0001f30a\u200d\n", max_size=50))
def test_characters_of_several_bytes_come_whole(encoder, written):
    pieces, _ = pieces_of(encoder, ids_of(encoder, written))
    assert "".join(pieces) == written
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=300)
@given(
    st.text(alphabet="abc\u6c34", max_size=40),
    st.lists(st.text(alphabet="abc\u6c34", min_size=1, max_size=4), min_size=1, max_size=4),
)
def test_a_stop_string_ends_the_text_and_no_part_of_it_is_shown(encoder, written, stops):
    pieces, text = pieces_of(encoder, ids_of(encoder, written), stops)
    starts = [written.index(stop) for stop in stops if stop in written]
    # The oracle sees the whole text; ours stops at the first stop string to be complete, which may not begin first.
    if not starts:
        assert "".join(pieces) == written
        assert not text.ended
    else:
        assert text.ended
        shown = "".join(pieces)
        assert written.startswith(shown)
        assert not any(stop in shown for stop in stops)
        assert any(written.startswith(stop, len(shown)) for stop in stops)


def test_what_might_begin_a_stop_string_waits_and_comes_when_it_was_none(encoder):
    text = TextStream(decoder_of(encoder), ["stop"])
    assert "".join([text.push(token) for letter in "a st" for token in ids_of(encoder, letter)]) == "a "
    assert text.position == 4
    assert "".join(text.push(token) for token in ids_of(encoder, "a")) == "sta"


def test_long_noise_is_shown_and_not_kept_for_ever(encoder):
    half = [encoder.tokenizer.convert_tokens_to_ids(letter) for letter, byte in BYTES.items() if byte == 0xE6]
    pieces, _ = pieces_of(encoder, half * 200)
    assert "".join(pieces) == "\ufffd" * 200
    assert len("".join(pieces[:100])) > 50


def test_a_tokens_bytes_are_those_of_its_text(encoder):
    vocabulary = Vocabulary(encoder.tokenizer)
    assert b"".join(vocabulary.bytes_of(token) for token in ids_of(encoder, WORDS)) == WORDS.encode()
    assert vocabulary.bytes_of(2) == b"<eos>"


@pytest.mark.parametrize(
    ("word", "spelled"), [("\u2581pipe", b" pipe"), ("<0xE6>", b"\xe6"), ("\u6c34", "\u6c34".encode())]
)
def test_sentencepiece_words_are_spelled_too(word, spelled):
    class Tokenizer:  # what a sentencepiece model without a fast tokenizer looks like
        all_special_ids = ()

        def convert_ids_to_tokens(self, token):
            return word

    assert Vocabulary(Tokenizer()).bytes_of(5) == spelled


def test_stop_strings_count_from_where_they_may(encoder):
    ids = ids_of(encoder, "stop and stop and stop")
    text = TextStream(decoder_of(encoder), ["stop"])
    shown = "".join(text.push(token, may_stop=i >= 1) for i, token in enumerate(ids) if not text.ended)
    assert (shown, text.ended) == ("stop and ", True)
