"""Fuzzing by coverage, by hand: files of stores and SAEs, and configs, changed as atheris chooses.

    pip install atheris
    cd tests; PYTHONPATH=..:support:. python support/guided_fuzz.py KIND -max_total_time=3600

KIND: config, store (fp32), packed (int8 in zstd), sae. Beside the tests of random changes, which choose
blindly, this one keeps the changes that reach new lines of the readers, and goes on from them. Any exception
but ours ends it, with the input in a file that the same command takes to show it again.
"""

import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["saemill"]):
    from saemill.cache.config import CacheConfig
    from saemill.common import config as settings
    from saemill.common.errors import SaemillError
    from saemill.common.sae import formats
    from saemill.common.stores.activations import ActivationStore
    from saemill.show import problems
    from saemill.tokenize.config import TokenizeConfig
    from saemill.train.config import TrainConfig

from mutations import changed_bytes
from saes import make_threshold_sae
from stores import files_of, make_store
from test_fuzz_stores import everything, mutate
from train.record.test_fuzz_saes import use

CONFIG = b"train:\n  acts: acts\n  k: [16, 64]\n  lr: [auto]\n  mask: {first_positions: 1}\n  out: run\n"


class Chosen(random.Random):
    """Chance that reads its choices from atheris's bytes, so that it can learn from them."""

    def __init__(self, provider: atheris.FuzzedDataProvider) -> None:
        super().__init__(0)
        self.provider = provider

    def random(self) -> float:
        """Choose a number from 0 to below 1."""
        return self.provider.ConsumeIntInRange(0, 2**16 - 1) / 2**16

    def getrandbits(self, k: int) -> int:
        """Choose bits."""
        return self.provider.ConsumeUInt((k + 7) // 8) & ((1 << k) - 1)


def of_files(whole: Path, call: Callable[[Path], object]) -> Callable[[bytes], None]:
    """Make a test that changes one file of a folder, calls what reads it, and puts it back."""
    copy = Path(shutil.copytree(whole, whole.with_name("copy")))
    names = files_of(whole)

    def test(data: bytes) -> None:
        chance = Chosen(atheris.FuzzedDataProvider(data))
        name = chance.choice(names)
        mutate(whole, copy, name, chance.random() < 0.7, chance)
        try:
            call(copy)
        except SaemillError:
            pass
        finally:
            for changed in (name, "tokens/manifest.json"):
                if (whole / changed).exists():
                    shutil.copyfile(whole / changed, copy / changed)

    return test


def of_config(folder: Path) -> Callable[[bytes], None]:
    """Make a test that reads bytes as a config: its own, and what a change of a sound one makes."""
    file = folder / "saemill.yaml"

    def test(data: bytes) -> None:
        chance = Chosen(atheris.FuzzedDataProvider(data))
        file.write_bytes(data if chance.random() < 0.5 else changed_bytes(CONFIG, chance))
        for section, cls in (("train", TrainConfig), ("cache", CacheConfig), ("tokenize", TokenizeConfig)):
            with suppress(SaemillError):
                settings.build(cls, settings.read_section(file, section), section)

    return test


def test_of(kind: str, folder: Path) -> Callable[[bytes], None]:
    """Make the test of a kind."""
    if kind == "config":
        return of_config(folder)
    if kind == "sae":
        formats.save_own(make_threshold_sae("jumprelu").parts, folder / "layers.3")
        return of_files(folder / "layers.3", use)
    form = {"store": ("fp32", None), "packed": ("int8", "zstd")}[kind]
    store = make_store(folder, n_rows=24, ctx_len=16, d=4, shard_tokens=256, form=form)
    assert isinstance(store, ActivationStore)
    return of_files(store.path, lambda copy: (problems(copy), everything(copy)))


if __name__ == "__main__":
    kind = sys.argv.pop(1)
    with tempfile.TemporaryDirectory() as temporary:
        atheris.Setup(sys.argv, test_of(kind, Path(temporary)))
        atheris.Fuzz()
