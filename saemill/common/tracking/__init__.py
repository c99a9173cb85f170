"""wandb, in a process of its own: it reads what a run's folder holds, and nothing waits for it.

    process.py     starts that process, and ends it within a bounded time
    __main__.py    what runs in it
    runs.py        one wandb run per variant, in a group
    follow.py      metrics.jsonl, while training writes it
    assessment.py  what `saemill assess` found

`RUN/wandb.json` says what the runs are: project, entity, group, and of each variant the id and config.
"""
