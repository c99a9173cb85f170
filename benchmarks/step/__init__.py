"""One training step.

parts.py              a step by its parts, beside the limits of the machine
kernel_resources.py   registers, spills and shared memory of the GPU kernels, compiled ahead of time
"""
