"""A pipeline on this machine: each stage's result is found again by what it was made of.

Folders that the settings do not name lie below one folder, under names that end in a hash:

    tokens/<dataset>-<hash>   settings of tokenize, the local dataset's content, the tokenizer
    acts/<model>-<hash>       the tokens, the model's weights, how activations are stored
    runs/<model>-<hash>       the activations, settings of train; or a name of one's own
    runs/<run>.yaml           all settings, the folders among them: `saemill run` takes it again

So a second pipeline with another k finds its tokens and activations and goes straight to training, one
with another layer adds it to the store, and what was interrupted goes on where it was.

Tokens that are found again are compared with their hashes. Activations, which are too many, are compared as
they are read: where training or the assessment finds them damaged, they are checked and repaired, and
the stage goes on. Until then a file beside the store, <store>.damaged, says so.
"""

from collections.abc import Callable
from dataclasses import InitVar, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml

from saemill.assess.config import AssessConfig
from saemill.assess.done import is_done
from saemill.assess.run import run as assess
from saemill.cache.config import CacheConfig
from saemill.cache.plan import content_of, sites_of
from saemill.cache.run import run as cache
from saemill.common import config as settings
from saemill.common import durable
from saemill.common.addresses import address_of, named
from saemill.common.errors import ConfigError, MissingError, StoreError
from saemill.common.log import say
from saemill.common.models.architecture import Architecture, check_row_length, limits_of
from saemill.common.models.sites import load_model_config
from saemill.common.models.tokenizer import check_tokenizer, load_tokenizer
from saemill.common.stores import mirror, runs
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.site_names import parts_of
from saemill.common.stores.site_records import REPAIR, Site
from saemill.common.stores.tokens import TokenStore
from saemill.common.world import World
from saemill.pipeline.found import content_of_tokens, has_sites, owes_wandb
from saemill.pipeline.rows import check_rows
from saemill.pipeline.stages import (
    CONFIGS,
    MADE,
    READS,
    Sections,
    absolute,
    check_amounts,
    check_input,
    check_removal,
    hand_on,
    join,
    stages_of,
)
from saemill.pipeline.together import cache_and_train, check_room
from saemill.tokenize.config import TokenizeConfig
from saemill.tokenize.run import run as tokenize
from saemill.tokenize.source import check_path
from saemill.train.batch import check_batch, rows_per_batch
from saemill.train.config import TrainConfig
from saemill.train.run import check_machine
from saemill.train.run import run as train
from saemill.train.sites import with_sites
from saemill.train.sweep.sources import identity as identity_of
from saemill.train.sweep.sources import sites_of as started_at
from saemill.train.sweep.sources import sources_of
from saemill.train.sweep.variant import Variant
from saemill.train.sweep.variants import of_config

UNKNOWN = Path("not known yet")
"""Placeholder of a folder that is known when the stage before it has run."""


@dataclass(slots=True)
class Chain:
    """The stages of one pipeline.

    Args:
        sections: the settings of each stage; folders between them may be left out.
        folder: where results are kept whose folder is not named.
        run_name: the run's folder in `folder/runs`; by default found by content.
        where: the config's file, for messages.
        is_plan: whether it is only planned, and may be for another machine.

    Raises:
        ConfigError: settings that are wrong, contradict one another or do not fit the model. What can be
            checked without reading the data is checked here.
    """

    sections: InitVar[Sections]
    folder: Path
    run_name: str | None = None
    where: str = "the config"
    is_plan: bool = False
    configs: dict[str, Any] = field(init=False)
    """Settings by stage; folders are filled in as they become known."""
    batch_is_set: bool = field(init=False)
    """Whether the size of a batch is the user's choice."""
    variants: list[Variant] = field(init=False, default_factory=list)
    """What will be trained, as far as it is known before; learning rates are not final."""

    def __post_init__(self, sections: Sections) -> None:
        sections = {stage: _here(sections[stage]) for stage in stages_of(sections, self.where)}
        for before, after in pairwise(sections):
            join(sections, before, after)
        hand_on(sections)
        first = next(iter(sections))
        self._name_run(sections)
        for stage, values in sections.items():
            for name in FOLDERS[stage] if stage != first else FOLDERS[stage] & {"out"}:
                values[name] = values.get(name) or UNKNOWN
        self.configs = {stage: settings.build(CONFIGS[stage], sections[stage], stage) for stage in sections}
        check_input(first, self.configs[first])
        if first == "tokenize":
            for entry in self.configs[first].inputs:
                check_path(entry.dataset)
        self.batch_is_set = sections.get("train", {}).get("batch_size") is not None
        check_amounts(self.configs)
        if not self._follows:
            check_removal(self.configs, "add --follow, or leave it out")
        if "cache" in self.configs:
            self._check_model(self.configs["cache"])
        if "train" in self.configs and not self.is_plan:
            check_machine(self.configs["train"])
        if first == "cache":
            self._check_rows(TokenStore(self.configs["cache"].tokens))

    @property
    def finds_places(self) -> bool:
        """Tell whether any folder is not named, but found by content."""
        return any(getattr(config, "out", None) == UNKNOWN for config in self.configs.values())

    def __call__(self) -> Path:
        """Run what is not there yet.

        Returns: the folder of the run, or of the last store where nothing is trained.
        """
        steps: dict[str, Callable[[Any], Path]] = {
            "tokenize": self._tokenize,
            "cache": self._cache,
            "train": self._train,
            "assess": self._assess,
        }
        path: Path | None = None
        trained = False
        for number, stage in enumerate(tuple(self.configs), 1):
            if stage not in self.configs:  # what was to be assessed is not there
                continue
            if stage == "train" and trained:
                path = self.configs[stage].out
                continue
            if stage == "cache" and self._follows:
                trained = self._cache_and_train(number, path)
                path = self.configs[stage].out
                continue
            say(f"{number}. {stage}")
            if path is not None:
                self.configs[stage] = replace(self.configs[stage], **{READS[stage]: path})
            path = steps[stage](self.configs[stage])
            if stage != "assess":
                self.configs[stage] = replace(self.configs[stage], out=path)
        assert path is not None
        return path

    @property
    def _follows(self) -> bool:
        """Whether training follows caching."""
        return "cache" in self.configs and "train" in self.configs and self.configs["train"].follow

    def _cache_and_train(self, number: int, tokens: Path | None) -> bool:
        """Cache and train at once, unless either is done already. Tell whether both are now."""
        caching, training = self.configs["cache"], self.configs["train"]
        if tokens is not None:
            caching = replace(caching, tokens=tokens)
        content = content_of(caching, TokenStore(caching.tokens))
        if caching.out == UNKNOWN:
            caching = replace(caching, out=self._place("acts", caching.model, content))
        if training.out == UNKNOWN:
            training = replace(
                training, out=self._place("runs", caching.model, [training.identity(), content])
            )
        self.configs |= {"cache": caching, "train": replace(training, acts=caching.out)}
        check_room(caching, training)
        names = [site.name for site in _sites(caching)]
        whole = has_sites(caching.out, content, names)
        if whole:
            say(f"{named(caching.out)} has {', '.join(names)} already")
        if whole or (training.resume and runs.is_finished(training.out)):
            if not whole and not caching.delete_consumed:  # training may need less than all of it
                cache(caching)
            return False
        say(f"{number}. cache, and {number + 1}. train meanwhile")
        self._write_down(training.out)
        cache_and_train(caching, self.configs["train"])
        return True

    def _name_run(self, sections: Sections) -> None:
        if self.run_name is None:
            return
        if "train" not in sections or sections["train"].get("out") is not None:
            why = "train.out names the folder" if "train" in sections else "nothing is trained"
            raise ConfigError(f"run_name has no effect: {why}; leave it out")
        sections["train"]["out"] = self.folder / "runs" / self.run_name
        if "assess" in sections:
            join(sections, "train", "assess")

    def _place(self, kind: str, name: str, content: Any) -> Path:
        """Return the folder where a result of this content is, or will be."""
        path = Path(name)
        title = path.name.split(".")[0] if path.is_file() else path.name
        return self.folder / kind / f"{title}-{durable.hash_json(content)[:8]}"

    def placed(self, stage: str, config: Any) -> Any:
        """Fill in the folder that a stage writes to, if it is found by content. Where that is not there yet,
        it is the one that the folder will lie in."""
        if stage == "assess" or config.out != UNKNOWN:
            return config
        if stage == "tokenize":
            place = self._place("tokens", config.dataset or "mix", content_of_tokens(config))
        elif stage == "cache":
            place = self.folder / "acts"
            if _is_there(config.tokens, "cache"):
                place = self._place("acts", config.model, content_of(config, TokenStore(config.tokens)))
        elif _is_there(config.acts, "train"):
            store = ActivationStore(config.acts, config.with_acts)
            content = [config.identity(), store.fingerprint]
            place = self._place("runs", str(store.settings.model), content)
        else:
            place = self.folder / "runs"
        return replace(config, out=place)

    def _tokenize(self, config: TokenizeConfig) -> Path:
        out: Path = self.placed("tokenize", config).out

        def made() -> dict[str, Any]:
            self._check_rows(tokenize(replace(config, out=out)))
            return self.configs

        with World.here().connected(torch.device("cpu")) as everyone:
            self.configs = everyone.first_at_length(made)
        return out

    def _cache(self, config: CacheConfig) -> Path:
        content = content_of(config, TokenStore(config.tokens))
        out: Path = self.placed("cache", config).out
        damaged = _damaged(out)
        names = [site.name for site in _sites(config)]
        if damaged.exists() or not has_sites(out, content, names):
            cache(replace(config, out=out))
            damaged.unlink(missing_ok=True)
        else:
            say(f"{named(out)} has {', '.join(names)} already")
        return out

    def _train(self, config: TrainConfig) -> Path:
        config = self.placed("train", config)
        self.configs["train"] = config
        self._write_down(config.out)
        self._with_repair(lambda: train(config))
        return config.out

    def _assess(self, config: AssessConfig) -> Path:
        if is_done(config) and not owes_wandb(config.run):
            say(f"{config.folder / runs.ASSESSMENT} is there already")
        else:
            self._with_repair(lambda: assess(config))
        return config.run

    def _with_repair(self, stage: Callable[[], object]) -> None:
        """Run a stage; where it finds the activations damaged, cache those again, and run it again.

        Of several processes one alone finds it, and the others fail with it: the next command mends.
        """
        try:
            stage()
        except StoreError as error:
            if "cache" not in self.configs or not str(error).endswith(REPAIR):
                raise
            caching: CacheConfig = self.configs["cache"]
            _damaged(caching.out).write_text(f"{error}\n")
            if World.here().size > 1:
                raise
            say(f"{str(error).removesuffix(REPAIR).rstrip()} What is damaged is cached again")
            self._cache(caching)
            stage()

    def _write_down(self, run: Path) -> None:
        """Write all settings and folders beside the run, so that they hold from anywhere."""
        if World.here().rank == 0:
            configs = self.configs | {"train": replace(self.configs["train"], resume=True)}
            if "assess" in configs:
                configs["assess"] = replace(configs["assess"], run=run)
            plain = {stage: settings.plain(absolute(config)) for stage, config in configs.items()}
            text = yaml.safe_dump(plain, sort_keys=False)
            durable.write_bytes(run.with_name(f"{run.name}.yaml"), [text.encode()])

    def _check_rows(self, tokens: TokenStore) -> None:
        """Fit the settings to the rows there are, and refuse a folder that holds another run, before anything
        is cached."""
        self.configs = check_rows(tokens, self.configs, self.batch_is_set)
        if "train" in self.configs:
            training: TrainConfig = self.configs["train"]
            check_batch(training.batch_size, tokens.ctx_len)
            if training.runs_model:
                rows_per_batch(training.step_tokens, tokens.ctx_len)
            self._check_run(self.configs["train"])

    def _check_model(self, config: CacheConfig) -> None:
        """Refuse tokens that are not the model's, sites that it has not, and SAEs that do not fit them; fill
        in training's sites."""
        if "tokenize" in self.configs:
            _check_tokens(self.configs["tokenize"], config)
        widths = {site.name: site.width for site in _sites(config)}
        if "train" not in self.configs:
            return
        training: TrainConfig = self.configs["train"]
        if config.out == UNKNOWN:  # else there may be more sites in the store, which training looks up
            training = self.configs["train"] = with_sites(training, widths)
        train_sites = [
            *training.site,
            *training.target_site,
            *(str(entry[key]) for entry in training.variants for key in SITES if entry.get(key)),
        ]
        sources = sources_of(training)
        if not train_sites:
            training = self.configs["train"] = replace(training, site=started_at(sources) or tuple(widths))
        parts = {name: parts_of(name) for name in train_sites or widths}
        others = [part for every in parts.values() for part in every if part not in widths]
        if not others:  # they may be in a store that is named
            trained_widths = {name: sum(widths[part] for part in every) for name, every in parts.items()}
            self.variants = of_config(training, trained_widths, n_steps=1, sources=sources)
        elif config.out == UNKNOWN and training.with_acts is None:
            other = others[0]
            raise ConfigError(f"train.site {other!r} is not cached; {settings.nearest(other, widths)}")

    def _check_run(self, config: TrainConfig) -> None:
        """Refuse a folder that holds another run, before anything is cached for it."""
        if config.out == UNKNOWN or not (config.out / runs.IDENTITY).exists():
            return
        try:
            identity = runs.identity(config.out)
        except StoreError:  # training writes it again where other records name the run
            return
        wanted = {"init_from": None, **identity_of(config, sources_of(config))}
        settings.check_same(identity.content, wanted, config.out)


SITES = ("site", "target_site")
"""Settings of a variant that name what it is trained on."""
FOLDERS = {"tokenize": {"out"}, "cache": {"out", "tokens"}, "train": {"out", "acts"}, "assess": {"run"}}
"""Settings that name folders between stages."""


def _here(values: dict[str, Any]) -> dict[str, Any]:
    """Replace local datasets, tokenizers, templates, models and SAEs in the settings by their absolute
    paths."""
    named = ("dataset", "tokenizer", "chat_template", "model", "init_from")
    candidates = {name: values.get(name) for name in named}
    there = {name: v for name, v in candidates.items() if v and Path(str(v)).exists()}
    local: dict[str, Any] = {name: str(Path(v).absolute()) for name, v in there.items()}
    if isinstance(values.get("mix"), list):
        local["mix"] = [_here(entry) if isinstance(entry, dict) else entry for entry in values["mix"]]
    return {**values, **local}


def _check_tokens(tokens: TokenizeConfig, config: CacheConfig) -> None:
    """Refuse a tokenizer or rows that the model cannot take."""
    info = load_tokenizer(tokens.tokenizer, tokens.tokenizer_revision)[1]
    trusts = config.trust_remote_code
    limits = limits_of(load_model_config(config.model, config.revision, trusts), trusts)
    check_row_length(limits, config.model, tokens.ctx_len or 1)  # 1: it may follow from rows not read yet
    check_tokenizer(info, config.model, config.revision, config.allow_other_tokenizer)


def _sites(config: CacheConfig) -> list[Site]:
    model_config = load_model_config(config.model, config.revision, config.trust_remote_code)
    return sites_of(config, Architecture(model_config, config.trust_remote_code))


def _is_there(path: Path, stage: str) -> bool:
    """Tell whether what a stage reads is in a folder or at an address."""
    try:
        folder, _ = mirror.opened(path)
    except MissingError:
        return False
    return (folder / MADE[stage]).exists()


def _damaged(acts: Path) -> Path:
    """Return the file whose presence says that an activation store must be checked, though it has all
    sites: beside it, or beside the mirror of an address."""
    if address := address_of(acts):
        acts = mirror.folder_of(address)
    return acts.with_name(f"{acts.name}.damaged")
