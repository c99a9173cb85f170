"""Caching and training at once: this process caches, another one trains on the shards as they come.

Each goes on where it was, so that the same command continues after either was killed; one that fails ends the
other.
"""

import json
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from threading import Event
from types import TracebackType
from typing import Any

from saemill.cache.config import CacheConfig
from saemill.cache.plan import bytes_of_rows, content_of, sites_of
from saemill.cache.run import run as cache
from saemill.common import config as settings
from saemill.common.errors import ConfigError, Interrupted, SaemillError, StoreError
from saemill.common.log import counted
from saemill.common.models.architecture import Architecture
from saemill.common.models.sites import load_model_config
from saemill.common.signals import stop_on_signal
from saemill.common.sizes import written
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.tokens import TokenStore
from saemill.common.world import World
from saemill.train.config import TrainConfig
from saemill.train.needed import counted_by_shard, needed_of

LOOK_SECONDS = 0.2
"""Seconds between two looks at the training process when there is nothing else to do."""


class _Training:
    """The process that trains; used as a context, it is ended with the block.

    Args:
        config: of the training.
        stop: event that is set when the process fails.
    """

    def __init__(self, config: TrainConfig, stop: Event) -> None:
        self.config, self.stop = config, stop
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, store: ActivationStore) -> None:
        """Start the process: the store is there."""
        command = [sys.executable, "-m", f"{__package__}.trainee"]
        # A session of its own: Ctrl-C comes to this process alone, which passes it on.
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it was killed already, which is noticed as its end
            self.process.stdin.write(json.dumps(settings.plain(self.config)).encode() + b"\n")
            self.process.stdin.flush()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        assert self.process is not None
        if self.process.wait():
            self.stop.set()

    def wait(self) -> None:
        """Wait until it has ended.

        Raises:
            Interrupted: a signal came to this process, or to that one.
            StoreError: it failed.
        """
        assert self.process is not None
        while self.process.poll() is None and not self.stop.is_set():
            self.stop.wait(LOOK_SECONDS)
        self.check()
        if self.process.poll() is None:
            raise Interrupted("stopped by a signal; the same command continues")

    def check(self) -> None:
        """Say how the process ended, if it ended badly.

        Raises:
            Interrupted: by a signal after which it saved.
            StoreError: it failed.
        """
        code = None if self.process is None else self.process.poll()
        if code == Interrupted.exit_code:
            raise Interrupted(
                "training was stopped by a signal, and caching with it; the same command continues"
            )
        if code:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else "failed, as it says above"
            raise StoreError(
                f"training {how}; caching was stopped with it, and what was finished is kept: the same "
                "command continues"
            )

    def __enter__(self) -> "_Training":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.terminate()  # it saves
        self.process.wait()
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()


def cache_and_train(caching: CacheConfig, training: TrainConfig, model: Any = None) -> None:
    """Cache, and train on it meanwhile, until both are done.

    Args:
        caching: settings of the one.
        training: settings of the other, with `follow`.
        model: the model itself, where it is in memory.

    Raises:
        ConfigError: several processes were started, or settings that either stage refuses.
        StoreError: training failed; what went wrong was printed by it.
        Interrupted: a signal came; the same call goes on.
    """
    if World.here().size > 1:
        raise ConfigError(
            "follow starts one process that caches and one that trains; start one, or `saemill cache` and "
            "`saemill train --follow` by hand, each with as many processes as you like"
        )
    stop = Event()
    with stop_on_signal(stop), _Training(training, stop) as child:
        try:
            cache(caching, model, stop=stop, when_open=child.start)
        except SaemillError:
            child.check()
            raise
        child.wait()


def check_room(caching: CacheConfig, training: TrainConfig, model: Any = None) -> None:
    """Refuse less room on the disk than both need: where shards are removed when they are read, for a group
    that training is in, the next one, and the first shards, as many as hold the held-out tokens that it
    measures on; else for all.

    Args:
        caching: settings of the one; its tokens are there.
        training: settings of the other.
        model: the model itself, where it is in memory.

    Raises:
        ConfigError: there is less, with what is needed; or what caching refuses.
    """
    limit = caching.max_disk_bytes
    if limit is None:
        return
    tokens = TokenStore(caching.tokens)
    content = content_of(caching, tokens, caching.out, model)
    n_rows, shard_tokens = content["n_rows"], content["shard_tokens"]
    if caching.delete_consumed:
        mask = settings.build(MaskConfig, content["mask"], "mask")
        by_shard = counted_by_shard(tokens, n_rows, shard_tokens, training.mask.positions(mask))
        n_kept, n_needed = needed_of(training, *by_shard, shard_tokens)
        first = f"the first {counted(n_kept, 'shard')} to its end, to measure on, and " if n_kept else ""
        why = f"training needs {first}two groups of shards at once, one to read and one that is written"
        less = f"a smaller train.follow_tokens{' or train.eval_tokens' if n_kept else ''}"
    else:
        n_needed, why = -(-n_rows * tokens.ctx_len // shard_tokens), "all shards are kept"
        less = "add --delete-consumed, by which shards that training has read are removed"
    trusts = caching.trust_remote_code
    model_config = (
        load_model_config(caching.model, caching.revision, trusts) if model is None else model.config
    )
    row_bytes = bytes_of_rows(sites_of(caching, Architecture(model_config, trusts)), content)
    n_bytes = n_needed * shard_tokens * sum(row_bytes.values())
    if limit < n_bytes:
        size = written(n_bytes)
        raise ConfigError(f"max_disk {caching.max_disk}: {why}, {size}; give as much or more, or {less}")
