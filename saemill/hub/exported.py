"""A dataset for other tools on the hub: Parquet, which `datasets` reads, and SAELens' metadata."""

import json
import tempfile
from pathlib import Path

import datasets
from huggingface_hub import DatasetCardData

from saemill.common.stores import runs
from saemill.hub.card import code, front_matter
from saemill.hub.contents import Contents
from saemill.hub.names import Names, as_json
from saemill.hub.push import upload
from saemill.token_export import METADATA

SHARD_ROWS = 1 << 17


def push_exported(rows: datasets.Dataset, folder: Path, repo: str, private: bool) -> None:
    """Upload rows of ids that were exported.

    Args:
        rows: the dataset.
        folder: where it was saved, with its metadata.
        repo: `user/repo`; created if it is not there.
        private: whether the repository is made a private one.

    Raises:
        ConfigError: the hub refuses.
    """
    told = json.loads((folder / METADATA).read_bytes())
    told = Names(told).of(told)
    card = "\n\n".join(
        [
            front_matter(DatasetCardData(tags=["saemill", "tokens"], viewer=False)),
            f"# Token ids of {told['original_dataset']}",
            f"{len(rows):,} rows of {told['context_size']} ids by the tokenizer `{told['tokenizer_name']}`, "
            "packed by saemill for SAELens and sparsify.",
            code("python", f'from datasets import load_dataset\n\nload_dataset("{repo}", split="train")'),
        ]
    )
    with tempfile.TemporaryDirectory() as scratch:
        n_shards = -(-len(rows) // SHARD_ROWS)
        (Path(scratch) / "data").mkdir()
        for shard in range(n_shards):
            part = rows.with_format(None).shard(n_shards, shard, contiguous=True)
            part.to_parquet(f"{scratch}/data/train-{shard:05}-of-{n_shards:05}.parquet")
        upload(
            Contents(
                repo_type="dataset",
                folder=Path(scratch),
                as_they_are=("data/*.parquet",),
                written={METADATA: as_json(told), runs.CARD: f"{card}\n".encode()},
            ),
            repo,
            private=private,
            message=f"Upload {folder.absolute().name} with saemill",
        )
