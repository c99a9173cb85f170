"""Stage 3: one shuffled stream of activations trains many SAEs at once.

config.py     the settings
saes.py       those that say which SAEs are trained
checks.py     those that do not go together
architectures.py  names of the architectures
losses.py     names of what is minimised
batch.py      batches are counted in tokens
run.py        settings → a trainer → SAEs on disk
build.py      variants → backend, banks, trainer
inputs.py     sites, stream, model
outlook.py    what a run will do, and what it needs
needed.py     how many shards a run needs at once that follows a store
following.py  waiting for shards, where the store is still being filled
trainer.py    the loop
export.py     what a finished run leaves
points.py     SAEs kept on the way
tracking.py   what wandb gets of a run
sweep/        which SAEs, on which process, for how long
stream/       the store → batch i on the device
learner/      SAEs in training
watch/        measured on held-out text meanwhile
arch/         what an SAE is
objective/    what is minimised
backends/     how their steps are computed
optim/        how weights are stepped and averaged
record/       checkpoints, metrics, the run's folder
profile.py    where the time of a step goes
memory.py     huge pages
"""
