"""The flags of `saemill run`: other tools' ones, lists, and settings that exist."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from saemill import cli
from saemill.commands.flags import Flag
from saemill.commands.run import FLAGS
from saemill.common import setting
from saemill.pipeline.config import RunConfig
from saemill.pipeline.stages import CONFIGS


def given(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    """What the command line makes of arguments."""
    told: dict[str, Any] = {}

    def stand_in(
        model: Any, dataset: Any, flags: Any, file: Any, sets: Any, is_plan: bool
    ) -> Callable[[], None]:
        told.update({name: value for name, value in flags.items() if value is not None})
        told.update(model=model, dataset=dataset, file=file)
        return lambda: None

    monkeypatch.setattr("saemill.pipeline.run.chain_of", stand_in)
    result = CliRunner().invoke(cli.app, ["run", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return told


def test_flags_of_saetrain_and_sparsify(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: settings written here by hand, from those tools' own names and ways of writing lists."""
    told = given(
        monkeypatch, "bert-base-uncased", "wikitext", "--layers", "0", "1", "-1", "--max_tokens", "1000000",
        "--batch_size", "4096", "--k", "192", "--expansion_factor", "32", "--grad_acc_steps", "8",
        "--ctx_len", "512", "--optimizer", "adam", "--lr", "0.001", "--save_dir", "my_output",
        "--run_name", "bert_layer6", "--log_to_wandb", "true",
        "--wandb_log_frequency", "100", "--dead_percentage_threshold", "0.0005",
        "--shuffle_seed", "42", "--init_seeds", "42", "43", "--save_every", "500", "--loss_fn", "fvu",
        "--data_preprocessing_num_proc", "2", "--load_in_8bit", "False", "--hookpoints", "layers.*.mlp",
        "--dead_feature_threshold", "10_000_000", "--lr_warmup_steps", "100", "--auxk_alpha", "0.03",
    )  # fmt: skip
    assert told == {
        "model": "bert-base-uncased", "dataset": "wikitext", "file": None, "cache.layers": "0,1,-1",
        "tokenize.max_tokens": "1000000", "train.batch_size": "4096", "train.k": "192",
        "train.expansion_factor": "32", "train.grad_acc_steps": "8", "tokenize.ctx_len": "512",
        "train.optimizer": "adam", "train.lr": "0.001", "run.save_dir": Path("my_output"),
        "run.run_name": "bert_layer6", "train.log_to_wandb": True,
        "train.log_every": "100",
        "assess.dead_percentage_threshold": "0.0005",
        "tokenize.shuffle_seed": "42", "train.seeds": "42,43", "train.save_every": "500", "train.loss": "fvu",
        "tokenize.num_proc": "2", "cache.load_in_8bit": False, "cache.sites": "layers.*.mlp",
        "train.dead_after_tokens": "10_000_000", "train.warmup_steps": "100", "train.auxk_alpha": "0.03",
    }  # fmt: skip


def test_lists_take_numbers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a model and a dataset after a list, and a switch before them, stay what they are."""
    told = given(monkeypatch, "--layers=2", "3", "--log_to_wandb", "some/model", "--k", "8", "data.jsonl")
    assert told["model"] == "some/model"
    assert told["dataset"] == "data.jsonl"
    assert (told["cache.layers"], told["train.k"], told["train.log_to_wandb"]) == ("2,3", "8", True)
    assert given(monkeypatch, "study.yaml", "--k", "8")["file"] == Path("study.yaml")


def test_every_setting_that_a_flag_names_exists() -> None:
    """Oracle: the stages' own fields."""
    for flag in FLAGS:
        section, _, name = (flag.setting if isinstance(flag, Flag) else flag).partition(".")
        config: Any = (CONFIGS | {"run": RunConfig})[section]
        *groups, last = name.split(".")
        for group in groups:
            config = setting.types(config)[group]
        assert last in {field.name for field in dataclasses.fields(config)}, flag
