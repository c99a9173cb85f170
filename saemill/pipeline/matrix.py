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

A pair is a pipeline of its own (`pipeline.chain`), its run in `<out>/runs/<target>--<source>`, all of its
layers, k, widths and seeds trained at once over one stream.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from saemill.common import config as settings
from saemill.common import durable
from saemill.common.config import STAGES, nearest
from saemill.common.errors import ConfigError
from saemill.common.log import say
from saemill.common.model import fingerprint_model
from saemill.common.world import World, speak_for
from saemill.pipeline.chain import Chain, content_of_tokens
from saemill.pipeline.stages import Sections
from saemill.pipeline.summary import write as write_summary

FORMAT = "saemill matrix 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A model whose activations are cached; what is left out is as in the shared sections."""

    model: str
    """Hub id or local folder."""
    revision: str | None = None
    tokenizer: str | None = None
    """By default the model's own."""
    layers: tuple[int, ...] | None = None
    sites: tuple[str, ...] | None = None
    layer_stride: int | None = None
    expansion_factor: tuple[int, ...] | None = None
    num_latents: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A dataset that the models read."""

    dataset: str
    """Hub id, or local file or folder."""
    subset: str | None = None
    split: str | None = None
    text_column: str | None = None
    revision: str | None = None
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixConfig:
    """The section `matrix`."""

    out: Path
    """Folder of stores, runs and the summary; its name is the group in wandb."""
    targets: Mapping[str, Any]
    """Settings of `Target` by a name of one's own."""
    sources: Mapping[str, Any]
    """Settings of `Source` by a name of one's own."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the initial weights, trained side by side."""
    delete: tuple[Literal["tokens", "acts"], ...] = ()
    """What of a pair is deleted when it is assessed; a pair that is done stays done without."""
    compare: bool = True
    """Match the dictionaries of different seeds and sources at the end."""

    def __post_init__(self) -> None:
        for name in ("targets", "sources"):
            for title in getattr(self, name):
                if not title.replace("-", "").replace("_", "").replace(".", "").isalnum() or "--" in title:
                    raise ConfigError(
                        f"matrix.{name}: {title!r} names folders; use letters, digits, dots, _ and single -"
                    )
            if not getattr(self, name):
                raise ConfigError(f"matrix.{name} is empty; name one at least")


def run(file: Path, targets: tuple[str, ...] = (), sources: tuple[str, ...] = ()) -> Path:
    """Run every pair that is not done, then sum up and compare what is there.

    Args:
        file: a YAML file with the section matrix and those that all pairs share.
        targets: only these; empty for all.
        sources: only these.

    Returns: the folder of the matrix.

    Raises:
        ConfigError: settings that are wrong for any pair, before the first one runs.
    """
    world = World.here()
    speak_for(world)
    sections = settings.read_sections(file)
    config = settings.build(MatrixConfig, settings.read_section(file, "matrix"), "matrix")
    chosen = [
        (target, source)
        for target in _choose("target", targets, config.targets)
        for source in _choose("source", sources, config.sources)
    ]
    pairs = [Pair.of(config, sections, target, source) for target, source in chosen]
    done = [pair.is_done() for pair in pairs]
    for number, (pair, finished) in enumerate(zip(pairs, done, strict=True), 1):
        say(f"\n{number} of {len(pairs)}: {pair.name}" + (", done already" if finished else ""))
        if not finished:
            pair.run(config.delete, world)
    if world.rank == 0:
        every = [f"{target}--{source}" for target in config.targets for source in config.sources]
        write_summary(config.out, every, config.compare)
    return config.out


def _choose(kind: str, names: tuple[str, ...], known: Mapping[str, Any]) -> list[str]:
    for name in names:
        if name not in known:
            raise ConfigError(f"no {kind} {name!r}; {nearest(name, known)}")
    return [name for name in known if not names or name in names]


@dataclass(frozen=True, slots=True)
class Pair:
    """One target that reads one source."""

    name: str
    chain: Chain
    content: str
    """A hash of all that decides its result."""

    @classmethod
    def of(cls, config: MatrixConfig, sections: Sections, target: str, source: str) -> "Pair":
        """The pair's pipeline, checked."""
        name = f"{target}--{source}"
        model = settings.build(Target, config.targets[target], f"matrix.targets.{target}")
        text = settings.build(Source, config.sources[source], f"matrix.sources.{source}")
        own = {
            "tokenize": {**_given(text), "tokenizer": model.tokenizer or model.model},
            "cache": _given(model, ("model", "revision", "layers", "sites", "layer_stride")),
            "train": {**_given(model, ("expansion_factor", "num_latents")), "seeds": config.seeds},
            "assess": {},
        }
        if model.tokenizer is None:
            own["tokenize"]["tokenizer_revision"] = model.revision
        merged = {stage: {**sections.get(stage, {}), **own[stage]} for stage in STAGES}
        _refuse_named_folders(merged)
        if merged["train"].get("log_to_wandb"):
            merged["train"].setdefault("run_name", config.out.name)
        chain = Chain(merged, config.out, name, f"the pair {name}")
        return cls(name, chain, _content(chain))

    @property
    def record(self) -> Path:
        """Written when the pair is done."""
        return self.chain.folder / "runs" / f"{self.name}.done.json"

    def is_done(self) -> bool:
        """Whether this very pair is trained and assessed, its stores deleted or not."""
        if not self.record.exists():
            return False
        if durable.read_json(self.record)["content"] != self.content:
            raise ConfigError(
                f"{self.name} was done with other settings or other text; choose another matrix.out, or "
                f"remove {self.record} and {self.chain.folder / 'runs' / self.name}"
            )
        return True

    def run(self, delete: tuple[str, ...], world: World) -> None:
        """Run the pipeline, note it down, and delete what shall not stay."""
        self.chain()
        if world.rank > 0:
            return
        durable.write_json(self.record, {"format": FORMAT, "content": self.content})
        folders = {"tokens": self.chain.configs["tokenize"].out, "acts": self.chain.configs["cache"].out}
        for kind in delete:
            say(f"{folders[kind]} deleted: {durable.folder_bytes(folders[kind]) / 2**20:,.1f} MiB")
            shutil.rmtree(folders[kind])


def _given(config: Any, names: tuple[str, ...] = ()) -> dict[str, Any]:
    """The settings that are not left open; of `names`, or all."""
    every = {field.name: getattr(config, field.name) for field in fields(config)}
    return {
        name: value for name, value in every.items() if value is not None and (not names or name in names)
    }


def _refuse_named_folders(sections: Sections) -> None:
    """Shared sections cannot name folders: every pair has its own."""
    for stage, names in (("tokenize", ["out"]), ("cache", ["tokens", "out"]), ("train", ["acts", "out"])):
        for name in names:
            if sections[stage].get(name) is not None:
                raise ConfigError(f"{stage}.{name} is found for each pair below matrix.out; leave it out")
    for name in ("run", "out", "acts"):
        if sections["assess"].get(name) is not None:
            raise ConfigError(f"assess.{name} is each pair's own; leave it out")


def _content(chain: Chain) -> str:
    """A hash of the text, the tokenizer, the weights and all settings that decide a pair's result."""
    tokenize, cache, train, assess = (chain.configs[stage] for stage in STAGES)
    skipped = ("tokens", "out", "batch_size", "device")
    caching = {key: value for key, value in settings.plain(cache).items() if key not in skipped}
    return durable.hash_json(
        [
            content_of_tokens(tokenize),
            caching,
            fingerprint_model(cache.model, cache.revision),
            train.identity(),
            assess.identity(),
        ]
    )
