"""All stages' settings, whatever is put into them: refused in words, or taken as what they say; what of them
decides a result; and the page that lists them."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from saemill.assess.config import AssessConfig, LatentConfig, Thresholds
from saemill.cache.config import CacheConfig
from saemill.common import config, durable, setting, yaml_text
from saemill.common.config import SECTIONS, build, plain, read_sections, resolve
from saemill.common.errors import ConfigError, SaemillError
from saemill.common.stores.mask import MaskConfig, TrainingMask
from saemill.compare.config import CompareConfig
from saemill.convert_store.config import ConvertConfig
from saemill.diff.config import DiffConfig
from saemill.embeddings.config import EmbedConfig, ImportConfig
from saemill.explain.config import ExplainConfig
from saemill.generate.config import GenerateConfig
from saemill.latents.config import ExportLatentsConfig
from saemill.pipeline.config import RunConfig
from saemill.pipeline.matrix import MatrixConfig, Source, Target
from saemill.slurm.settings import JobConfig, SlurmConfig
from saemill.tokenize.config import MixedDataset, TokenizeConfig
from saemill.train.config import TrainConfig
from saemill.view.config import ViewConfig

LEAST: dict[Any, dict[str, Any]] = {
    TokenizeConfig: {"dataset": "d", "tokenizer": "t", "out": "o"},
    CacheConfig: {"tokens": "t", "model": "m", "out": "o", "layers": [0]},
    TrainConfig: {"acts": "a", "out": "o"},
    AssessConfig: {"run": "r"},
    Thresholds: {},
    LatentConfig: {"run": "r", "latents": ["1"]},
    ViewConfig: {"run": "r"},
    MaskConfig: {},
    CompareConfig: {"saes": ["a"]},
    DiffConfig: {"out": "o"},
    ConvertConfig: {"source": "s", "out": "o"},
    ExplainConfig: {"run": "r", "url": "http://h/v1", "model": "m"},
    ExportLatentsConfig: {"run": "r", "format": "delphi", "out": "o"},
    GenerateConfig: {"model": ["m"], "out": "o", "n_samples": 1},
    EmbedConfig: {"dataset": "d", "model": "m", "out": "o"},
    ImportConfig: {"source": "s", "out": "o"},
    RunConfig: {},
    MatrixConfig: {"out": "o", "targets": {"a": {}}, "sources": {"b": {}}},
    Target: {"model": "m"},
    Source: {"dataset": "d"},
    MixedDataset: {"dataset": "d", "share": 1},
    JobConfig: {},
    SlurmConfig: {},
}
"""The fewest settings of each class."""
BAD: list[Any] = [
    math.nan, math.inf, -math.inf, "nan", "inf", "-inf", ".nan", "1e999999999", "-1e999999999",
    "1e-999999999", "9" * 10**6, 10**5000, 2**70, -(2**70), "2^70", -1, "-1", 0, True, False, "true", None,
    "none", "", " ", "\0", "\ud800", "a" * 5000, "../x", [], [[]], [None], {}, {"a": 1}, {1: 2}, b"x",
    object(), 1.5, "1,,2", "0x10", ["x", 1],
]  # fmt: skip
FIELDS = [(kind, field.name) for kind in LEAST for field in dataclasses.fields(kind)]


def numbers_in(value: Any) -> list[Any]:
    """All numbers in plain values, truth values left out."""
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers_in(item)]
    if isinstance(value, list | tuple):
        return [number for item in value for number in numbers_in(item)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def tried(kind: Any, values: Mapping[str, Any]) -> tuple[Any, str]:
    """The settings, or None and why not."""
    try:
        return build(kind, values, "x"), ""
    except SaemillError as error:
        return None, str(error)


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=[f"{kind.__name__}.{name}" for kind, name in FIELDS])
def test_every_setting_takes_what_it_can_mean_or_says_no(kind: Any, name: str) -> None:
    """Oracle: nothing but a ConfigError of one short message comes out; what is taken has finite numbers,
    whole ones of at most 64 bits, none of them made of a truth value, and text of the same words."""
    hint = str(get_type_hints(kind)[name])
    for value in BAD:
        made, problem = tried(kind, {**LEAST[kind], name: value})
        assert len(problem) < 1500
        if made is None:
            continue
        if "Mapping" in hint:  # checked where they are read: the variants, the targets and sources
            continue
        taken = getattr(made, name)
        for number in numbers_in(plain(made).get(name)):
            assert math.isfinite(number)
            assert isinstance(number, float) or abs(number) < 2**63
        if isinstance(value, bool):
            assert taken is value, "a truth value is a number of nothing"
        if value in ("nan", "inf", "1e999999999"):
            assert isinstance(taken, str | Path) or isinstance(taken[0], str | Path), "text stays text"


@pytest.mark.parametrize("kind", LEAST, ids=lambda kind: kind.__name__)
def test_no_stage_takes_nan_in_python_either(kind: Any) -> None:
    """Oracle: the class itself, given NaN for each of its numbers."""
    made = build(kind, LEAST[kind], "x")
    for field in dataclasses.fields(kind):
        if get_type_hints(kind)[field.name] in (float, float | None):
            with pytest.raises(ConfigError):
                dataclasses.replace(made, **{field.name: math.nan})


IDENTITIES: list[tuple[Any, dict[str, Any], str]] = [
    (TokenizeConfig, {}, "5e27581ab03f693a"),
    (TokenizeConfig, {"ctx_len": 64, "shuffle_seed": None, "num_proc": 3}, "c4b56b93b948428e"),
    (CacheConfig, {}, "c37e8ceb92eafc17"),
    (CacheConfig, {"dtype": "fp16", "mask": {"first_positions": 2}, "batch_size": 3}, "7cdbb4b1b9ef4189"),
    (TrainConfig, {}, "88eebca923b7c47d"),
    (
        TrainConfig,
        {
            "site": ["s"], "k": [4, 8], "num_latents": [64], "lr": ["auto", 1e-3], "adam_betas": [0.9, 0.99],
            "k_aux": 7, "lr_decay": "cosine", "save_every": 5, "log_to_wandb": True, "run_name": "x",
            "precision": "bf16", "mask": {"token_ids": [3]}, "kernels": "torch",
        },
        "d19ab9db1fed1e99",
    ),
    (TrainConfig, {"follow": True}, "e21c448ba5669910"),
    (TrainConfig, {"follow": True, "follow_tokens": 4096}, "fce6be9ab85a5aa5"),
    (AssessConfig, {}, "dda8bdfdbfd3f714"),
    (
        AssessConfig,
        {"thresholds": {"min_l0": 3}, "tokens": "t", "latents": [1, 2], "out": "x", "device": "cpu"},
        "3a91977e6144c075",
    ),
    (EmbedConfig, {}, "53b4e6e0a4d104cc"),
    (EmbedConfig, {"prompt": "p", "batch_size": 8, "dtype": "bf16", "max_rows": 9}, "3306371ba5e72920"),
    (ImportConfig, {}, "5b20fe001e440c2f"),
    (ImportConfig, {"normalize": True, "width": 3, "shard_rows": 5, "texts": "t"}, "99fb165aca635200"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changed", "expected"), IDENTITIES)
def test_identities_stay_what_they_are(kind: Any, changed: dict[str, Any], expected: str) -> None:
    """Oracle: hashes of what the first version wrote to `identity.json`; with another one no store or run
    that is there could be continued."""
    made = build(kind, {**LEAST[kind], **changed})
    found = made.identity() if hasattr(made, "identity") else setting.identity(made)
    assert durable.hash_json(found) == expected


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (TokenizeConfig, "out chat_template num_proc"),
        (
            CacheConfig,
            "tokens out batch_size max_disk delete_consumed device device_map max_memory trust_remote_code",
        ),
        (
            TrainConfig,
            "acts out with_acts cross_layer init_from save_every log_every eval_every "
            "eval_tokens eval_losses_every eval_losses_tokens model n_checkpoints local_cache device "
            "kernels resume data_ranks latent_ranks profile log_to_wandb wandb_project wandb_entity run_name "
            "wandb_log_frequency wandb_artifacts log_to_tensorboard",
        ),
        (
            AssessConfig,
            "run acts with_acts local_cache model with_acts_model out device device_map max_memory "
            "log_to_wandb",
        ),
        (ImportConfig, "source out texts dtype shard_rows compression"),
        (EmbedConfig, "dataset model out dtype device shard_rows compression"),
        (GenerateConfig, "out batch_size device"),
    ],
)
def test_what_decides_nothing(kind: Any, expected: str) -> None:
    """Oracle: the list by hand: where things are, how fast they go, and what is told of them. Inputs are in
    identities by their content, types of storage in those of stores."""
    assert {name for name, marks in setting.of(kind).items() if not marks.decides} == set(expected.split())


SEEDS = [(TokenizeConfig, "shuffle_seed"), (TrainConfig, "shuffle_seed"), (TrainConfig, "seeds"),
         (GenerateConfig, "seed"), (CompareConfig, "seed"), (MatrixConfig, "seeds")]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), SEEDS, ids=lambda item: getattr(item, "__name__", item))
def test_seeds_are_of_63_bits(kind: Any, name: str) -> None:
    """Oracle: 0 and 2^63 − 1 are taken, their neighbours outside are not."""
    for value in (0, 2**63 - 1):
        build(kind, {**LEAST[kind], name: value})
    for value in (-1, 2**63, 2**70):
        with pytest.raises(ConfigError, match="seed"):
            build(kind, {**LEAST[kind], name: value})


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (AssessConfig, "thresholds", {"min_l0": 300}),
        (AssessConfig, "thresholds", {"max_dead_fraction": 1.5}),
        (AssessConfig, "latents", [-1]),
        (CacheConfig, "mask", {"token_ids": [-1]}),
        (CacheConfig, "layer_stride", 0),
        (TrainConfig, "k", [0]),
        (TrainConfig, "expansion_factor", [-2]),
        (TrainConfig, "num_latents", [0]),
        (TrainConfig, "auxk_alpha", -1),
        (TrainConfig, "weight_decay", -0.5),
        (TrainConfig, "adam_betas", [0.9]),
        (TrainConfig, "k_aux", 0),
        (TokenizeConfig, "held_out_fraction", 1),
        (EmbedConfig, "held_out_fraction", -0.1),
        (GenerateConfig, "temperature", 0),
        (MatrixConfig, "seeds", []),
        (Target, "layer_stride", 0),
    ],
    ids=lambda item: getattr(item, "__name__", str(item)),
)
def test_out_of_range(kind: Any, name: str, value: Any) -> None:
    """Oracle: each by hand: a value that has no meaning for its setting."""
    with pytest.raises(ConfigError):
        build(kind, {**LEAST[kind], name: value})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"train: {k: 4}\ntrain: {k: 8}\n", r"'train' is given in line 1 and again in line 2; keep one"),
        (b"train:\n  k: 4\n  lr: 1\n  k: 8\n", r"'k' is given in line 2 and again in line 4"),
        (b"train: {max-tokens: 1k, max_tokens: 2k}", "max_tokens is given twice, with dashes"),
        (b"train: {k: \xff}", r"is not UTF-8 text \(byte 11\)"),
        ("train: {k: 4}".encode("utf-16"), "is not UTF-8 text"),
        (b"train: " + b"[" * 1000 + b"]" * 1000, "is nested too deeply"),
        (b"train: {k: !!int x}", "k.* must be a whole number"),
        (b"train: {k: !!timestamp x}", "k.* must be a whole number"),
        (b"train: {k: !!python/object:os.system x}", "is not valid YAML"),
        (b"train: {k: !!bool x}", "is not valid YAML: .* leave out tags"),
        (b"train: {? [a] : 1}", "line 1: a key must be a plain name"),
        (b"train: {5: 1}", "unknown setting train.5"),
        (b"5: {}", "unknown section '5'"),
        (b"train: false", "section 'train' must be a group of settings, got False"),
        (b"train: 0", "section 'train' must be a group of settings, got 0"),
        (b"train: {k: 2024-01-01}", "must be a whole number .* got '2024-01-01'"),
        (b"train: {lr: .nan}", "must be auto or a number, got '.nan'"),
        (b"train: {k: " + b"9" * 10**6 + b"}", r"must be a whole number .* \(1,000,002 characters\)"),
        (b"train: {k: 1e999999999}", "must be a whole number"),
        (b"train: &a {k: *a}", "more than 100,000 values"),
        (b"\0", "is not valid YAML"),
    ],
)  # fmt: skip
def test_files_that_are_no_settings(tmp_path: Path, text: bytes, message: str) -> None:
    """Oracle: the message, by hand; none is a traceback, none takes long."""
    file = tmp_path / "settings.yaml"
    file.write_bytes(text)
    with pytest.raises(ConfigError, match=message):
        resolve(TrainConfig, "train", {"acts": "a", "out": "o"}, file)


def test_aliases_that_explode(tmp_path: Path) -> None:
    """Oracle: nine lines that stand for 10^9 values are refused by their number; an alias itself is taken."""
    lines = ["a: &a [1,1,1,1,1,1,1,1,1,1]"]
    lines += [
        f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    with pytest.raises(ConfigError, match="more than 100,000 values, aliases written out"):
        yaml_text.parse("\n".join(lines), "text")
    assert yaml_text.parse("a: &x {k: [1, 2]}\nb: *x\nc: {<<: *x, n: 3}", "text") == {
        "a": {"k": [1, 2]}, "b": {"k": [1, 2]}, "c": {"k": [1, 2], "n": 3},
    }  # fmt: skip


@pytest.mark.parametrize("text", ["0123", "1.10", "2024-01-01", "1_000", "0x10", "1e5", "12:30:00", "+1"])
def test_text_stays_as_it_is_written(text: str, tmp_path: Path) -> None:
    """Oracle: the characters in the file; YAML's own types would make another revision of each."""
    file = tmp_path / "settings.yaml"
    file.write_text(f"tokenize: {{dataset: d, tokenizer: t, out: o, revision: {text}}}")
    assert resolve(TokenizeConfig, "tokenize", {}, file).revision == text


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.dates(),
    st.binary(max_size=4),
    st.sampled_from(["1e999999999", ".inf", "nan", "auto", "none", "2M", "1,2", "-1"]),
)  # fmt: skip
names = st.sampled_from(sorted({field for _, field in FIELDS} | set(SECTIONS))) | st.text(max_size=5)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3)
)
OF_SECTION: Mapping[str, Any] = {
    "tokenize": TokenizeConfig, "cache": CacheConfig, "train": TrainConfig, "assess": AssessConfig,
    "import-activations": ImportConfig, "embed": EmbedConfig, "convert-store": ConvertConfig,
    "run": RunConfig, "slurm": SlurmConfig, "matrix": MatrixConfig, "generate": GenerateConfig,
    "compare": CompareConfig, "diff": DiffConfig, "latent": LatentConfig, "view": ViewConfig,
    "explain": ExplainConfig, "export-latents": ExportLatentsConfig,
}  # fmt: skip


def check_file(file: Path) -> None:
    """Read a file as every command would."""
    try:
        sections = read_sections(file)
    except SaemillError:
        return
    for section, content in sections.items():
        kind = OF_SECTION[section]
        assert len(tried(kind, {**LEAST[kind], **content})[1]) < 5000


@settings(max_examples=200)
@given(st.dictionaries(st.sampled_from(SECTIONS), values, min_size=1, max_size=3))
def test_only_our_errors_come_out_of_values(tmp_path_factory: pytest.TempPathFactory, content: Any) -> None:
    """Oracle: the kinds of exceptions; PyYAML writes what is then read."""
    file = tmp_path_factory.getbasetemp() / "values.yaml"
    file.write_text(yaml.dump(content, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    check_file(file)


@settings(max_examples=300)
@given(
    st.binary(max_size=60) | st.text("{}[]:,&*!?|>-'\"\n #%@`<ab01.~", max_size=40).map(str.encode),
    st.booleans(),
)
def test_only_our_errors_come_out_of_bytes(
    tmp_path_factory: pytest.TempPathFactory, text: bytes, inside: bool
) -> None:
    """Oracle: the kinds of exceptions, for files of any bytes and of YAML's own signs."""
    file = tmp_path_factory.getbasetemp() / "bytes.yaml"
    file.write_bytes(b"train: " + text if inside else text)
    check_file(file)


def test_long_numbers_take_no_time() -> None:
    """Oracle: their refusal; to write 1e999999999 out would take gigabytes."""
    for text in ("1e999999999", "1e-999999999", "9" * 10**7, "0." + "0" * 10**7 + "1", "1e" + "9" * 100):
        with pytest.raises(ValueError):
            config.count(text)


PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
GROUPS: Mapping[str, Mapping[str, Any]] = {
    "tokenize": {"mix": MixedDataset}, "cache": {"mask": MaskConfig}, "train": {"mask": TrainingMask},
    "assess": {"thresholds": Thresholds},
    "matrix": {"targets": Target, "sources": Source},
}  # fmt: skip
"""What is inside a setting of a section; `slurm.train` is as `slurm`."""


def rows(name: str, kind: Any) -> list[str]:
    """A section's heading and table."""
    lines = [f"\n## {name}\n", "| setting | by default | what it is |", "|---|---|---|"]
    for field in dataclasses.fields(kind):
        text, by_default = setting.describe(kind, field.name)
        if field.default is False or field.default is dataclasses.MISSING:
            by_default = "must be given" if field.default else "off"
        lines.append(f"| `{field.name}` | {by_default} | {text} |")
    return lines


def page() -> str:
    """docs/settings.md, as the settings say it."""
    lines = [PAGE.read_text().split("\n## ")[0].rstrip()]
    for section, kind in OF_SECTION.items():
        lines += rows(section, kind)
        for group, inner in GROUPS.get(section, {}).items():
            lines += rows(f"{section}.{group}", inner)
    return "\n".join(lines) + "\n"


def test_the_page_lists_the_settings() -> None:
    """Oracle: the settings themselves; `python -c 'import test_settings as t; t.PAGE.write_text(t.page())'`
    in this folder writes the page anew."""
    assert page() == PAGE.read_text()
