"""Tokens as SAEDashboard writes them: each as the text that it stands for, spaces included."""

from typing import Any

import transformers
from numpy.typing import NDArray
from tokenizers.decoders import ByteLevel

from saemill.common.hub import loading
from saemill.common.stores.tokens import TokenStore

UNKNOWN = "<|outofrange|>"
"""SAEDashboard's word for an id that the tokenizer does not have."""
NO_TEXT = "\ufffd"
"""What stands in decoded text for bytes that are no character."""


class Vocabulary:
    """Texts of the ids of a store's own tokenizer.

    A token that is a part of a character stays as the tokenizer's vocabulary has it.
    """

    def __init__(self, tokens: TokenStore) -> None:
        folder = str(tokens.tokenizer_folder)
        with loading("tokenizer", folder):
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        is_byte_level = "ByteLevel" in str(getattr(backend, "decoder", ""))
        added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        self.texts = [UNKNOWN] * tokens.tokenizer.vocab_size
        for piece, number in tokenizer.get_vocab().items():
            self.texts[number] = piece if piece in added else _text(piece, is_byte_level)

    def texts_of(self, ids: NDArray[Any]) -> list[str]:
        """List the texts of some ids."""
        return [self.texts[number] for number in ids.tolist()]


def _text(piece: str, is_byte_level: bool) -> str:
    """Find the text of a piece of a vocabulary: bytes by GPT-2's alphabet, or words after a `▁`."""
    if not is_byte_level:
        return piece.replace("▁", " ")
    text = str(ByteLevel().decode([piece]))
    return piece if NO_TEXT in text else text
