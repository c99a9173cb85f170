"""`saemill convert-store`: a store's activations, read and written again in another form.

What a form keeps is kept bit by bit: another compression or other shards change no activation, and codes of
int8 stay as they are, with their calibration. Another type rounds.
"""

import shutil
from pathlib import Path

from saemill.cache.claims.worker import Claim, Worker
from saemill.cache.folder import write_group
from saemill.cache.repair import damaged, mend
from saemill.cache.spare import Spare
from saemill.cache.writer import SiteWriter
from saemill.common import records
from saemill.common.addresses import naming
from saemill.common.errors import StoreError
from saemill.common.log import counted, progress, say
from saemill.common.outlook import tell
from saemill.common.signals import stop_on_signal
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.passages import PassageStore
from saemill.common.stores.site_array import SiteArray
from saemill.common.stores.site_records import REPAIR, Site
from saemill.common.stores.tokens import TokenStore
from saemill.common.world import World, speak_for
from saemill.convert_store.config import ConvertConfig
from saemill.convert_store.plan import Plan, make_plan, outlook_of
from saemill.convert_store.rows import Addressed, stored_again


def run(config: ConvertConfig) -> ActivationStore:
    """Write the finished sites of a store to `config.out`, in another form.

    A store that is there already, begun by the same call, is finished or mended.

    Raises:
        ConfigError: the form is the source's own, the output holds another store, or too little disk.
        StoreError: the source is damaged, or the output holds other files.
        DataError: activations that the type cannot hold.
        Interrupted: a signal came; the same call goes on.
    """
    speak_for(World.here())
    plan = make_plan(config)
    tell(outlook_of(plan, config.out))
    with (
        stop_on_signal() as stop,
        naming(plan.source.path, plan.source.named),
        naming(plan.place.folder, plan.place.name),
        Worker(plan.place, stop) as worker,
        worker.hold("store") as claim,
    ):
        write_group(plan.place.folder, plan.settings, worker)
        _copy_text(plan, worker, claim)
        store = plan.place.opened()
        n_written = sum(_convert(plan, site, store, worker, claim) for site in plan.sites)
    what = f"{counted(n_written, 'shard')} written" if n_written else "nothing to do, every shard was checked"
    names = ", ".join(site.name for site in plan.sites)
    say(f"{plan.place.name}: {names} as {plan.settings.stored_as}; {what}")
    return store


def _copy_text(plan: Plan, worker: Worker, claim: Claim) -> None:
    """Copy the tokens or passages, where they are not there yet or not whole."""
    text = plan.source.text
    folder = plan.place.folder / text.path.name
    if _is_whole(text, folder):
        return
    if bad := text.problems(hashes=True):
        raise StoreError("\n".join([*bad, f"{text.path} is damaged: {REPAIR}"]))
    partial = worker.partial()
    shutil.copytree(text.path, partial)
    records.listed(partial)  # which flushes them
    claim.check()
    plan.place.replace_text(partial, folder)


def _is_whole(text: TokenStore | PassageStore, folder: Path) -> bool:
    """Tell whether a folder holds a whole copy of some tokens or passages."""
    copy = records.if_whole(lambda: type(text)(folder))
    return copy is not None and copy.fingerprint == text.fingerprint and not copy.problems(hashes=True)


def _convert(plan: Plan, site: SiteArray, store: ActivationStore, worker: Worker, claim: Claim) -> int:
    """Write the shards of a site that are missing or damaged. Return their number."""
    writer = SiteWriter(store, Site(site.name, site.width), worker)
    writer.note(site.role, plan.calibrations[site.name])
    mend(writer, damaged(writer))
    lacking = writer.lacking()
    if lacking:
        _write(site, lacking, store, writer, claim)
    if not writer.finish():
        raise StoreError(f"shards of {store.path} went missing meanwhile; run the command again")
    return len(lacking)


def _write(
    site: SiteArray, lacking: list[int], store: ActivationStore, writer: SiteWriter, claim: Claim
) -> None:
    """Write the shards of a site that are lacking."""
    addressed, spare = Addressed(site), Spare()
    n_done = store.n_tokens - sum(map(store.shard_length, lacking))
    with progress(f"convert {site.name}", store.n_tokens, f"{store.text.unit}s", n_done) as advance:
        for shard in lacking:
            writer.worker.check_stop()
            start = shard * store.shard_tokens
            rows_TC = addressed.rows(start, start + store.shard_length(shard))
            same = store.shard_tokens == site.store.shard_tokens
            batch_rows = site.manifest.shards[shard].batch_rows if same else None
            writer.write(shard, stored_again(site, rows_TC, writer.form), claim, spare, batch_rows)
            advance(len(rows_TC))
