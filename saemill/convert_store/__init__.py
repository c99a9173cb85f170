"""A store in another form: other stored types, compressed or not, other shards. No model is needed.

config.py    the settings
run.py       a store → its settings now → its text → its sites, shard by shard, through the cache's own writer
addressed.py the stored rows of a site in the order of their addresses, read once
"""
