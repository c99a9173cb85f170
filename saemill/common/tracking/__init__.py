"""wandb, in a process of its own, `saemill track`: it reads a run's folder, and nothing waits for it.

process.py     how a stage starts that process, and ends it within a bounded time
key.py         whether wandb would ask for an API key
track.py       what runs in it, by hand or for a stage
follow.py      metrics.jsonl, while training writes it
assessment.py  the results of `saemill assess`
runs.py        one wandb run per variant, in a group
record.py      wandb.json: what the runs are; wandb-logged.json: how far it came

`RUN/wandb.json` says what the runs are: project, entity, group, and of each variant the id and config.
"""
