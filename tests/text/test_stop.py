"""Stop strings end the text wherever tokens cut it, and nothing of them is shown too early."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm_dist.text.stop import StopStrings

SHORT = st.text("ab", min_size=1, max_size=5)
PIECES = st.lists(st.text("abc", max_size=4), max_size=20)


def run(pieces, strings, include=False):
    """What is shown, and the match, with the flush at the end of an answer that ended otherwise."""
    stop = StopStrings(strings, include)
    shown, matched = "", None
    for piece in pieces:
        text, matched = stop.feed(piece)
        shown += text
    return shown + stop.flush(), matched


def expected(text, strings, include):
    """By definition: the first character at which some stop string is complete; the longest of those."""
    for end in range(1, len(text) + 1):
        complete = [string for string in strings if text[:end].endswith(string)]
        if complete:
            match = max(complete, key=len)
            return text[: end if include else end - len(match)], match
    return text, None


@given(pieces=PIECES, strings=st.lists(SHORT, min_size=1, max_size=4), include=st.booleans())
def test_the_outcome_depends_on_the_text_and_not_on_its_pieces(pieces, strings, include):
    assert run(pieces, strings, include) == expected("".join(pieces), strings, include)


@given(pieces=PIECES, strings=st.lists(SHORT, min_size=1, max_size=4))
def test_what_is_shown_never_has_to_be_taken_back(pieces, strings):
    stop, shown, whole = StopStrings(strings), "", "".join(pieces)
    final, _ = expected(whole, strings, False)

    for piece in pieces:
        shown += stop.feed(piece)[0]

        assert final.startswith(shown)


def test_a_stop_string_over_three_pieces_is_found_and_cut_off():
    assert run(["one\nEN", "D", "ING more"], ["\nENDING"]) == ("one", "\nENDING")


def test_include_keeps_the_stop_string_and_nothing_after_it():
    assert run(["one\nEN", "D", "ING more"], ["\nENDING"], include=True) == ("one\nENDING", "\nENDING")


def test_a_beginning_that_comes_to_nothing_is_shown_after_all():
    stop = StopStrings(["###"])

    assert stop.feed("a##") == ("a", None)
    assert stop.feed("b#") == ("##b", None)
    assert stop.flush() == "#"


def test_no_more_is_held_back_than_may_become_a_stop_string():
    assert StopStrings(["abc", "xyz"]).feed("hello ab") == ("hello ", None)
    assert StopStrings(["abc", "xyz"]).feed("hello") == ("hello", None)


def test_with_include_nothing_needs_holding_back():
    assert StopStrings(["abc"], include_stop_str_in_output=True).feed("hello ab") == ("hello ab", None)


@pytest.mark.parametrize("strings", [["abcd", "bc"], ["bc", "abcd"]])
def test_the_match_that_is_complete_first_wins(strings):
    assert run(["ab", "cd"], strings) == ("a", "bc")


@pytest.mark.parametrize("strings", [["bc", "abc"], ["abc", "bc"]])
def test_of_two_that_end_together_the_longer_wins(strings):
    assert run(["ab", "cd"], strings) == ("", "abc")


def test_after_a_match_later_pieces_show_nothing():
    stop = StopStrings(["x"])
    stop.feed("ax")

    assert stop.feed("more") == ("", "x")
    assert stop.flush() == ""


def test_without_stop_strings_all_text_passes():
    assert run(["a", "b"], []) == ("ab", None)


def test_emoji_and_hindi_stop_strings_are_found():
    assert run(["शुभ 👩‍👩", "‍👧 end"], ["👩‍👩‍👧"]) == ("शुभ ", "👩‍👩‍👧")
