"""Stage 1: documents become packed rows of token ids.

The path of a document, from its file to its rows:

run.py         the stage: source → tokens → rows → a TokenStore, in its place
source.py      documents out of any dataset: a hub id, files, a saved dataset
encoding.py    texts → token ids, by one process or several
writer.py      token ids → rows, shards and tables
packing.py     documents → full rows

What each of these asks:

config.py      the settings
files.py       which local files there are, and which one is at fault
columns.py     which column holds the documents
ids.py         rows that are tokenized already: checked, without frame and padding
held_out.py    which documents training never sees
"""
