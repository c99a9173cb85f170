"""What a tokenizer puts around a text, for tokenizers of every kind; none is fetched."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import Regex, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from saemill.common.errors import ConfigError
from saemill.common.models.tokenizer import check_ctx_len, frame_of, load_tokenizer
from saemill.common.stores.tokens import TokenizerInfo
from saemill.tokenize.config import TokenizeConfig
from saemill.tokenize.run import run


def fast(model: Any, template: str | None, specials: dict[str, int], pre: Any, **named: str) -> Any:
    """A tokenizer of the library, with a template of its own."""
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = pre
    if template:
        made.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=list(specials.items())
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, **named)


def words(template: str | None, **named: str) -> Any:
    """Whole words; ids 0..5 are special."""
    names = ["<s>", "</s>", "<unk>", "<pad>", "<cls>", "<sep>"]
    vocab = {name: i for i, name in enumerate([*names, "hills", "green", "over"])}
    specials = {name: vocab[name] for name in names}
    model = models.WordLevel(vocab, unk_token="<unk>")
    return fast(model, template, specials, pre_tokenizers.WhitespaceSplit(), unk_token="<unk>", **named)


def dna() -> Any:
    """Four letters and N: no "a", no <unk>."""
    vocab = {c: i for i, c in enumerate(["<s>", "</s>", *"ACGTN"])}
    pre = pre_tokenizers.Split(Regex("."), "isolated")
    return fast(
        models.BPE(vocab, []), "<s> $A", {"<s>": 0, "</s>": 1}, pre, bos_token="<s>", eos_token="</s>"
    )


def dna_words() -> Any:
    """Codons as words, without <unk>: any other word gives nothing."""
    vocab = {"<cls>": 0, "<eos>": 1, "ATG": 2, "GGA": 3}
    pre = pre_tokenizers.WhitespaceSplit()
    return fast(
        models.WordLevel(vocab, unk_token="ATG"), "<cls> $A <eos>", {"<cls>": 0, "<eos>": 1}, pre,
        cls_token="<cls>", eos_token="<eos>",
    )  # fmt: skip


def unigram() -> Any:
    """A dummy prefix before each text."""
    vocab = [("<s>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁x", -1.0), ("y", -1.5), ("x", -1.5)]
    return fast(
        models.Unigram(vocab, unk_id=2), "$A </s>", {"</s>": 1}, pre_tokenizers.Metaspace(),
        eos_token="</s>", unk_token="<unk>",
    )  # fmt: skip


class Slow(transformers.PreTrainedTokenizer):  # type: ignore[misc]
    """Letters, in Python; <s> before a text and </s> after it."""

    def __init__(self, **named: Any) -> None:
        self.letters = {"<s>": 0, "</s>": 1, "<unk>": 2, "X": 3, "Y": 4}
        super().__init__(bos_token="<s>", eos_token="</s>", unk_token="<unk>", **named)

    @property
    def vocab_size(self) -> int:
        return len(self.letters)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.letters)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.letters.get(token, 2)

    def _convert_id_to_token(self, index: int) -> str:
        return list(self.letters)[index]

    def build_inputs_with_special_tokens(self, ids: list[int], pair: Any = None) -> list[int]:
        assert pair is None
        return [0, *ids, 1]


CASES: dict[str, tuple[Callable[[], Any], tuple[int, ...], tuple[int, ...]]] = {
    "bert": (lambda: words("<cls> $A <sep>", cls_token="<cls>", sep_token="<sep>"), (4,), (5,)),
    "llama": (lambda: words("<s> $A", bos_token="<s>", eos_token="</s>"), (0,), ()),
    "t5": (lambda: words("$A </s>", eos_token="</s>"), (), (1,)),
    "gpt2": (lambda: words(None, eos_token="</s>"), (), ()),
    "xlnet": (
        lambda: words("$A <sep> <cls>", eos_token="</s>", cls_token="<cls>", sep_token="<sep>"),
        (),
        (5, 4),
    ),
    "two before": (lambda: words("<s> <cls> $A", bos_token="<s>", eos_token="</s>"), (0, 4), ()),
    "dna": (dna, (0,), ()),
    "codons": (dna_words, (0,), (1,)),
    "unigram": (unigram, (), (1,)),
    "slow": (Slow, (0,), (1,)),
}


@pytest.mark.parametrize("kind", CASES)
def test_frame(kind: str) -> None:
    """Oracle: the template that the tokenizer was made with."""
    make, prefix, suffix = CASES[kind]
    assert frame_of(make()) == (prefix, suffix)


def test_rows_of_dna_begin_with_its_token(tmp_path: Path) -> None:
    """Oracle: the template's BOS at the start of each row, and the letters after it."""
    dna().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text("ACGT" * 40)
    config = TokenizeConfig(
        dataset=str(tmp_path / "a.txt"), tokenizer=str(tmp_path / "tokenizer"), out=tmp_path / "out",
        ctx_len=9, held_out_fraction=0,
    )  # fmt: skip
    store = run(config)
    assert store.tokenizer.prefix_ids == (0,)
    assert store.rows(0, 2).tolist() == [[0, *[2, 3, 4, 5] * 2]] * 2


def test_a_tokenizer_that_knows_no_word_is_refused() -> None:
    """Oracle: a vocabulary of special tokens and words that its pre-tokenizer takes apart."""
    vocab = {"<unk>": 0, "</s>": 1, "two words": 2}
    made = fast(
        models.WordLevel(vocab, unk_token="<unk>"), None, {}, pre_tokenizers.WhitespaceSplit(),
        unk_token="<unk>", eos_token="</s>",
    )  # fmt: skip
    with pytest.raises(ConfigError, match="no word of its own vocabulary gives an id"):
        frame_of(made)


class Moody(Slow):
    """Puts another frame around longer texts, as no template can."""

    def build_inputs_with_special_tokens(self, ids: list[int], pair: Any = None) -> list[int]:
        return [0, *ids, 1] if 3 in ids else [*ids, 1]


class Reversing(Slow):
    """Changes the text itself."""

    def build_inputs_with_special_tokens(self, ids: list[int], pair: Any = None) -> list[int]:
        return [0, *(7 - token for token in ids), 1]


def test_what_is_no_template_is_refused_with_what_to_do() -> None:
    """Oracle: frames that differ between two words; a text that comes out changed."""
    with pytest.raises(ConfigError, match=r"around one text, but not around another; set its post-processor"):
        frame_of(Moody())
    with pytest.raises(ConfigError, match=r"changes a text .* set its post-processor to a template"):
        frame_of(Reversing())


def test_a_tokenizer_with_code_of_its_own(tmp_path: Path) -> None:
    """Oracle: transformers refuses it with a Python argument, which the message does not name; what the
    message advises makes the tokenizer load."""
    made = words("<s> $A", bos_token="<s>", eos_token="</s>")
    made.save_pretrained(tmp_path / "own")
    file = tmp_path / "own" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    own = {"auto_map": {"AutoTokenizer": ["code.Own", None]}, "tokenizer_class": "Own"}
    file.write_text(json.dumps(config | own))
    (tmp_path / "own" / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ConfigError, match="needs code of its own, which saemill does not run") as caught:
        load_tokenizer(str(tmp_path / "own"), None)
    assert "trust_remote_code" not in str(caught.value)
    file.write_text(json.dumps({k: v for k, v in (config | own).items() if k != "auto_map"}))
    assert load_tokenizer(str(tmp_path / "own"), None)[1].prefix_ids == (0,)


def test_ctx_len_that_leaves_no_room() -> None:
    """Oracle: the least length that the message names, and one less."""
    made = words("<s> $A </s>", bos_token="<s>", eos_token="</s>")
    info = TokenizerInfo(
        name="/absent/x", hash="0" * 16, vocab_size=9, prefix_ids=(0,), suffix_ids=(1,), separator_id=1,
        special_ids=(0, 1), pad_id=None, mask_id=None,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"ctx_len 2 leaves no room .* must be 3 or more"):
        check_ctx_len(2, made, info, None)
    check_ctx_len(3, made, info, None)
