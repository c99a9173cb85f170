"""Who computes a step.

codes.py      tokens → codes → residuals
auxk.py       what dead latents learn from them
rows.py       gradients → optimizer → weights, latent by latent
passes.py     the choice: torch's operations, or
cpu/          loops for a CPU, compiled by numba
gpu/          kernels for a GPU, in Triton
team.py       what the processes of one team agree on
threads.py    pieces of a step shared out among threads
"""
