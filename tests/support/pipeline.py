"""A tiny model's run, made through saemill's own stages."""

from pathlib import Path

from saemill.cache.config import CacheConfig
from saemill.cache.run import run as cache
from saemill.tokenize.config import TokenizeConfig
from saemill.tokenize.run import run as tokenize
from saemill.train.config import TrainConfig
from saemill.train.run import run as train


class Pipeline:
    """A tiny model's run: tokenized, cached and trained."""

    def __init__(
        self,
        folder: Path,
        model: str,
        tokenizer: str,
        corpus: Path,
        site: str,
        shard_tokens: int | None = None,
    ) -> None:
        self.model, self.site = model, site
        self.tokens, self.acts, self.out = folder / "tokens", folder / "acts", folder / "run"
        tokenize(
            TokenizeConfig(
                dataset=str(corpus), tokenizer=tokenizer, out=self.tokens, ctx_len=32, held_out_fraction=0.3
            )
        )
        cache(
            CacheConfig(
                tokens=self.tokens, model=model, out=self.acts, sites=(site,), device="cpu",
                shard_tokens=shard_tokens,
            )
        )  # fmt: skip
        train(
            TrainConfig(
                acts=self.acts, out=self.out, site=(site,), k=(2, 16), num_latents=(128,), batch_size=256,
                lr=(3e-3,), epochs=3, device="cpu",
            )
        )  # fmt: skip
