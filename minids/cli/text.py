"""Tokens as text while they come: a character may take several, and is shown once it is whole.

Paper   none.
Dims    none.
Book    none                            Kernel  none
"""

from collections.abc import Iterator

from tokenizers import Tokenizer


def decode_stream(tokenizer: Tokenizer, words: Iterator[list[list[int]]]) -> Iterator[str]:
    """Yield the text of one row once its last character is whole: it may take several tokens."""
    ids, shown = list[int](), 0
    for (new,) in words:
        ids += new
        if not (text := tokenizer.decode(ids)).endswith("\ufffd"):
            yield text[shown:]
            shown = len(text)
    yield tokenizer.decode(ids)[shown:]
