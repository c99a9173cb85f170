"""`saemill matrix`: models × datasets × layers × seeds, each pair of a model and a dataset cached once.

    matrix:
      out: study
      targets:                  # whose activations are cached
        small: {model: path/or/hub-id, layers: [2, 4], expansion_factor: [8]}
      sources:                  # which texts they read
        corpus: {dataset: corpus.parquet}
      seeds: [0, 1, 2]
      delete: [acts]
    tokenize: {ctx_len: 256}    # and cache, train, assess: what all pairs share

A pair is a pipeline of its own (`pipeline.chain`): its stores in `<out>/stores/<target>--<source>`, its run
in `<out>/runs/<target>--<source>`, all layers, k, widths and seeds trained at once over one stream.
"""

import re
import shutil
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch

from saemill.cache.config import CacheConfig
from saemill.common import config as settings
from saemill.common import durable, records
from saemill.common.config import LARGEST, STAGES, nearest
from saemill.common.errors import ConfigError, Interrupted, SaemillError, StoreError
from saemill.common.log import say
from saemill.common.models.model import fingerprint_model
from saemill.common.records import Hash, Record
from saemill.common.setting import about, check, identity, like, setting
from saemill.common.stores.tokens import TokenStore
from saemill.common.world import World, speak_for
from saemill.compare.config import CompareConfig
from saemill.compare.run import ASSIGNMENT_LIMIT
from saemill.pipeline.chain import Chain
from saemill.pipeline.found import content_of_tokens
from saemill.pipeline.stages import Sections
from saemill.pipeline.summary import write as write_summary
from saemill.tokenize.config import TokenizeConfig
from saemill.train.config import TrainConfig

OF_A_PAIR = {
    "tokenize": ("dataset", "tokenizer", "out"),
    "cache": ("model", "tokens", "out"),
    "train": ("acts", "out", "seeds"),
    "assess": ("run", "acts", "model", "out"),
}
"""Settings that follow from the pair, and cannot be shared."""
ONE_OF = (("layers", "sites", "layer_stride"), ("expansion_factor", "num_latents"))
"""Groups of settings; one that a target sets replaces its whole group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A model whose activations are cached; what is left out is as in the shared sections."""

    model: str = like(CacheConfig, "model")
    revision: str | None = like(CacheConfig, "revision")
    tokenizer: str | None = setting(None, "Hub id or folder of the tokenizer", by_default="the model's own")
    layers: tuple[int, ...] | None = like(CacheConfig, "layers", default=None)
    sites: tuple[str, ...] | None = like(CacheConfig, "sites", default=None)
    layer_stride: int | None = like(CacheConfig, "layer_stride", most=LARGEST)
    expansion_factor: tuple[int, ...] | None = like(TrainConfig, "expansion_factor", default=None)
    num_latents: tuple[int, ...] | None = like(TrainConfig, "num_latents", default=None)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A dataset that the models read; what is left out is as in the shared section tokenize."""

    dataset: str = like(TokenizeConfig, "dataset", default=MISSING)
    subset: str | None = like(TokenizeConfig, "subset")
    split: str | None = like(TokenizeConfig, "split", default=None)
    text_column: str | None = like(TokenizeConfig, "text_column", default=None)
    revision: str | None = like(TokenizeConfig, "revision")
    max_tokens: int | None = like(TokenizeConfig, "max_tokens")


class Done(Record):
    """A pair that is trained and assessed."""

    format: Literal["saemill matrix 2"] = "saemill matrix 2"
    content: Hash
    """Hash of its text, weights and settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixConfig:
    """The section `matrix`."""

    out: Path = field(
        metadata=about("Folder of stores, runs and the summary; its name is the group in wandb")
    )
    targets: Mapping[str, Any] = field(metadata=about("Settings of `Target` by a name of one's own"))
    sources: Mapping[str, Any] = field(metadata=about("Settings of `Source` by a name of one's own"))
    seeds: tuple[int, ...] = setting(
        (0,), "Seeds of the initial weights, trained side by side", least=0, most=LARGEST
    )
    delete: tuple[Literal["tokens", "acts"], ...] = setting(
        (), "Stores of a pair to delete once it is assessed (it stays done)"
    )
    compare: bool = setting(
        True, "Match the dictionaries of different seeds and sources at the end, by the section compare"
    )

    def __post_init__(self) -> None:
        check(self)
        if not self.seeds:
            raise ConfigError("matrix.seeds is empty; name one at least")
        for kind in ("targets", "sources"):
            for name in getattr(self, kind):
                if not re.fullmatch(r"\w+([.-]\w+)*", name):
                    raise ConfigError(
                        f"matrix.{kind}: {name!r} names folders; use letters, digits and _, with single dots "
                        "and dashes between them"
                    )
            if not getattr(self, kind):
                raise ConfigError(f"matrix.{kind} is empty; name one at least")


def run(file: Path, targets: tuple[str, ...] = (), sources: tuple[str, ...] = ()) -> Path:
    """Run every pair that is not done, then sum up and compare what is there.

    A pair that fails is reported, and the others go on.

    Args:
        file: a YAML file with the section matrix and those that all pairs share.
        targets: only these; empty for all.
        sources: only these.

    Returns: the folder of the matrix.

    Raises:
        ConfigError: settings that are wrong for any pair, before the first one runs.
        StoreError: some pairs failed.
    """
    world = World.here()
    speak_for(world)
    config, sections, comparing, pairs = pairs_of(file, targets, sources)
    done, failed = [pair.is_done() for pair in pairs], {}
    for number, (pair, was_done) in enumerate(zip(pairs, done, strict=True), 1):
        say(f"\n{number} of {len(pairs)}: {pair.name}" + (", done already" if was_done else ""))
        if not was_done and (problem := pair.run(world)):
            failed[pair.name] = problem
        elif "assess" not in pair.chain.configs:
            say(f"{pair.name} is trained, but not assessed: it is not in the table")
        else:
            pair.delete(config.delete, world)
    if world.rank == 0:
        write_summary(config.out, _assessed(config, sections), failed, comparing)
    if failed:
        raise StoreError("\n".join(f"{name} failed: {problem}" for name, problem in failed.items()))
    return config.out


def pairs_of(
    file: Path, targets: tuple[str, ...], sources: tuple[str, ...]
) -> "tuple[MatrixConfig, Sections, Mapping[str, Any] | None, list[Pair]]":
    """Read the pairs of a matrix, each checked; arguments as of `run`.

    Returns: the section matrix, all sections, the settings of comparisons, and the pairs that are chosen.

    Raises:
        ConfigError: settings that are wrong for any pair.
    """
    sections = _read(file)
    config = settings.build(MatrixConfig, sections.get("matrix", {}), "matrix")
    comparing = _comparing(config, sections.get("compare", {}))
    pairs = [
        Pair.of(config, sections, target, source)
        for target in _choose("target", targets, config.targets)
        for source in _choose("source", sources, config.sources)
    ]
    for pair in pairs:
        _check_widths(pair, comparing)
    return config, sections, comparing, pairs


def _read(file: Path) -> Sections:
    """Read the file's sections; refuse those without effect."""
    sections = settings.read_sections(file)
    for name in ("run", "slurm"):
        if name in sections:
            raise ConfigError(f"the section {name} of {file} has no effect on a matrix; leave it out")
    for stage, names in OF_A_PAIR.items():
        for name in names:
            if sections.get(stage, {}).get(name) is not None:
                raise ConfigError(f"{stage}.{name} is each pair's own, by the section matrix; leave it out")
    return sections


def _comparing(config: MatrixConfig, section: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Check the settings for the comparisons; None for no comparison."""
    if not config.compare:
        if section:
            raise ConfigError("the section compare has no effect with matrix.compare false; leave one out")
        return None
    for name in ("saes", "out"):
        if name in section:
            raise ConfigError(f"compare.{name} follows from the matrix; leave it out")
    settings.build(CompareConfig, {**section, "saes": []}, "compare")
    return section


def _check_widths(pair: "Pair", comparing: Mapping[str, Any] | None) -> None:
    """Refuse SAEs too wide to be assigned one to one, before they are trained."""
    if comparing is None or comparing.get("matching") == "nearest":
        return
    limit = settings.coerce(comparing.get("assignment_limit") or ASSIGNMENT_LIMIT, int, "assignment_limit")
    widest = max((variant.num_latents for variant in pair.chain.variants), default=0)
    if widest > limit:
        raise ConfigError(
            f"{pair.name} has SAEs of {widest:,} latents, more than the {limit:,} that are assigned one to "
            "one at the end; add the section compare: {matching: nearest}, or {assignment_limit: …} if "
            "memory and time are there, or matrix.compare false"
        )


def _choose(kind: str, names: tuple[str, ...], known: Mapping[str, Any]) -> list[str]:
    for name in names:
        if name not in known:
            raise ConfigError(f"no {kind} {name!r}; {nearest(name, known)}")
    return [name for name in known if not names or name in names]


def _assessed(config: MatrixConfig, sections: Sections) -> dict[str, Path | None]:
    """Map each pair's name to the folder of its assessment; None for those not done."""
    folders: dict[str, Path | None] = {}
    tokens = sections.get("assess", {}).get("tokens")
    for name in (f"{target}--{source}" for target in config.targets for source in config.sources):
        run = config.out / "runs" / name
        is_done = run.with_name(f"{name}.done.json").exists()
        folders[name] = (run / f"on-{Path(tokens).name}" if tokens else run) if is_done else None
    return folders


@dataclass(frozen=True, slots=True)
class Pair:
    """One target that reads one source."""

    name: str
    chain: Chain
    content: str
    """A hash of all that decides its result."""

    @classmethod
    def of(cls, config: MatrixConfig, sections: Sections, target: str, source: str) -> "Pair":
        """Build the pair's pipeline, checked."""
        name = f"{target}--{source}"
        model = settings.build(Target, config.targets[target], f"matrix.targets.{target}")
        text = settings.build(Source, config.sources[source], f"matrix.sources.{source}")
        stores, run = config.out / "stores" / name, config.out / "runs" / name
        own = {
            "tokenize": {
                **_without_unset(text), "tokenizer": model.tokenizer or model.model, "out": stores / "tokens",
            },
            "cache": {
                **_without_unset(model, ("model", "revision", "layers", "sites", "layer_stride")),
                "out": stores / "acts",
            },
            "train": {
                **_without_unset(model, ("expansion_factor", "num_latents")),
                "seeds": config.seeds, "out": run,
            },
            "assess": {},
        }  # fmt: skip
        if model.tokenizer is None:
            own["tokenize"]["tokenizer_revision"] = model.revision
        merged = {stage: _merge(sections.get(stage, {}), own[stage]) for stage in STAGES}
        if merged["train"].get("log_to_wandb"):
            merged["train"].setdefault("run_name", config.out.absolute().name)
        try:
            chain = Chain(merged, config.out, where=f"the pair {name}")
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
        return cls(name, chain, _content(chain))

    @property
    def record(self) -> Path:
        """Return the file that is written when the pair is done."""
        return self.chain.folder / "runs" / f"{self.name}.done.json"

    def is_done(self) -> bool:
        """Tell whether this very pair is trained and assessed, its stores deleted or not."""
        if not self.record.exists():
            return False
        repair = "Remove it; what was done is found again, but deleted stores are made anew."
        if records.read(self.record, Done, repair).content != self.content:
            raise ConfigError(
                f"{self.name} was done with other settings or other text; choose another matrix.out, or "
                f"remove {self.record}, {self.chain.folder / 'runs' / self.name} and "
                f"{self.chain.folder / 'stores' / self.name}"
            )
        return True

    def run(self, world: World) -> str | None:
        """Run the pipeline and record that it is done.

        Returns: why it failed, or None. Several processes fail together.
        """
        try:
            self.chain()
        except SaemillError as error:
            if isinstance(error, Interrupted) or world.size > 1:
                raise
            say(f"{self.name} failed: {error}")
            return str(error)
        if world.rank == 0 and "assess" in self.chain.configs:
            records.write(self.record, Done(content=self.content))
        return None

    def delete(self, kinds: tuple[str, ...], world: World) -> None:
        """Delete stores that shall not stay; the pair is done."""
        if kinds and world.size > 1:  # all have read what they need
            with world.connected(torch.device("cpu")) as everyone:
                everyone.barrier()
        for kind in kinds if world.rank == 0 else ():
            folder = self.chain.folder / "stores" / self.name / kind
            if folder.exists():
                say(f"{folder} is deleted: {durable.folder_bytes(folder) / 2**20:,.1f} MiB")
                shutil.rmtree(folder)


def _without_unset(config: Any, names: tuple[str, ...] = ()) -> dict[str, Any]:
    """Keep the settings that are not left open; of `names`, or all."""
    every = {field.name: getattr(config, field.name) for field in fields(config)}
    return {
        name: value for name, value in every.items() if value is not None and (not names or name in names)
    }


def _merge(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Let a pair's own settings override those that all share."""
    replaced = {name for group in ONE_OF if set(group) & set(own) for name in group}
    return {**{name: value for name, value in shared.items() if name not in replaced}, **own}


def _content(chain: Chain) -> str:
    """Hash the text, the tokenizer, the weights and all settings that decide a pair's result."""
    tokenize, cache, train, assess = (chain.configs[stage] for stage in STAGES)
    return durable.hash_json(
        [
            content_of_tokens(tokenize),
            identity(cache),
            fingerprint_model(cache.model, cache.revision, cache.trust_remote_code),
            train.identity(),
            assess.identity(),
            TokenStore(assess.tokens).fingerprint if assess.tokens else None,
        ]
    )
