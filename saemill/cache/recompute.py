"""`saemill verify --repair`: bad shards are computed again, to the very bytes that their records tell of.

Nothing of a store is given up for it: a shard takes its place only if it comes out as it was, and records are
written again from whole shards.
"""

from pathlib import Path
from threading import Event

from saemill.cache.claims.worker import Worker
from saemill.cache.fill import batch_rows, computed
from saemill.cache.folder import write_group
from saemill.cache.placing import Place, place_of
from saemill.cache.repair import mend
from saemill.cache.spare import Spare
from saemill.cache.writer import SiteWriter
from saemill.common import records
from saemill.common.addresses import naming
from saemill.common.errors import ConfigError, StoreError
from saemill.common.log import counted, progress, say
from saemill.common.models.cached import how_cached
from saemill.common.models.model import LanguageModel
from saemill.common.signals import stop_on_signal
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.site_records import (
    EMBEDDINGS,
    IN_MEMORY,
    REPAIR,
    Commit,
    Shard,
    Site,
    SiteManifest,
    StoreSettings,
    known_settings,
    site_path,
    sites_in,
)
from saemill.common.world import World

Known = Commit | Shard
"""What is known of a shard: its record, or its entry in the site's manifest."""
CACHE_AGAIN = "`saemill cache` again, as it was called first, computes it anew"


def repair(
    path: Path, model: str | None, device: str, batch_size: int | None, stop: Event | None = None
) -> None:
    """Mend what is damaged of a store, so that it is as before, byte by byte.

    Args:
        path: its folder, or its address.
        model: the one that was cached, if not where the store says.
        device: that it runs on, as when it was cached.
        batch_size: rows per forward pass of shards whose records do not tell; None if that was left open.
        stop: event that stops it, as a signal does.

    Raises:
        ConfigError: the store cannot be computed again by a model alone, or comes out otherwise; or
            `batch_size` has no effect.
        StoreError: too much of it is damaged.
        Interrupted: a signal came; the same call goes on.
    """
    place = place_of(path)
    with (
        stop_on_signal(stop) as stop,
        naming(place.folder, place.name),
        Worker(place, stop) as worker,
        worker.hold("store"),
    ):
        writers = _opened(place, worker)
        bad = {writer.site.name: _bad(writer) for writer in writers}
        if any(bad.values()):
            _compute(worker, writers, bad, model, device, batch_size)
        for writer in writers:
            shards = range(writer.store.n_shards)
            mend(writer, [s for s in shards if s in bad[writer.site.name] or writer.commit(s) is None])
            if not writer.finish():
                say(f"{writer.site.name}: unfinished; `saemill cache` goes on with it")


def _opened(place: Place, worker: Worker) -> list[SiteWriter]:
    """Open a store's sites for writing; what describes them is written again where it is damaged."""
    settings = known_settings(place.folder)
    if settings is None:
        raise StoreError(f"no copy of the settings of {place.folder} is left: {CACHE_AGAIN}")
    _check(place.folder, settings)
    write_group(place.folder, settings, worker)
    store = place.opened()
    if bad := store.tokens.problems(hashes=True):
        raise StoreError("\n".join([*bad, REPAIR]))
    if consumed := store.consumed:
        raise ConfigError(consumed.refusal(consumed.sites[0], place.folder))
    sites = [Site(name, _width(store, name)) for name in sites_in(place.folder)]
    return [SiteWriter(store, site, worker) for site in sites]


def _check(folder: Path, settings: StoreSettings) -> None:
    """Refuse a store that no model can compute again."""
    if settings.kind == EMBEDDINGS:
        raise ConfigError(
            f"{folder} holds embeddings or imported activations, which no model here computes: run the "
            "command that made it again"
        )
    if settings.converted_from:
        raise ConfigError(
            f"{folder} was converted from a store of {settings.converted_from}, whose rounding is in its "
            "rows: run `saemill convert-store` again, as it was called first"
        )


def _width(store: ActivationStore, name: str) -> int:
    """Find the width of a site, in its record or in its manifest."""
    if record := records.if_whole(lambda: store.record(name)):
        return record.width
    file = site_path(store.path, name) / "manifest.json"
    if manifest := records.if_whole(lambda: records.read(file, SiteManifest, REPAIR)):
        return manifest.width
    raise StoreError(f"neither a record of {name} nor its manifest in {store.path} is whole: {CACHE_AGAIN}")


def _bad(writer: SiteWriter) -> dict[int, Known]:
    """Find the shards of which the file is not what the manifest, or the shard's record, tells of.

    Returns: what is known of each, by number.

    Raises:
        StoreError: of one both are damaged, so that nothing tells what its file was.
    """
    if not writer.is_calibrated:
        raise StoreError(f"the calibration of {writer.site.name} is lost: {CACHE_AGAIN}")
    bad: dict[int, Known] = {}
    manifest = writer.manifest()
    for shard in range(writer.store.n_shards):
        writer.worker.check_stop()
        known = manifest.shards[shard] if manifest else writer.commit(shard)
        if known is not None:
            if writer.array.problem(shard, known.bytes, known.xxh3):
                bad[shard] = known
        elif writer.manifest_path.exists() or writer.commit_path(shard).exists():
            raise StoreError(
                f"nothing whole tells what shard {shard} of {writer.site.name} in {writer.store.path} was: "
                f"{CACHE_AGAIN}"
            )
    return bad


def _compute(
    worker: Worker,
    writers: list[SiteWriter],
    bad: dict[str, dict[int, Known]],
    model_name: str | None,
    device: str,
    batch_size: int | None,
) -> None:
    """Compute bad shards again, those of one number at once at all sites where batches were the same."""
    store, known = writers[0].store, [each for shards in bad.values() for each in shards.values()]
    if batch_size is not None and all(each.batch_rows for each in known):
        raise ConfigError(
            f"batch_size has no effect: the records of the bad shards in {store.path} tell by how many rows "
            "they were computed; leave it out"
        )
    model = _load(store, model_name, device)
    otherwise = batch_rows(batch_size, store.tokens.ctx_len, model.device)
    passes: dict[tuple[int, int], list[SiteWriter]] = {}
    for writer in writers:
        for shard, each in bad[writer.site.name].items():
            passes.setdefault((shard, each.batch_rows or otherwise), []).append(writer)
    n_tokens = sum(store.shard_length(shard) for shard, _ in passes)
    with progress("repair", n_tokens, "tokens", 0) as advance:

        def done(n_tokens: int) -> None:
            worker.check_stop()
            advance(n_tokens)

        spare = Spare()
        for (shard, n_rows), lacking in sorted(passes.items(), key=lambda item: item[0]):
            forms = {writer.site.name: writer.form for writer in lacking}
            stored_TC = computed(store, model, forms, shard, n_rows, done, spare)
            for writer in lacking:
                name = writer.site.name
                if not writer.restore(shard, stored_TC[name], bad[name][shard].xxh3):
                    raise _comes_out_otherwise(store, name, shard, bad[name][shard].batch_rows)
    say(f"{counted(len(known), 'shard')} computed again, each as it was")


def _comes_out_otherwise(store: ActivationStore, site: str, shard: int, n_rows: int | None) -> ConfigError:
    """Make the error for a shard that is not what its record tells of."""
    settings = " and --device" if n_rows else ", --device and --batch-size"
    versions = ", ".join(f"{name} {version}" for name, version in sorted(store.settings.versions.items()))
    return ConfigError(
        f"shard {shard} of {site} in {store.path} does not come out as it was, so nothing took its place: "
        f"give the model{settings} with which it was cached, on a machine of that kind and "
        f"with the same versions ({versions}). Where that cannot be had, {CACHE_AGAIN}"
    )


def _load(store: ActivationStore, name: str | None, device: str) -> LanguageModel:
    """Load the model that was cached, as it was."""
    settings = store.settings
    name = name or str(settings.model)
    if name.endswith(IN_MEMORY):
        raise ConfigError(
            f"{store.path} was cached from a model in memory ({name.removesuffix(IN_MEMORY)}); name that "
            "model with --model, or give it to cache_activations again"
        )
    revision = settings.revision if name == settings.model else None
    here = World.here().device(device)
    return LanguageModel(name, revision=revision, device=here, **how_cached(settings))
