"""How a step is computed.

base.py     the inputs and results of a step, and the protocol of a backend
architecture.py  what it asks of an architecture
codes.py    rules, and the codes that they leave
parameters.py  those of one SAE, by name
choose.py   which backend computes
plain.py    autograd of the definition, on any device
sparse.py   a step that touches active pairs alone, for
cpu/        loops for a CPU, compiled by numba
gpu/        kernels for a GPU, in Triton
from_output.py  a gradient at x̂ → that of the codes
by_layer.py  codes of cross-layer transcoders
auxk.py     the gradients of dead latents
adding.py   sums by place, in one order
team.py     the processes that share a step
"""
