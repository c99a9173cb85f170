"""A store in another form: other stored types, compressed or not, other shards. No model is needed.

config.py  the settings
plan.py    the new store's settings, its calibrations, and whether it can be made
run.py     its text, then its sites, shard by shard, through the cache's own writer
rows.py    stored rows by address, and in another form
"""
