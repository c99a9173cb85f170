"""Text of a corpus, which may hold anything, as it can be shown: nothing in it moves or hides its neighbours.

Line ends and tabs become signs. Characters without a shape of their own, such as those that turn the
direction of writing, are written out by their number. Joiners stay: emoji and some scripts are made with
them.
"""

import unicodedata
from functools import lru_cache

SIGNS = {"\n": "↵", "\r": "␍", "\t": "⇥"}
JOINERS = "\u200c\u200d"
WITHOUT_SHAPE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Categories of Unicode: controls, formats, surrogates, of private use, unassigned, separators of lines."""
MOST_LETTERS = 48
"""Letters shown of a token."""


@lru_cache(1 << 16)
def visible(text: str, most: int = MOST_LETTERS) -> str:
    """Make a text that can be shown, shortened to `most` letters."""
    shown = "".join(map(_letter, text[:most])) + ("…" if len(text) > most else "")
    return f"◌{shown}" if shown and unicodedata.combining(shown[0]) else shown


def _letter(letter: str) -> str:
    if letter in SIGNS:
        return SIGNS[letter]
    if letter not in JOINERS and unicodedata.category(letter) in WITHOUT_SHAPE:
        return f"‹{ord(letter):04X}›"
    return letter
