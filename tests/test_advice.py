"""Advice that errors give is taken, word for word, and works."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from saemill import cli
from saemill.common.errors import SaemillError

SMALL = (
    "--ctx-len 32 --k 4 --num-latents 64 --held-out-fraction 0.3 --set assess.n_latents=0 "
    "--set assess.model_tokens=500 --set assess.max_tokens=1000"
)


def said(*arguments: str) -> tuple[int, str]:
    """Exit code and words of a command; those of an error that it ends with."""
    try:
        result = CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)
    except SaemillError as error:
        return 2, str(error)
    return result.exit_code, re.sub(r"[\s│]+", " ", result.output)


@pytest.fixture
def words(
    tiny_models: dict[str, str], tokenizer_folder: str, corpus: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, str]:  # fmt: skip
    """What stands for names in the commands below; they run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return {"M": tiny_models["neox"], "D": str(corpus), "T": tokenizer_folder}


def command(text: str, words: dict[str, str]) -> list[str]:
    return [words.get(word, word) for word in shlex.split(text)]


@pytest.mark.parametrize(
    ("wrong", "advice", "right"),
    [
        (
            f"run M D --tokenizer T {SMALL} --batch-size 256",
            r"add (--layers -1)",
            f"run M D --tokenizer T {SMALL} --batch-size 256 {{}}",
        ),
        (
            f"run M D --tokenizer T {SMALL} --layers 1 --batch-size 8",
            r"for 8 rows, as sparsify counts, say (\d+)",
            f"run M D --tokenizer T {SMALL} --layers 1 --batch-size {{}}",
        ),
        (
            f"run M D --tokenizer T {SMALL} --layers 1 --batch-size 16k",
            r"say (--epochs \d+)",
            f"run M D --tokenizer T {SMALL} --layers 1 --batch-size 16k {{}}",
        ),
        (
            f"run M D --tokenizer T {SMALL} --sites blocks.1.hook_resid_post --batch-size 256",
            r"is (--layers \d+)",
            f"run M D --tokenizer T {SMALL} {{}} --batch-size 256",
        ),
        (
            f"run M D --tokenizer T {SMALL} --layers 1 --batch-size 256 --held-out-fraction 0.999999999",
            "is given twice; (leave) one out",
            f"run M D --tokenizer T {SMALL} --layers 1 --batch-size 256",
        ),
        (
            f"run M D --tokenizer T {SMALL.replace('0.3', '0.999999999')} --layers 1 --batch-size 64",
            r"lower --held-out-fraction to (0\.\d+) or less",
            f"run M D --tokenizer T {SMALL.replace('0.3', '{}')} --layers 1 --batch-size 64 --epochs 99",
        ),
        (
            f"run M D --tokenizer T {SMALL} --layers 1 --batch-size 256 --optimizer sgd",
            "sgd; give (--lr)",
            f"run M D --tokenizer T {SMALL} --layers 1 --batch-size 256 --optimizer sgd {{}} 0.01",
        ),
        (
            f"run M D --tokenizer T {SMALL} --layers 1 --batch_sise 256",
            r"did you mean (--batch-size)\?",
            f"run M D --tokenizer T {SMALL} --layers 1 {{}} 256",
        ),
        (
            f"run M D --tokenizer T {SMALL.replace('32', '256')} --layers 1 --batch-size 1k",
            r"tokenize with (--ctx-len \d+)",
            f"run M D --tokenizer T {SMALL.replace('--ctx-len 32', '{}')} --layers 1 --batch-size 1k",
        ),
    ],
)  # fmt: skip
def test_advice_to_run(wrong: str, advice: str, right: str, words: dict[str, str]) -> None:
    """Oracle: the second command, made of the first one's message, ends well with SAEs on disk."""
    code, message = said(*command(wrong, words))
    assert code == 2
    found = re.search(advice, message)
    assert found, message
    code, message = said(*command(right.format(found.group(1)), words))
    assert code == 0, message
    assert list(Path("saemill-out/runs").glob("*/*/sae.safetensors"))


def test_advice_to_who_calls_it_as_sparsify(words: dict[str, str]) -> None:
    """Oracle: the advised command is parsed, and its flags are enough: it tells of the tokenizer or runs."""
    code, message = said(words["M"], words["D"])
    assert code == 2
    advised = re.search(r"`saemill (run .*)`", message)
    assert advised, message
    code, message = said(*shlex.split(advised.group(1)), "--tokenizer", words["T"], *shlex.split(SMALL))
    assert code == 0, message


def test_advice_to_stages(words: dict[str, str]) -> None:
    """Oracle: the stages' exit codes after what their errors advise."""
    tokenize = command("tokenize D --tokenizer T --ctx-len 32 -o t", words)
    assert said(*tokenize)[0] == 0
    code, message = said(*command("cache t --model M -o a", words))
    flag = re.search(r"add (--layers -1)", message)
    assert flag, message
    assert said(*command("cache t --model M -o a", words), *flag.group(1).split())[0] == 0
    code, message = said("train", "a", "--site", "layers.9", "-o", "r", "--batch-size", "256")
    assert code == 2
    site = re.search(r"(layers\.[0-8])", message)
    assert site, message
    sae = ("--site", site.group(1), "--k", "4", "--num-latents", "64", "-o", "r")
    code, message = said("train", "a", *sae, "--batch-size", "8")
    batch = re.search(r"as sparsify counts, say (\d+)", message)
    assert batch, message
    assert said("train", "a", *sae, "--batch-size", batch.group(1))[0] == 0
