"""A step on a GPU: `backend.py` runs the `kernels/`, in Triton."""
