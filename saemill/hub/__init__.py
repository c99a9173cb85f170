"""Runs and stores as repositories on the Hugging Face hub.

push.py         a run or a store → a repository
contents.py     which files, and which of them without paths
card.py         the page of a run
kinds.py        what its SAEs are, in words
store_card.py   the page of a store
names.py        paths of this machine → names
exported.py     rows of ids for other tools → a repository
pull.py         a repository → a folder, checked
"""
