"""What is on disk, each with a reader that checks it.

tokens.py         TokenStore: packed rows and their documents
token_writer.py   writing one, and copying a store's first rows
passages.py       PassageStore: what each row of an embedding store is
activations.py    ActivationStore: one array per site, over tokens or passages
site_array.py     one site's rows, checked as they are read
followed.py       a store that is still being filled, or of which shards are gone
followers.py      who reads it meanwhile, and which shards are gone since all have
joined.py         several sites as one, of a store or of two
site_names.py     what sites are called
site_roles.py     what is at a site
site_records.py   its JSON: settings, sites, commits, manifests
content.py        a file, read range by range
objects.py        objects of S3, Google Cloud or Azure, read range by range
kept_locally.py   how much of those is kept on a disk here
local_cache.py    what is kept: blocks
mirror.py         a store that lies there
shards.py         a Zarr array of one file per shard, which memory-maps
forms/            float rows ↔ stored rows ↔ the bytes of a shard
rounding.py       values → a float type of fewer bits
permutation.py    the order of rows in a shard, and every other shuffle
statistics.py     moments of a site
statistics_records.py  those as records hold them
norms.py          norms of a site's rows, and counts of them
mask.py           which positions count
message_roles.py  whose message each token of a chat is of
columns.py        Parquet
runs.py           a run's folder
assessments.py    the results of `saemill assess`
"""
