"""The house: who may import whom, what ships, and configs that resolve."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import saemill
from saemill.assess.config import AssessConfig
from saemill.cache.config import CacheConfig
from saemill.common.config import STAGES, build, resolve
from saemill.pipeline.matrix import MatrixConfig, Source, Target
from saemill.slurm.settings import SlurmConfig
from saemill.tokenize.config import TokenizeConfig
from saemill.train.config import TrainConfig

ROOT = Path(saemill.__file__).parent
MATRIX = ROOT.parent / "configs" / "matrix.yaml"
CONFIG_FILES = sorted(set((ROOT.parent / "configs").glob("*.yaml")) - {MATRIX})
CONFIGS = {"tokenize": TokenizeConfig, "cache": CacheConfig, "train": TrainConfig, "assess": AssessConfig}


STAGES_AND_KIN = {room: {"common"} for room in (*STAGES, "generate", "compare")}
MAY_IMPORT = STAGES_AND_KIN | {
    "common": set(),
    "demo": {"common", *STAGES},
    "embeddings": {"common", "tokenize", "cache"},
    "convert": {"common"},
    "imported_run": {"common", "convert"},
    "convert_store": {"common", "cache"},
    "transcoder_set": {"common", "convert"},
    "results": {"common"},
    "token_export": {"common"},
    "verify": {"common", "train"},
    "show": {"common", "verify"},
    "sites": {"common"},
    "pipeline": {"common", "compare", *STAGES},
    "plan": {"common", "pipeline", *STAGES},
    "stages": {"common", "results", "pipeline", *STAGES},
    "slurm": {"common", "pipeline", "train", "assess"},
    "hub": {"common", "show", "token_export", "train", "assess"},
    "diff": {"common", "train", "assess"},
    "explain": {"common", "assess"},
    "latents": {"common", "convert"},
    "view": {"common", "assess"},
    "commands": {
        *(
            "common",
            "generate",
            "compare",
            "diff",
            "explain",
            "embeddings",
            "latents",
            "view",
            "convert",
            "imported_run",
            "convert_store",
            "transcoder_set",
            "token_export",
            "show",
            "sites",
            "demo",
            "pipeline",
            "plan",
            "slurm",
            "hub",
        ),
        *STAGES,
    },
    "cli": {"common", "commands"},
    "__main__": {"cli"},
    "__init__": {"common", "results", "stages"},
}
"""What each file or folder of the package imports beside itself."""
GROUND = {"architectures", "config", "losses", "memory", "profile", "saes"}
IN_TRAIN = {
    "architectures": set(),
    "losses": set(),
    "checks": {"architectures", "config"},
    "saes": {"architectures"},
    "config": {"architectures", "checks", "losses", "saes"},
    "sites": {"config"},
    "profile": set(),
    "memory": set(),
    "batch": set(),
    "stream": {"batch", "memory"},
    "objective": GROUND,
    "optim": GROUND,
    "backends": GROUND | {"optim", "objective"},
    "arch": GROUND | {"optim", "backends"},
    "sweep": GROUND | {"backends", "checks"},
    "learner": GROUND | {"optim", "backends", "arch", "sweep", "stream", "objective"},
    "outlook": GROUND | {"stream", "sweep"},
    "inputs": GROUND | {"stream", "sweep", "objective", "sites"},
    "record": GROUND | {"learner", "stream", "sweep"},
    "following": {"stream"},
    "watch": GROUND | {"learner"},
    "needed": GROUND | {"following", "stream", "sweep", "watch"},
    "trainer": GROUND | {"backends", "following", "learner", "record", "stream", "sweep", "watch"},
    "export": GROUND | {"record", "sweep", "trainer"},
    "points": GROUND | {"export", "trainer"},
    "tracking": GROUND | {"sweep", "trainer"},
    "build": GROUND | {"backends", "learner", "objective", "outlook", "record", "stream", "sweep", "trainer"},
    "run": GROUND
    | {
        "backends",
        "build",
        "objective",
        "learner",
        "record",
        "stream",
        "sweep",
        "watch",
        "trainer",
        "export",
        "points",
        "tracking",
        "batch",
        "following",
        "inputs",
        "outlook",
    },
}
"""The same within `train`: from the run down to the ground."""


def imports(file: Path) -> set[str]:
    """Names of the modules of ours that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            inside = (ROOT.parent / node.module.replace(".", "/")).is_dir()
            found |= {f"{node.module}.{alias.name}" if inside else node.module for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] == "saemill"}


def neighbours(*folder: str) -> dict[str, set[str]]:
    """For each file or folder in a folder of the package, which others there it imports."""
    found: dict[str, set[str]] = {}
    place = ROOT.joinpath(*folder)
    for file in place.rglob("*.py"):
        room = file.relative_to(place).with_suffix("").parts[0]
        names = [name.split(".")[1:] for name in imports(file)]
        n = len(folder)
        near = {name[n] for name in names if tuple(name[:n]) == folder and len(name) > n}
        found[room] = found.get(room, set()) | near - {room}
    return found


def test_imports_run_one_way() -> None:
    """Oracle: the source's own import statements."""
    found = neighbours()
    assert {room: names - MAY_IMPORT[room] for room, names in found.items() if names - MAY_IMPORT[room]} == {}


def test_imports_within_train_run_one_way() -> None:
    """Oracle: the source's own import statements; whoever is imported is listed above who imports it."""
    found = {room: names for room, names in neighbours("train").items() if room != "__init__"}
    assert {room: names - IN_TRAIN[room] for room, names in found.items() if names - IN_TRAIN[room]} == {}
    seen: set[str] = set()
    for room, below in IN_TRAIN.items():
        assert below <= seen | GROUND, room
        seen.add(room)


HELP = "from saemill.cli import app; app([{}'-h'], standalone_mode=False)"


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import saemill.train.run", {"transformers", "datasets", "wandb"}),
        (HELP.format(""), {"torch", "numpy", "pyarrow", "zarr", "transformers"}),
        (HELP.format("'train',"), {"torch", "numpy", "pyarrow", "zarr", "transformers"}),
    ],
)
def test_what_needs_no_heavy_library_loads_none(code: str, heavy: set[str]) -> None:
    """Oracle: the modules of a process that imports what a training run does, and of one that shows help."""
    ask = f"{code}; import sys; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_embeddings_borrow_from_the_stages_before_train() -> None:
    """Oracle: the source's own import statements; what opens datasets and what writes shards."""
    found = {name for file in (ROOT / "embeddings").glob("*.py") for name in imports(file)}
    borrowed = {name for name in found if name.split(".")[1] not in ("common", "embeddings")}
    assert {name.rpartition(".")[0] for name in borrowed} == {
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
