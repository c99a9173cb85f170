"""Stage 3: one shuffled stream of activations trains many SAEs at once.

config.py     the settings
run.py        settings → a trainer → SAEs on disk
trainer.py    the loop
export.py     what a finished run leaves
sweep/        which SAEs, on which process, for how long
stream/       the store → batch i on the device
learner/      SAEs in training
backends/     who computes their steps
optim/        Adam, SGD, moments
record/       checkpoints, metrics, the run's folder
profile.py    where the time of a step goes
memory.py     huge pages
"""
