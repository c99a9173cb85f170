"""`saemill cache`: one forward pass over the rows serves every requested site.

A token's path continues in `fill`, then in `writer`.
"""

from collections.abc import Callable
from importlib.metadata import version
from threading import Event
from typing import Any

import torch

from saemill.cache import names, token_copy
from saemill.cache.calibration import calibrations_by
from saemill.cache.claims.worker import Worker
from saemill.cache.config import CacheConfig
from saemill.cache.fill import Filling, batch_rows
from saemill.cache.folder import check_same_store, clear_if_empty, existing_settings, write_group
from saemill.cache.placing import place_of
from saemill.cache.plan import Plan, make_plan
from saemill.cache.repair import damaged, mend
from saemill.cache.room import Room, make_whole
from saemill.cache.writer import SiteWriter
from saemill.common.addresses import naming
from saemill.common.errors import DataError
from saemill.common.log import counted, say
from saemill.common.models.cached import how_cached
from saemill.common.models.model import LanguageModel, fingerprint_weights
from saemill.common.models.site_roles import roles_of
from saemill.common.outlook import Before, tell
from saemill.common.signals import stop_on_signal
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.site_records import IN_MEMORY, StoreSettings
from saemill.common.stores.statistics import warnings
from saemill.common.weights import check_devices
from saemill.common.world import World, speak_for


def run(
    config: CacheConfig,
    model: Any = None,
    stop: Event | None = None,
    when_open: Callable[[ActivationStore], None] = lambda store: None,
    before: Before = tell,
) -> ActivationStore:
    """Cache the activations of the chosen sites into `config.out`.

    A store that exists is added to: sites that are missing are cached, shards and tokens that are
    missing or damaged are written again, and nothing else is touched. Settings left open are the store's.
    Any number of processes may do so at once: each shard is written by one of them, and each returns
    when the sites it was asked for are complete.

    Args:
        config: the settings.
        model: the model itself, in evaluation mode, where it is in memory. `config.model` is its name then.
        stop: event that stops it, as a signal does.
        when_open: called when the store is there, before its shards are.
        before: takes the outlook, when all is checked and nothing is written yet.

    Raises:
        ConfigError: settings that do not fit the model or the tokens, a store made with others, or
            too little disk.
        DataError: NaN or infinite activations.
        StoreError: damaged tokens, or a folder with other files.
        Interrupted: a signal came; the same call goes on.
    """
    world = World.here()
    speak_for(world)
    check_devices(config.spread, world.size, torch.cuda.device_count())
    place = place_of(config.out)
    with stop_on_signal(stop) as stop, naming(place.folder, place.name):
        plan = make_plan(config, world, place.folder, model)
        before(plan.outlook)
        with Worker(place, stop) as worker:
            store, writers = _open(plan, worker)
            when_open(store)
            try:
                what = _complete(plan, store, writers, worker)
            except DataError:
                clear_if_empty(place.folder, worker)
                raise
    say(f"{place.name}: {', '.join(site.name for site in plan.sites)} {what}")
    finished = [site.name for site in plan.sites if site.name in store.sites]
    for array in map(store.site, finished):
        for warning in warnings(array.name, array.statistics, array.dtype, "token"):
            say(warning)
    return store


def _open(plan: Plan, worker: Worker) -> tuple[ActivationStore, list[SiteWriter]]:
    """Open the store with its tokens and the sites' arrays; what is missing of them is made."""
    out, tokens, n_rows = worker.place.folder, plan.tokens, plan.identity["n_rows"]
    copy = out / "tokens"
    existed = (copy / "manifest.json").exists()
    # Workers hash the copy side by side; then it, or one that was not there and is new, needs no hash again.
    whole = token_copy.is_whole(copy, tokens, n_rows, hashes=True)
    with worker.hold("store") as claim:
        existing = existing_settings(out, tokens)
        check_same_store(out, existing, plan.identity)
        if not token_copy.is_whole(copy, tokens, n_rows, hashes=existed and not whole):
            token_copy.make(copy, tokens, n_rows, claim)
        write_group(out, existing or _new_settings(plan), worker)
        store = worker.place.opened()
        return store, [SiteWriter(store, site, worker) for site in plan.sites]


def _new_settings(plan: Plan) -> StoreSettings:
    """Make the settings of a new store."""
    return StoreSettings.made(
        plan.identity,
        model=plan.config.model + ("" if plan.given is None else IN_MEMORY),
        revision=plan.config.revision,
        trust_remote_code=plan.config.trust_remote_code or None,
        weights_fingerprint=fingerprint_weights(plan.config.model) if plan.given is None else None,
        versions={name: version(name) for name in ("saemill", "torch", "transformers", "zarr")},
    )


def _complete(plan: Plan, store: ActivationStore, writers: list[SiteWriter], worker: Worker) -> str:
    """Write the shards that the sites lack, beside other workers, until all sites have their manifests.
    Return a sentence on what was done."""
    is_known = all(writer.is_calibrated for writer in writers)
    model = None if is_known else _load(plan, store, writers, worker)
    n_missing = n_written = 0
    while True:
        room = _room(plan, store, writers, worker)
        bad = [damaged(writer) for writer in writers]
        with worker.hold("store"):
            if room is not None:
                room.refresh()
            for writer, shards in zip(writers, bad, strict=True):
                mend(writer, shards)
        lacking = {writer.site.name: writer.lacking() for writer in writers}
        if room is not None:
            lacking = {name: room.wanted(shards) for name, shards in lacking.items()}
        if any(lacking.values()):
            _report_progress(store, lacking)
            n_missing += sum(map(len, lacking.values()))
            model = model or _load(plan, store, writers, worker)
            filling = Filling(store, writers, model, worker, room, _batch_rows(plan))
            filling.run()
            n_written += filling.n_written
        if room is not None and room.stays_open:
            return room.left
        with worker.hold("store"):
            if all([writer.finish() for writer in writers]):
                make_whole(store, [writer.site.name for writer in writers], worker, is_done=True)
                return f"complete; {_done_sentence(n_missing, n_written)}"


def _room(plan: Plan, store: ActivationStore, writers: list[SiteWriter], worker: Worker) -> Room | None:
    """Bound the room that shards have, where those that are read are removed; else see to it that none is
    counted as removed."""
    max_bytes, unfinished = plan.config.max_disk_bytes, [w for w in writers if not w.manifest_path.exists()]
    if max_bytes is not None and plan.config.delete_consumed and unfinished:
        return Room(store, unfinished, worker, max_bytes)
    with worker.hold("store"):
        make_whole(store, [writer.site.name for writer in writers], worker)
    return None


def _load(plan: Plan, store: ActivationStore, writers: list[SiteWriter], worker: Worker) -> LanguageModel:
    """Load the model, write down what is at the sites and how int8 is calibrated there, and warn where a site
    is not what its name says. The sites asked for are compared with the finished ones too."""
    model = LanguageModel(
        plan.config.model,
        revision=plan.config.revision,
        device=plan.device,
        given=plan.given,
        **how_cached(store.settings, plan.config.spread),
    )
    ids_RS = torch.from_numpy(store.tokens.rows(0, 1).astype("int64"))
    sites = [site.name for site in plan.sites]
    finished = [name for name in store.sites if name not in sites]
    found = roles_of(model, sites + finished, ids_RS)
    missing = [writer.site.name for writer in writers if not writer.is_calibrated]
    calibrations = calibrations_by(model, store, missing, _batch_rows(plan))
    with worker.hold("store"):
        for writer in writers:
            writer.note(found[writer.site.name], calibrations.get(writer.site.name))
    for warning in names.warnings(model, found, ids_RS):
        say(f"warning: {warning}")
    return model


def _batch_rows(plan: Plan) -> int:
    """Choose the rows per forward pass."""
    return batch_rows(plan.config.batch_size, plan.tokens.ctx_len, plan.device)


def _report_progress(store: ActivationStore, pending: dict[str, list[int]]) -> None:
    """Tell the user how far an earlier run came, site by site."""
    for name, shards in pending.items():
        n_done = store.n_shards - len(shards)
        if shards and n_done:
            say(
                f"{name}: {n_done:,} of {counted(store.n_shards, 'shard')} are there, "
                f"continuing with shard {shards[0]}"
            )


def _done_sentence(n_missing: int, n_written: int) -> str:
    """Describe the finished work in a sentence."""
    if not n_missing:
        return "nothing to do, every shard was checked"
    others = f", {n_missing - n_written:,} of them by other workers" if n_written < n_missing else ""
    return f"{counted(max(n_missing, n_written), 'shard')} written{others}"
