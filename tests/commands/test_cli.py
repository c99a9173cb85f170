"""The command line's own words: flags given twice, and names that would steer the terminal."""

import dataclasses
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import typer
from rich.table import Table
from typer.testing import CliRunner

from saemill import cli
from saemill.assess.config import AssessConfig
from saemill.cache.config import CacheConfig
from saemill.commands.flags import Flag
from saemill.commands.run import FLAGS
from saemill.commands.words import Words
from saemill.common.log import console, printable, say
from saemill.compare.config import CompareConfig
from saemill.embeddings.config import EmbedConfig, ImportConfig
from saemill.generate.config import GenerateConfig
from saemill.pipeline.stages import CONFIGS
from saemill.tokenize.config import TokenizeConfig
from saemill.train.config import TrainConfig

COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
OF_COMMAND = {
    "tokenize": TokenizeConfig, "cache": CacheConfig, "train": TrainConfig, "assess": AssessConfig,
    "import-activations": ImportConfig, "embed": EmbedConfig, "generate": GenerateConfig,
    "compare": CompareConfig,
}  # fmt: skip


def is_list(kind: Any, name: str) -> bool:
    return "tuple" in str(get_type_hints(kind)[name])


@pytest.mark.parametrize("command", OF_COMMAND)
def test_every_list_collects(command: str) -> None:
    """Oracle: the types of the settings: a flag is given more than once exactly where they are lists."""
    kind = OF_COMMAND[command]
    fields = {field.name for field in dataclasses.fields(kind)}
    options = {p.name: p for p in COMMANDS[command].params if p.param_type_name == "option"}
    shared = (fields & set(options)) - {"mix"}  # a file with the list
    assert len(shared) >= 5
    for name in shared:
        assert options[name].multiple == is_list(kind, name), name


def test_every_list_of_run_collects() -> None:
    """Oracle: as above, by what each flag sets."""
    options = {p.name: p for p in COMMANDS["run"].params}
    for flag in FLAGS:
        section, _, name = (flag.setting if isinstance(flag, Flag) else flag).partition(".")
        if section in CONFIGS and "." not in name:
            assert options[name].multiple == is_list(CONFIGS[section], name), name


def told(monkeypatch: pytest.MonkeyPatch, command: str, *arguments: str) -> Any:
    """The settings that a command makes of words."""
    made: list[Any] = []
    monkeypatch.setattr(f"saemill.{command}.run.run", made.append)
    result = CliRunner().invoke(cli.app, [command, *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return made[0]


@pytest.mark.parametrize("words", ["--k 4 --k 8", "--k 4,8", "--k 4 8", "--k=4 8", "--k=4 --k=8", "--k 4, 8"])
def test_ways_to_write_a_list(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the list by hand; what stands beside it is not swallowed."""
    config = told(monkeypatch, "train", "acts", "-o", "r", *words.split(), "--site", "a", "b", "--lr=1e-3")
    assert (config.k, config.site, config.lr) == ((4, 8), ("a", "b"), (1e-3,))
    config = told(monkeypatch, "train", *words.split(), "acts", "-o", "r")
    assert (config.k, config.acts) == ((4, 8), Path("acts"))


@pytest.mark.parametrize(
    "words",
    [
        "--epochs 1 --epochs 2",
        "--warmup_steps 1 --warmup-steps 1",
        "--resume --no-resume",
        "--device cpu --device=cpu",
        "-o a -o b",
    ],
)
def test_a_single_setting_is_given_once(words: str) -> None:
    """Oracle: a refusal that names the flag."""
    result = CliRunner().invoke(cli.app, ["train", "acts", *words.split()])
    assert result.exit_code == 2
    assert "is given twice; leave one out" in re.sub(r"[\s│]+", " ", result.output)


def test_a_flag_and_a_set_of_one_setting_are_refused() -> None:
    """Oracle: the two values would contradict one another; which was meant cannot be told."""
    with pytest.raises(ValueError, match=r"k is given twice, by --set k=6 and by the flag for k, '4'"):
        CliRunner().invoke(
            cli.app, ["train", "a", "-o", "r", "--k", "4", "--set", "train.k=6"], catch_exceptions=False
        )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("M D --layers 0 1 -1 --k 8", "M D --layers 0 --layers 1 --layers -1 --k 8"),
        ("--layers 0 M D", "--layers 0 M D"),
        ("M D --hookpoints a b --k 4", "M D --hookpoints a --hookpoints b --k 4"),
        ("M --hookpoints a D", "M --hookpoints a D"),
        ("--log_to_wandb true M", "--log-to-wandb M"),
        ("--log_to_wandb=False M", "--no-log-to-wandb M"),
        ("--log_to_wandb M D", "--log-to-wandb M D"),
        ("M D -- --k 4", "M D -- --k 4"),
        ("M D --set a=1 --k", "M D --set a=1 --k"),
        ("M D --k 8 -o out", "M D --k 8 -o out"),
    ],
)
def test_words_as_other_tools_write_them(words: str, expected: str) -> None:
    """Oracle: the words by hand, as click takes them."""
    assert Words(COMMANDS["run"].params).rewritten(words.split()) == expected.split()


ESCAPES = "\x1b]0;owned\x07 \x1b[31mred\x9b2J\r\u202eabc\u2066\x00\x7f"


def test_nothing_steers_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    """Oracle: no control character but line ends and tabs comes out; other letters stay."""
    say(f"a name: {ESCAPES}\nnext\tline, ä 日本 😀 \udcff")
    out = capfd.readouterr().out
    assert all(character in "\n\t" or character.isprintable() for character in out)
    assert "\\x1b[31mred" in out
    assert "\nnext\tline, ä 日本 😀" in out
    assert printable("plain – text") == "plain – text"


@pytest.mark.parametrize(
    "arguments", [["show", ESCAPES[:-2]], ["frob" + ESCAPES[:-2]], ["run", "--x" + ESCAPES[:-2]]]
)
def test_no_error_steers_the_terminal(
    arguments: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: as above, for names in errors of stages and of the command line."""
    monkeypatch.setattr(sys, "argv", ["saemill", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    told = capfd.readouterr().err
    assert "error: " in told
    assert all(character in "\n\t" or character.isprintable() for character in told)


def test_nothing_that_datasets_logs_steers_the_terminal(tmp_path: Path, tokenizer_folder: str) -> None:
    """Oracle: as above, of all that a process tells: `datasets` logs the name of a file it cannot read."""
    file = tmp_path / f"{ESCAPES[:-2]}.jsonl"
    file.write_text('{"text": ')
    words = ["tokenize", str(file), "--tokenizer", tokenizer_folder, "-o", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-m", "saemill", *words], capture_output=True)
    told = done.stderr.decode().replace("\rGenerating", "Generating")
    assert "Failed to load JSON from file" in told
    assert told.count("\\x1b[31mred") == 2
    assert all(character in "\n\t" or character.isprintable() for character in told)


def test_names_are_no_markup() -> None:
    """Oracle: the names themselves, which rich would colour, or turn into pictures."""
    table = Table("[red]", title="[bold]t[/bold]")
    table.add_row("[link=x]a[/link] :smile:")
    shown = console(width=80, record=True, file=io.StringIO())
    shown.print(table)
    text = shown.export_text()
    for name in ("[red]", "[bold]t[/bold]", "[link=x]a[/link] :smile:"):
        assert name in text


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_every_help_reads(command: str | None) -> None:
    """Oracle: each command has a sentence, and every flag one of its own."""
    result = CliRunner().invoke(cli.app, [*([command] if command else []), "--help"])
    assert result.exit_code == 0
    if command:
        assert COMMANDS[command].help
        assert all(p.help for p in COMMANDS[command].params if p.param_type_name == "option")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_shown_as_it_is_written(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the flags' own texts; typer's help is markdown, in which an asterisk is none."""
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 2000)
    shown = " ".join(CliRunner().invoke(cli.app, [command, "--help"]).output.split())
    for parameter in COMMANDS[command].params:
        if parameter.help and not getattr(parameter, "hidden", False):
            assert re.sub(r"[`\\]", "", " ".join(parameter.help.split())) in shown
