"""Embeddings that were computed elsewhere, or are computed here: another source of an ActivationStore.

The path of a vector, from its file to its shard:

run.py         `saemill import-activations`: stored vectors, checked, → passages → shards
embed.py       `saemill embed`: texts → an encoder → the same
config.py      the settings of both
sources.py     which files or dataset a name means
tables.py      vectors, ids and texts out of columns: parquet, arrow, json lines, `datasets`
arrays.py      vectors out of .npy, .npz, raw rows, .pt and safetensors
texts.py       texts from another file, joined by id or by order
rows.py        a batch of rows, and what a vector becomes: normalized, rounded
store.py       the store: its passages, then the shards of its one site by the cache's writer
outlook.py     what `--dry-run` tells of it
"""
