"""The commands: each parses its flags, makes one call, and returns an exit code.

Heavy imports are inside the commands, so that `--help` is quick. `saemill.cli` names them all.

    run.py          run, plan, matrix: all stages at once
    pipeline.py     tokenize, cache, train, assess; demo
    embeddings.py   import-activations, embed
    models.py       sites: where activations can be cached
    stores.py       show, verify, convert-store
    tracking.py     track: a run to wandb
    exchange.py     export, import: SAEs of other tools
    hub.py          push, pull
    latents.py      latent, explain, export-latents
    studies.py      generate, compare
    cluster.py      submit, status
    flags.py        what their flags share
    words.py        how the words after `saemill` are read
"""
