"""Other tools' words: one table, shared by errors and docs/migration.md, of all their config classes."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from peers import PYTHON, ROOT, require_peers
from typer.testing import CliRunner

from saemill import cli
from saemill.common import elsewhere
from saemill.common.config import build
from saemill.common.errors import ConfigError
from saemill.pipeline.stages import CONFIGS
from saemill.train.config import TrainConfig

PAGE = ROOT / "docs" / "migration.md"
FIELDS = """
import ast, dataclasses, importlib.util, json
from pathlib import Path

def of(*classes):
    return sorted({field.name for kind in classes for field in dataclasses.fields(kind)})

def arguments(file, *wanted):
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        for function in node.body if isinstance(node, ast.ClassDef) else [node]:
            owner, is_one = getattr(node, "name", ""), isinstance(function, ast.FunctionDef)
            if is_one and owner in wanted and function.name in (owner, "__init__"):
                names |= {a.arg for a in function.args.args + function.args.kwonlyargs} - {"self"}
    return names

import sae_lens
from sae_lens.config import (CacheActivationsRunnerConfig, LanguageModelSAERunnerConfig, LoggingConfig,
                             PretokenizeRunnerConfig)
from sparsify.config import SparseCoderConfig
from sparsify.__main__ import RunConfig
kinds = ("TopK", "BatchTopK", "Standard", "Gated", "JumpReLU", "MatryoshkaBatchTopK")
folder = Path(importlib.util.find_spec("dictionary_learning").submodule_search_locations[0])
theirs = arguments(folder / "training.py", "trainSAE") | arguments(folder / "buffer.py", "ActivationBuffer")
for file, trainer in (
    ("top_k", "TopK"), ("standard", "Standard"), ("batch_top_k", "BatchTopK"), ("p_anneal", "PAnneal"),
    ("matryoshka_batch_top_k", "MatryoshkaBatchTopK"), ("jumprelu", "JumpRelu"), ("gdm", "GatedSAE"),
    ("gated_anneal", "GatedAnneal"),
):
    theirs |= arguments(folder / "trainers" / f"{file}.py", f"{trainer}Trainer")
print(json.dumps({
    "sparsify": of(SparseCoderConfig, RunConfig),
    "SAELens": of(LanguageModelSAERunnerConfig, LoggingConfig, PretokenizeRunnerConfig,
                  CacheActivationsRunnerConfig, *(getattr(sae_lens, k + "TrainingSAEConfig") for k in kinds)),
    "dictionary_learning": sorted(theirs),
}))
"""


def page_rows(tool: str) -> list[str]:
    """The lines that the page has for a tool's settings, alike ones together."""
    alike: dict[elsewhere.Setting, list[str]] = {}
    for name, setting in elsewhere.TOOLS[tool].items():
        alike.setdefault(setting, []).append(name)
    return [
        f"| {', '.join(f'`{name}`' for name in names)} | {here or 'none'} | {why} |"
        for (here, why), names in alike.items()
    ]


@pytest.mark.parametrize("tool", elsewhere.TOOLS)
def test_the_page_is_the_table(tool: str) -> None:
    """Oracle: the page's own lines below the tool's heading, in their order."""
    section = PAGE.read_text().split(f"\n## {tool}\n")[1].split("\n## ")[0]
    assert [line for line in section.splitlines() if line.startswith("| `")] == page_rows(tool)


def test_every_setting_of_the_peers_has_a_row(tmp_path: Path) -> None:
    """Oracle: the fields of the config classes of sparsify and SAELens, and the parameters of
    dictionary_learning's functions, as their environment has them."""
    require_peers()
    environment = os.environ | {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [PYTHON, "-c", FIELDS], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for tool, names in json.loads(done.stdout.splitlines()[-1]).items():
        assert len(names) > 20
        assert set(names) - set(elsewhere.TOOLS[tool]) == set(), tool


def test_every_flag_in_the_table_is_one_of_ours() -> None:
    """Oracle: the help of `saemill run` and `saemill push`, and the dataclasses behind `--set`."""
    helps = "".join(
        CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "300"}).output
        for command in ("run", "push", "tokenize")
    )
    flags = set(re.findall(r"--[a-z0-9-]+", helps))
    for settings in elsewhere.TOOLS.values():
        for here, _ in settings.values():
            for flag in re.findall(r"`(--[a-z0-9-]+)`", here):
                assert flag in flags
            for section, name in re.findall(r"--set (\w+)\.(\w+)", here):
                assert name in CONFIGS[section].__dataclass_fields__


def output(*arguments: str) -> str:
    """What the command line says of wrong words, lines joined."""
    result = CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "400", "TERM": "dumb"})
    assert result.exit_code == 2, result.output
    return re.sub(r"[\s│]+", " ", result.output)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("run", "--distribute_layers"), "distribute_layers of sparsify has no equal here: several"),
        (("run", "--micro_acc_steps=2"), "has no equal here: latents are computed in chunks in any case"),
        (("train", "a", "--d_sae", "64"), "d_sae of SAELens is `--num-latents` here"),
        (("run", "--l1_warm_up_steps", "5"), "is `--set train.penalty_warmup_steps=` here"),
        (("run", "--lr_scheduler_name", "constant"), "is `--set train.lr_schedule=` here: constant, cosine"),
        (("run", "--n", "4"), "no option --n; see"),
        (("train", "a", "--ka", "4"), "did you mean --k?"),
        (
            ("assess", "a", "--expansion-factor", "4"),
            "it is a flag of `saemill run`, `saemill plan`, `saemill train`",
        ),
        (
            ("run", "m", "d", "--l1-coefficient", "1"),
            "it is a flag of `saemill train`; here it is --set train.l1_coefficient=",
        ),
        (("Eleuther/pythia", "text.jsonl"), "`saemill run Eleuther/pythia text.jsonl --layers -1`"),
        (("trian", "acts"), "no command 'trian'; did you mean `saemill train`?"),
        (("frobnicate",), "no command 'frobnicate'; known: run, plan, matrix,"),
        (("run", "m", "d", "e"), "'e' is more than the command takes"),
    ],
)  # fmt: skip
def test_their_words_get_an_answer(arguments: tuple[str, ...], told: str) -> None:
    """Oracle: what is said, by hand; no name that is not near is offered."""
    assert told in output(*arguments)


@pytest.mark.parametrize(
    "name", ["l1_warm_up_steps", "eval_every_n_wandb_logs", "begin_batch_token", "micro_acc_steps"]
)
def test_their_settings_get_an_answer(name: str) -> None:
    """Oracle: the table's words in the error of a config file."""
    with pytest.raises(ConfigError, match=re.escape(str(elsewhere.answer(name)))):
        build(TrainConfig, {"acts": "a", "out": "o", name: 1}, "train")


@pytest.mark.parametrize(
    ("hook", "told"),
    [
        ("blocks.6.hook_resid_post", "--layers 6"),
        ("blocks.6.hook_resid_pre", "--layers 5"),
        ("blocks.0.hook_resid_pre", "sites are module paths"),
        ("blocks.3.hook_mlp_out", "sites are module paths"),
        ("blocks.3.attn.hook_z", "sites are module paths"),
        ("layers.6", None),
        ("blocks.6", None),
    ],
)
def test_hooks_of_transformerlens(hook: str, told: str | None) -> None:
    """Oracle: TransformerLens' own meaning of its names; what is none of them is left alone."""
    answer = elsewhere.of_hook(hook)
    assert answer is None if told is None else told in str(answer)


def written() -> None:
    """Write the tables into the page."""
    text = PAGE.read_text()
    for tool in elsewhere.TOOLS:
        head, rest = text.split(f"\n## {tool}\n")
        section, *more = rest.split("\n## ", 1)
        prose = "\n".join(line for line in section.splitlines() if not line.startswith("|")).strip()
        table = "\n".join(["| theirs | `saemill run` | what differs |", "|---|---|---|", *page_rows(tool)])
        after = f"\n\n## {more[0]}" if more else "\n"
        text = f"{head}\n## {tool}\n\n{prose}\n\n{table}{after}"
    Path(PAGE).write_text(text)
