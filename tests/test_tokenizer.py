"""Texts to token ids, and back to the same ids from the same words."""

import pickle
import re

import pytest
import torch

from gpipe.models.tokenizer import Tokenizer, WordTokenizer, split_words

CAPTIONS = ["A red seven.", "a blue two", 'a photo of the number: "3".']


def test_ids_are_the_special_tokens_then_the_words_in_sorted_order():
    tokenizer = WordTokenizer(["b a", "c, B"], context_length=8)
    assert tokenizer.words == (",", "a", "b", "c")
    assert tokenizer.vocabulary_size == 8
    tokens, end = tokenizer(["A b, c"])
    assert tokens.tolist() == [[2, 5, 6, 4, 7, 3, 0, 0]]
    assert end.tolist() == [5]


def test_shapes_types_and_end_index_of_several_texts():
    tokenizer = WordTokenizer(CAPTIONS, context_length=13)
    tokens, end = tokenizer(CAPTIONS)
    assert tokens.shape == (3, 13)
    assert tokens.dtype == end.dtype == torch.int64
    assert end.tolist() == [5, 4, 11]
    assert (tokens[torch.arange(3), end] == tokenizer.end).all()
    assert (tokens[:, 0] == tokenizer.start).all()
    for row, last in zip(tokens, end, strict=True):
        assert (row[last + 1 :] == tokenizer.padding).all()
        assert tokenizer.padding not in row[: last + 1]
        assert tokenizer.unknown not in row
    assert tokens.max() < tokenizer.vocabulary_size


def test_words_never_seen_are_unknown_and_special_names_are_plain_text():
    tokenizer = WordTokenizer(["a"], context_length=6)
    assert tokenizer(["a zebra"])[0].tolist() == [[2, 4, 1, 3, 0, 0]]
    assert tokenizer(["<end>"])[0].tolist() == [[2, 1, 1, 1, 3, 0]]


def test_the_order_of_the_captions_does_not_matter():
    first = WordTokenizer(CAPTIONS, context_length=16)
    assert WordTokenizer(reversed(CAPTIONS), context_length=16).words == first.words
    assert WordTokenizer(set(CAPTIONS), context_length=16).words == first.words


def test_a_tokenizer_is_remade_from_its_words():
    first = WordTokenizer([*CAPTIONS, "don't naïve Straße İx"], context_length=16)
    again = WordTokenizer(first.words, first.context_length)
    assert again.words == first.words
    assert torch.equal(again(CAPTIONS)[0], first(CAPTIONS)[0])
    copied = pickle.loads(pickle.dumps(first))
    assert torch.equal(copied(CAPTIONS)[0], first(CAPTIONS)[0])


def test_splitting_is_in_lower_case_with_punctuation_apart():
    assert split_words('  A photo of: "3"!\n') == ["a", "photo", "of", ":", '"', "3", '"', "!"]
    assert split_words("") == []


def test_accents_composed_or_not_are_one_word():
    assert split_words("cafe\u0301") == split_words("caf\u00e9") == ["caf\u00e9"]


def test_an_empty_text_is_start_and_end_and_no_text_is_no_row():
    tokenizer = WordTokenizer(["a"], context_length=2)
    tokens, end = tokenizer([""])
    assert (tokens.tolist(), end.tolist()) == ([[2, 3]], [1])
    tokens, end = tokenizer([])
    assert (tokens.shape, end.shape) == ((0, 2), (0,))


def test_a_text_of_just_the_context_length_fits_and_a_longer_one_is_refused():
    tokenizer = WordTokenizer(["a b c"], context_length=5)
    assert tokenizer(["a b c"])[1].tolist() == [4]
    message = "at most 3 words .* given 4 in text 1: 'a b c c'; .* context_length to at least 6"
    with pytest.raises(ValueError, match=message):
        tokenizer(["a", "a b c c"])


@pytest.mark.parametrize("length", [1, 0, -3, 2.0, "8", True])
def test_a_bad_context_length_is_refused(length):
    with pytest.raises(ValueError, match=f"at least 2, given {re.escape(repr(length))}"):
        WordTokenizer(["a"], context_length=length)


def test_a_single_text_is_refused_instead_of_read_letter_by_letter():
    with pytest.raises(ValueError, match=r"given the single text 'a red seven'; pass \[text\]"):
        WordTokenizer("a red seven", context_length=8)
    with pytest.raises(ValueError, match="given the single text 'red'"):
        WordTokenizer(["a"], context_length=8)("red")


def test_it_satisfies_the_protocol():
    tokenizer: Tokenizer = WordTokenizer(["a"], context_length=4)
    tokens, _ = tokenizer(["a"])
    assert tokens.shape == (1, tokenizer.context_length)
    with pytest.raises(AttributeError, match="context_length"):
        tokenizer.context_length = 5
