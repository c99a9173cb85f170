"""A plan, stage by stage: each is checked as in a real run where its input is there, and looked ahead to
where it is not. What it will leave is then known, or found on a sample, for the next one."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from saemill.assess.config import AssessConfig
from saemill.assess.run import run as assess
from saemill.cache.config import CacheConfig
from saemill.cache.fill import batch_rows
from saemill.cache.run import run as cache
from saemill.common.addresses import is_there
from saemill.common.errors import ConfigError
from saemill.common.outlook import Outlook
from saemill.common.stores import runs
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.tokens import TokenStore
from saemill.pipeline.found import has_sites
from saemill.pipeline.stages import MADE, READS
from saemill.pipeline.together import check_room
from saemill.plan import ahead
from saemill.plan.ahead import Cached, Rows, Trained
from saemill.plan.child import Measured, Piece
from saemill.plan.device import Device
from saemill.plan.probe import Estimate, Probe, estimate, with_measured
from saemill.plan.sample import sample
from saemill.tokenize.config import TokenizeConfig
from saemill.tokenize.outlook import outlook_of_rows
from saemill.tokenize.run import opened
from saemill.tokenize.run import run as tokenize
from saemill.train.config import TrainConfig
from saemill.train.run import check_machine
from saemill.train.run import run as train
from saemill.train.sweep.halving import work_share

STAGES: dict[str, Callable[..., Any]] = {
    "tokenize": tokenize, "cache": cache, "train": train, "assess": assess,
}  # fmt: skip
UNKNOWN_TOKENS = 1 << 40
"""Most tokens of a piece where nobody knows how many there are."""
SAMPLE_ROWS = 2048
"""Most rows of the tokens that pieces are cached from."""
SHORT_ROWS, SHORT_STEPS, SHORT_SHARE = 64, 4, 32
"""What short runs go over: rows to tokenize, steps of training, one part of the assessment in so many."""


class Planned(NamedTuple):
    """One stage of a plan."""

    outlook: Outlook
    time: Estimate | None
    """None where it was not measured."""


class _Told(Exception):
    """The end of a stage that was to tell its outlook only."""

    def __init__(self, outlook: Outlook) -> None:
        self.outlook = outlook


def checked(stage: str, config: Any) -> Outlook:
    """Check a stage as a real run does, up to where that would begin to write.

    Raises:
        SaemillError: what the stage refuses.
    """

    def stop(outlook: Outlook) -> None:
        raise _Told(outlook)

    try:
        STAGES[stage](config, before=stop)
    except _Told as told:
        return told.outlook
    return Outlook(stage=stage, folder=config.out, is_done=True)


@dataclass(slots=True)
class Planner:
    """What is known of the stages so far.

    Args:
        place: fills in the folders that are found by content, where they can be known.
        probe: measures; None without.
        follower: training, where it follows caching and what it has read is removed.
    """

    place: Callable[[str, Any], Any]
    probe: Probe | None
    follower: TrainConfig | None = None
    unmeasured: str = field(init=False, default="")
    """Why stages are not measured; empty where they are."""
    tokens: TokenStore | None = field(init=False, default=None)
    """Rows that are there, or a sample of them."""
    rows: Rows | None = field(init=False, default=None)
    """The rows that are cached."""
    cached: Cached | None = field(init=False, default=None)
    acts: Path | None = field(init=False, default=None)
    """Activations that are there, or those of a sample."""
    has_acts: bool = field(init=False, default=False)
    """Whether they are those that are trained on."""
    trained: Trained | None = field(init=False, default=None)
    run: Path | None = field(init=False, default=None)
    """SAEs that are there, or those of a few steps."""
    left: Path | None = field(init=False, default=None)
    """Folder of the stage before, where that is done."""

    def stage(self, stage: str, config: Any) -> Planned:
        """Plan one stage, after those before it.

        Raises:
            SaemillError: what the stage refuses.
        """
        plans: dict[str, Callable[[Any], Planned]] = {
            "tokenize": self._tokenize, "cache": self._cache, "train": self._train, "assess": self._assess,
        }  # fmt: skip
        if self.left is not None:
            config = replace(config, **{READS[stage]: self.left})
        here = config if stage == "tokenize" else Device.of(config.device).here(config)
        config = replace(config, out=self.place(stage, here).out)
        planned = plans[stage](config)
        self.left = config.out if planned.outlook.is_done else None
        return planned

    def _tokenize(self, config: TokenizeConfig) -> Planned:
        outlook = checked("tokenize", config)
        if outlook.is_done:
            self.tokens = TokenStore(config.out)
            return Planned(outlook, None)
        most = outlook.amount or UNKNOWN_TOKENS
        limited = replace(outlook, amounts={"max_tokens": most})
        measured, out = self._measured(limited, config, SHORT_ROWS * outlook.least, most)
        if measured is None or out is None:
            if not outlook.amount:
                raise ConfigError(
                    "how many tokens the text has is not known without a measurement: leave out --no-probe, "
                    "or say --max-tokens"
                )
            n_rows = outlook.amount // outlook.least
            self.rows = Rows(n_rows, outlook.least, round(config.held_out_fraction * n_rows), kept_share=1.0)
            return Planned(outlook, None)
        self.tokens = TokenStore(out)
        n_rows = _n_rows(config, outlook.amount, self.tokens)
        self.rows = Rows.of(self.tokens, None, MaskConfig()).scaled(n_rows)
        return _planned(outlook_of_rows(config, self.tokens, n_rows), measured)

    def _cache(self, config: CacheConfig) -> Planned:
        device, has_tokens = Device.of(config.device), is_there(config.tokens / MADE["cache"])
        checked_here = checked("cache", device.here(config)) if has_tokens else None
        if has_tokens:
            self.tokens = TokenStore(config.tokens)
            self.rows = Rows.of(self.tokens, config.max_tokens, config.mask or MaskConfig())
        assert self.rows is not None
        outlook, self.cached = ahead.caching(config, self.rows, device.planned, self.tokens)
        self.rows = self.rows.scaled(outlook.amount // self.rows.ctx_len)
        if checked_here is not None:
            outlook = device.told(checked_here, outlook)
            if has_sites(config.out, {}, list(self.cached.widths)):
                self.acts, self.has_acts = config.out, True
                return Planned(replace(outlook, is_done=True), None)
        if self.follower is not None:
            if has_tokens:
                check_room(device.here(config), self.follower)
            there = self.tokens if has_tokens else None
            told = ahead.followed(self.follower, self.rows, self.cached, there, config.mask or MaskConfig())
            outlook = replace(outlook, what=(*outlook.what, told))
        self._leave_out(device)
        if self.tokens is None or self.probe is None:
            return Planned(outlook, None)
        some = sample(self.tokens, SAMPLE_ROWS, self.probe.folder / "sample")
        small = replace(config, tokens=some.path, max_disk=None, delete_consumed=False)
        least = batch_rows(config.batch_size, some.ctx_len, device.planned) * some.ctx_len
        measured, self.acts = self._measured(outlook, small, least, some.n_tokens)
        return _planned(outlook, measured)

    def _train(self, config: TrainConfig) -> Planned:
        device = Device.of(config.device)
        if not self.has_acts and is_there(config.acts / MADE["train"]):
            self.acts, self.has_acts = config.acts, True
        checked_here = checked("train", device.here(config)) if self.has_acts else None
        if checked_here is not None and config.follow:
            return Planned(checked_here, None)  # of a store that is being filled nothing can be measured
        if self.has_acts:
            self.rows, self.cached = ahead.of_store(ActivationStore(config.acts, config.with_acts), config)
        assert self.rows is not None
        assert self.cached is not None
        if config.with_acts is not None and not self.has_acts:
            self.cached = ahead.with_beside(self.cached, ActivationStore(config.with_acts))
            self.unmeasured = self.unmeasured or "not measured: with_acts is of all tokens, not of a sample"
        check_machine(device.here(config))
        outlook, self.trained = ahead.training(
            config, self.rows, self.cached, device.planned, device.memory_bytes
        )
        if checked_here is not None:
            outlook = device.told(checked_here, outlook)
        if outlook.is_done:
            self.run = config.out
            return Planned(outlook, None)
        self._leave_out(device)
        if self.acts is None:
            return Planned(outlook, None)
        small = ahead.few_steps(self.trained.config, self.acts, outlook.amount)
        measured, self.run = self._measured(outlook, small, SHORT_STEPS * outlook.least, outlook.amount)
        return _planned(outlook, measured, work_share(self.trained.variants, config.halving))

    def _assess(self, config: AssessConfig) -> Planned:
        device = Device.of(config.device)
        is_trained = runs.is_finished(config.run)
        outlook = checked("assess", device.here(config)) if is_trained else None
        most = outlook.amount if outlook else 0
        if outlook is None:
            assert self.rows is not None
            assert self.cached is not None
            assert self.trained is not None
            outlook = ahead.assessing(config, self.rows, self.cached, self.trained, device.planned)
            most = outlook.amount
            if self.acts is not None and not self.has_acts:
                most = ahead.most_to_assess(outlook, TokenStore(self.acts / "tokens"), self.rows.kept_share)
        if is_trained:
            self.run = config.run
        self._leave_out(device)
        if self.run is None:
            return Planned(outlook, None)
        small = replace(config, run=self.run, log_to_wandb=None)
        return _planned(outlook, self._measured(outlook, small, most // SHORT_SHARE, most)[0])

    def _leave_out(self, device: Device) -> None:
        """Note that nothing is measured from here on where the device is another machine's."""
        if device.is_elsewhere and not self.unmeasured:
            self.unmeasured = "not measured: no GPU is here"

    def _measured(
        self, outlook: Outlook, config: Any, least: int, most: int
    ) -> tuple[Measured | None, Path | None]:
        """Run a piece of a stage, unless nothing is measured.

        Args:
            outlook: of the whole.
            config: of the stage; its input is that of the piece.
            least: tokens of the short runs.
            most: most tokens that there are to measure on.

        Returns: what was measured, and the folder that the last run wrote.
        """
        if self.probe is None or self.unmeasured:
            return None, None
        piece = Piece(
            stage=outlook.stage,
            config=config,
            whole=outlook.amounts,
            unit=outlook.least,
            least=least,
            most=min(most, outlook.amount),
            out=self.probe.folder / outlook.stage,
        )
        try:
            measured = self.probe.measure(piece)
        except ConfigError as error:
            self.unmeasured = f"not measured: {error}"
            return None, None
        return measured, measured.out


def _planned(outlook: Outlook, measured: Measured | None, share: float = 1.0) -> Planned:
    """Put together what is known of a stage; `share` is that of the work that is not spared."""
    if measured is None:
        return Planned(outlook, None)
    return Planned(with_measured(outlook, measured), estimate(measured, round(outlook.amount * share)))


def _n_rows(config: TokenizeConfig, most_tokens: int, some: TokenStore) -> int:
    """Estimate the rows that a text will give: as many as the documents of a sample, or the limit."""
    limit = most_tokens // some.ctx_len or UNKNOWN_TOKENS
    sources = opened(config)
    if any(source.streaming for source in sources):
        if most_tokens:
            return limit
        raise ConfigError("how many tokens a stream has nobody knows before: say --max-tokens")
    n_documents = sum(len(source.dataset) for source in sources)
    return min(limit, max(1, round(some.n_rows * n_documents / some.manifest.n_documents)))
