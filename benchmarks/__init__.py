"""Benchmarks by subject; each prints ratios measured in one run, with the machine, the versions and the date.

step/         one training step: its parts, the limits of the machine, the resources of GPU kernels
train/        training beside other trainers: speed, memory, what is learned; what short formats cost
evaluate/     an assessment's figures beside those of other people's evaluations
cache/        caching beside the bare forward pass; the training loader beside plain reads
scale/        a whole pipeline on real input; several processes

report.py     the line of the machine, and tables
settings.py   settings of runs that are kept, and where the peers are
__main__.py   `python -m benchmarks`: the list of all
"""
