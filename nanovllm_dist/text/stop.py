"""StopStrings: finds stop strings in text that comes in pieces, and holds back what may become one.

The match that is complete first wins, of two that end together the longer: what counts is the text, not how it was
cut into pieces. It knows nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Watches the text of one answer for any of `strings` (non-empty). Linear in text times number of strings."""

    def __init__(self, strings: Sequence[str], include_stop_str_in_output: bool = False) -> None:
        self._matchers = [_Matcher(string) for string in strings]
        self._include = include_stop_str_in_output
        self._held = ""
        self._matched: str | None = None

    def feed(self, delta: str) -> tuple[str, str | None]:
        """The text that may be shown now, and the stop string that ended it, if one did.

        After a match there is no more text: later pieces give `("", match)`.
        """
        if self._matched is not None:
            return "", self._matched
        text = self._held + delta
        for end, character in enumerate(delta, start=len(self._held) + 1):
            complete = [matcher.string for matcher in self._matchers if matcher.advance(character)]
            if complete:
                self._matched = max(complete, key=len)
                return self._cut(text[:end], 0 if self._include else len(self._matched)), self._matched
        return self._cut(text, 0 if self._include else max((m.length for m in self._matchers), default=0)), None

    def flush(self) -> str:
        """What was held back, when the answer ended otherwise."""
        held, self._held = self._held, ""
        return held

    def _cut(self, text: str, keep: int) -> str:
        shown = len(text) - keep
        self._held = "" if self._matched is not None else text[shown:]
        return text[:shown]


class _Matcher:
    """Knuth-Morris-Pratt: `length` is how much of `string` the text so far ends with."""

    def __init__(self, string: str) -> None:
        self.string = string
        self.length = 0
        self._fallback = [0] * len(string)  # for each prefix, the longest shorter prefix that it ends with
        length = 0
        for index in range(1, len(string)):
            while length and string[index] != string[length]:
                length = self._fallback[length - 1]
            length += string[index] == string[length]
            self._fallback[index] = length

    def advance(self, character: str) -> bool:
        """Add one character of text; whether `string` is now complete."""
        while self.length and self.string[self.length] != character:
            self.length = self._fallback[self.length - 1]
        self.length += self.string[self.length] == character
        return self.length == len(self.string)
