"""Tokens as text while they come: no broken characters, no lost spaces, and an end at a stop string.

A token alone is not text: it may hold part of a character, and tokenizers strip the space before a first word. So the last tokens of
the prompt stay in front of what is decoded, and characters that may still change are held back: up to three bytes of an unfinished
UTF-8 character, and the end of the text while it could begin a stop string.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNFINISHED = "\ufffd"
#: A character of UTF-8 has at most four bytes.
_MOST_UNFINISHED = 3
_CONTEXT, _WINDOW = 6, 24


class TextStream:
    """``decode`` gives the text of token ids; ``context`` are the prompt's."""

    def __init__(self, decode: Callable[[list[int]], str], context: Sequence[int] = (), stops: Sequence[str] = ()) -> None:
        self._decode, self._stops = decode, [stop for stop in stops if stop]
        self._held = ""
        self._ids: list[int] = []
        self._done = self._unfinished = 0
        self.stopped = False
        self._rebase(list(context))

    def push(self, token: int) -> str:
        """The text that is certain now that ``token`` has come; empty after a stop string."""
        if self.stopped:
            return ""
        self._ids.append(token)
        text = self._decode(self._ids)
        self._unfinished = self._unfinished + 1 if text.endswith(_UNFINISHED) else 0
        certain = _certain(text, self._unfinished)
        piece, self._done = text[self._done : certain], max(self._done, certain)
        if len(self._ids) > _WINDOW and certain == len(text):
            self._rebase(self._ids)
        return self._released(piece)

    def finish(self) -> str:
        """What was held back and now will not change."""
        if self.stopped:
            return ""
        piece = self._held + self._decode(self._ids)[self._done :]
        self._held = ""
        return self._before_stop(piece)

    def _rebase(self, told: list[int]) -> None:
        """Decode from the last of ``told`` on, beginning where a character begins: a run of bytes that starts within one stays unreadable."""
        starts = (told[-size:] for size in range(_CONTEXT, _CONTEXT + _MOST_UNFINISHED + 1))
        whole = (ids for ids in starts if _UNFINISHED not in self._decode(ids))
        self._ids = next(whole, told[-_CONTEXT:]) if told else []
        self._done = len(self._decode(self._ids)) if self._ids else 0

    def _released(self, piece: str) -> str:
        text = self._before_stop(self._held + piece)
        if self.stopped:
            return text
        keep = max((size for stop in self._stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _before_stop(self, text: str) -> str:
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if not places:
            return text
        self.stopped = True
        return text[: min(places)]


def _certain(text: str, unfinished: int) -> int:
    """How much of ``text`` cannot change any more, ``unfinished`` tokens after it last ended with a whole character.

    Llama's tokenizers decode a run of byte tokens as one: while its last character is unfinished, those before it are unreadable, too.
    """
    run = len(text) - len(text.rstrip(_UNFINISHED))
    return len(text) - (run if unfinished <= _MOST_UNFINISHED else min(run, _MOST_UNFINISHED))
