"""A step on a GPU: `fused.py` strings together the `kernels/`, in Triton."""
