"""What stages share. It imports none of them.

setting.py      what is said of a setting, once            config.py       defaults < file < flags
errors.py       what a user can repair                     yaml_text.py    YAML, strictly
elsewhere.py    other tools' words
durable.py      files that are whole or absent             records.py      typed JSON with a checksum
log.py          what the user sees                         page.py         a report's HTML
world.py        the processes of a run                     signals.py      asked to stop
device.py       cpu, cuda, …                               hub.py          ids and addresses
addresses.py    object stores in a path's place            weights.py      how a model is held
outlook.py      what a stage will do, and what it needs
stores/         what is on disk                            models/         transformers, looked into
sae/            an SAE and its files                       steer/          an SAE in a running model
tracking/       wandb                                      loops/          compiled by numba, for CPUs
"""
