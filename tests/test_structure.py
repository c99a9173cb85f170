"""The house: who may import whom, what ships, and configs that resolve."""

import ast
from pathlib import Path

import pytest
import yaml

import saemill
from saemill.assess.run import AssessConfig
from saemill.cache.run import CacheConfig
from saemill.common.config import STAGES, build, resolve
from saemill.pipeline.matrix import MatrixConfig, Source, Target
from saemill.slurm.settings import SlurmConfig
from saemill.tokenize.run import TokenizeConfig
from saemill.train.config import TrainConfig

ROOT = Path(saemill.__file__).parent
MATRIX = ROOT.parent / "configs" / "matrix.yaml"
CONFIG_FILES = sorted(set((ROOT.parent / "configs").glob("*.yaml")) - {MATRIX})
CONFIGS = {"tokenize": TokenizeConfig, "cache": CacheConfig, "train": TrainConfig, "assess": AssessConfig}


def imports(file: Path) -> set[str]:
    """Names of the modules of ours that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] == "saemill"}


@pytest.mark.parametrize("room", ["common", *STAGES, "generate", "compare"])
def test_stages_import_only_themselves_and_common(room: str) -> None:
    """Oracle: the source's own import statements."""
    allowed = {"common", room}
    files = sorted((ROOT / room).rglob("*.py"))
    assert len(files) >= 3
    for file in files:
        for name in imports(file):
            assert name.split(".")[1] in allowed, f"{file} imports {name}"


def test_embeddings_borrow_from_the_stages_before_train() -> None:
    """Oracle: the source's own import statements; what opens datasets and what writes shards."""
    found = {name for file in (ROOT / "embeddings").glob("*.py") for name in imports(file)}
    foreign = {name for name in found if name.split(".")[1] not in ("common", "embeddings")}
    assert {name.rpartition(".")[0] for name in foreign} == {
        "saemill.tokenize",
        "saemill.cache",
        "saemill.cache.claims",
    }


def test_what_ships_stays_small() -> None:
    """Oracle: the sum of file sizes in the package."""
    n_bytes = sum(f.stat().st_size for f in ROOT.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
    assert n_bytes < 12e6


def test_the_matrix_config_resolves() -> None:
    """Oracle: the strict loader, for what each pair is made of."""
    file = MATRIX
    content = yaml.safe_load(file.read_text())
    assert set(content) - {"matrix"} == set(STAGES)
    matrix = build(MatrixConfig, content["matrix"], "matrix")
    texts = [build(Source, entry, name) for name, entry in matrix.sources.items()]
    models = [build(Target, entry, name) for name, entry in matrix.targets.items()]
    assert models
    assert texts
    required = {
        "tokenize": {"dataset": "d", "tokenizer": "t", "out": "o"},
        "cache": {"tokens": "o", "model": "m", "out": "o", "layers": "0"},
        "train": {"acts": "o", "out": "o"},
        "assess": {"run": "o"},
    }
    for section, cls in CONFIGS.items():
        resolve(cls, section, required[section], file)


@pytest.mark.parametrize("file", CONFIG_FILES, ids=lambda f: f.stem)
def test_configs_resolve(file: Path) -> None:
    """Oracle: the strict loader; each stage reads what the one before it writes."""
    content = yaml.safe_load(file.read_text())
    assert set(content) - {"slurm"} == set(STAGES)
    build(SlurmConfig, content.get("slurm", {}), "slurm")
    required = {
        "tokenize": {"dataset": "d", "tokenizer": "t", "out": "o"},
        "cache": {"tokens": "o", "model": "m", "out": "o"},
        "train": {"acts": "o", "out": "o"},
        "assess": {"run": "o"},
    }
    for section, cls in CONFIGS.items():
        missing = {k: v for k, v in required[section].items() if k not in content[section]}
        resolve(cls, section, missing, file)
    if file.stem != "demo":
        assert content["cache"]["tokens"] == content["tokenize"]["out"]
        assert content["train"]["acts"] == content["cache"]["out"]
        assert content["assess"]["run"] == content["train"]["out"]
