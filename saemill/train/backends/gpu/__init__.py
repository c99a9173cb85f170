"""A step on a GPU: `backend.py` and `update.py` run the `kernels/`, in Triton."""
