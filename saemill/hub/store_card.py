"""README.md of a store's repository: what is in it, and how it is read."""

from pathlib import PurePath
from typing import Any

from saemill.common.activations import ActivationStore
from saemill.common.log import counted
from saemill.common.tokens import TokenStore
from saemill.hub.card import code, front_matter, rows
from saemill.hub.names import Names


def tokens_card(repo: str, store: TokenStore, names: Names) -> str:
    """The card of a token store.

    Args:
        repo: where it will be: `user/repo`, or `user/repo@branch`.
        store: what is uploaded.
        names: what stands for this machine's paths.
    """
    manifest = names.of(store.manifest)
    source = manifest["source"]["name"]
    parts = [
        _front_matter("tokens"),
        f"# Tokens of {PurePath(source).name}",
        f"{counted(store.n_rows, 'full row')} of {store.ctx_len} token ids, packed by saemill "
        f"{manifest['versions'].get('saemill', '')}, with the documents they come from.",
        rows([["", ""], *_text_lines(store, manifest)]),
        "## Read",
        code("", f"saemill pull datasets/{repo} -o tokens"),
        code(
            "python",
            "from saemill import TokenStore\n\n"
            'store = TokenStore("tokens")\n'
            f"ids = store.rows(0, 16)  # [16, {store.ctx_len}]\n"
            "held_out = store.held_out_R  # bool [rows]: never trained on",
        ),
    ]
    return "\n\n".join(parts) + "\n"


def activations_card(repo: str, store: ActivationStore, names: Names) -> str:
    """The card of an activation store; arguments as of `tokens_card`."""
    settings, manifest = names.of(store.settings), names.of(store.tokens.manifest)
    model = settings["model"]
    sites = [store.site(name) for name in store.sites]
    mib = {site.name: site.array.n_shards * site.array.shard_bytes / 2**20 for site in sites}
    first = sites[0]
    parts = [
        _front_matter("activations"),
        f"# Activations of {PurePath(model).name}",
        f"Activations of `{model}`, cached by saemill {settings['versions']['saemill']}, and the tokens that "
        "they belong to. A site is the output of that module of the base model (`AutoModel`).",
        rows(
            [
                ["site", "shape", "stored as", "MiB", "mean squared norm"],
                *(
                    [
                        f"`{site.name}`",
                        f"[{store.n_tokens:,}, {site.width:,}]",
                        settings["dtype"],
                        f"{mib[site.name]:,.1f}",
                        f"{site.statistics.mean_squared_norm:.4g}",
                    ]
                    for site in sites
                ),
            ]
        ),
        rows(
            [
                ["", ""],
                ["model", f"`{model}`" + (f" at `{settings['revision']}`" if settings["revision"] else "")],
                ["computed in", settings["model_dtype"]],
                *_text_lines(store.tokens, manifest),
                ["shards", f"{store.n_shards:,} of {store.shard_tokens:,} tokens per site"],
            ]
        ),
        "## Read",
        code("", f"saemill pull datasets/{repo} -o acts"),
        code(
            "python",
            "from saemill import ActivationStore\n\n"
            'store = ActivationStore("acts")\n'
            f'x = store.read("{first.name}", 0, 1024)  # [1024, {first.width}], in the order of the text\n'
            f"ids = store.tokens.rows(0, 16)  # [16, {store.ctx_len}]",
        ),
        "`saemill train acts` trains on it. It is Zarr v3, which other readers take as well: rows lie "
        "shuffled within each shard, by a permutation that saemill computes, and bf16 is kept as uint16.",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(kind: str) -> str:
    """`viewer: false`: the hub would show the lists of documents as if they were the data."""
    return front_matter({"tags": ["saemill", "interpretability", kind], "viewer": False})


def _text_lines(store: TokenStore, manifest: dict[str, Any]) -> list[list[str]]:
    return [
        ["text", f"`{manifest['source']['name']}`, {counted(manifest['n_documents'], 'document')}"],
        ["tokens", f"{store.n_tokens:,}: {counted(store.n_rows, 'row')} of {store.ctx_len}"],
        ["held out", f"{manifest['n_held_out_rows']:,} rows, by a hash of their documents' text"],
        ["tokenizer", f"`{manifest['tokenizer']['name']}`, {store.tokenizer.vocab_size:,} ids"],
    ]
