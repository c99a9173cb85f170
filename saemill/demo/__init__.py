"""`saemill demo`: every stage on a small language model and public-domain text that ship here."""

import time
from importlib.resources import files
from pathlib import Path

from saemill.assess.config import AssessConfig
from saemill.assess.run import run as assess
from saemill.assess.table import contexts_text
from saemill.cache.config import CacheConfig
from saemill.cache.run import run as cache
from saemill.common.config import resolve
from saemill.common.log import duration, say
from saemill.common.stores import features
from saemill.common.stores.runs import REPORT
from saemill.tokenize.config import TokenizeConfig
from saemill.tokenize.run import run as tokenize
from saemill.train.config import TrainConfig
from saemill.train.run import run as train

FOLDER = Path(str(files("saemill.demo")))
MODEL = FOLDER / "model"
TEXT = FOLDER / "gutenberg-sample.jsonl.gz"
SETTINGS = FOLDER / "demo.yaml"


def run(out: Path) -> None:
    """Tokenize, cache, train and assess below `out`, by `SETTINGS`."""
    started = time.perf_counter()
    tokens, acts, trained = out / "tokens", out / "acts", out / "run"
    say("1. tokenize: 7 novels into rows of 256 tokens")
    flags = {"dataset": str(TEXT), "tokenizer": str(MODEL), "out": tokens}
    tokenize(resolve(TokenizeConfig, "tokenize", flags, SETTINGS))
    say("\n2. cache: one forward pass of a 4-layer GPT-NeoX, the residual stream after block 2")
    cache(resolve(CacheConfig, "cache", {"tokens": tokens, "model": str(MODEL), "out": acts}, SETTINGS))
    say("\n3. train: six SAEs at once over one stream")
    train(resolve(TrainConfig, "train", {"acts": acts, "out": trained}, SETTINGS))
    say("\n4. assess: on documents that training never saw")
    assess(resolve(AssessConfig, "assess", {"run": trained}, SETTINGS))
    say("\n" + contexts_text(features.load(trained), n_latents=5, n_contexts=4))
    say(f"\nReport: {trained / REPORT}. All in {duration(time.perf_counter() - started)}.")
