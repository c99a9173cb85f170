"""Stage 1: documents become packed rows of token ids.

The path of a document, from its file to its rows:

run.py         the stage: sources → tokens → rows → a TokenStore, in its place
source.py      documents out of any dataset: a hub id, files, a saved dataset
encoding.py    texts and conversations → token ids, by one process or several
mixing.py      several sources: whose document comes next
writer.py      token ids → rows, shards and tables
packing.py     documents → full rows
row_files.py   full rows → the shards of an array
place.py       whether the store is there already, and putting it there
bucket.py      the same at an address

What each of these asks:

config.py      the settings
named.py       the datasets that a command line names
memory.py      a dataset that is in memory already
files.py       which local files there are, and which one is at fault
columns.py     which column holds the documents
chats.py       conversations: rows of messages, checked
words.py       labelled words: checked, and found in their text
ids.py         rows that are tokenized already: checked, without frame and padding
held_out.py    which documents training never sees
outlook.py     what will be written
notes.py       what the user should know of what was done
"""
