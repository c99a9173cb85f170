"""Texts of a few words, and a WordPiece tokenizer of them."""

import random
from pathlib import Path

import transformers

WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "seven", "dogs", "ran", "over", "green", "hills"]


def random_texts(n: int, seed: int = 0, words: int = 60) -> list[str]:
    """Distinct documents of some words each."""
    generator = random.Random(seed)
    return [f"{i}. " + " ".join(generator.choices(WORDS, k=generator.randint(5, words))) for i in range(n)]


def bert_tokenizer(folder: Path) -> str:
    """Save BERT's WordPiece tokenizer with these words, letters and digits; the folder's name."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    pieces = [*letters, ".", *(f"##{letter}" for letter in letters)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = ["the", "cat", "sat", "on", "mat", "while", "seven", "dogs", "ran", "over", "green", "hills"]
    (folder / "vocab.txt").write_text("\n".join([*special, *pieces, *words]))
    tokenizer = transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    return str(folder)
