"""The training step's kernels for CUDA, in Triton: select or above → residual or groups → segments → rows.

`arch/` defines the same arithmetic in plain torch; `gpu/backend.py` and `gpu/update.py` call these kernels.
What is fused here, and why:

- `select`: the k largest pre-activations of each token in one read of the row.
- `above`: the pre-activations above floors, of each token as many as there are, in one read of the row.
- `residual`: decoding, error, ⟨error, decoder row⟩ of each active latent, and the squared error, with each
  decoder row gathered once. The error is stored rounded, and everything after it uses the rounded one.
- `groups`: the same for nested groups of codes, each with an error of its own, and for tokens that have
  different numbers of codes.
- `segments`: the pairs (token, latent) sorted by latent, and their sums per latent.
- `rows`: for each latent both rows' gradients, the projection, the optimizer and the renorming, so that no
  gradient of the size of the parameters is ever written.

No atomics anywhere: the same inputs give the same bits. Nothing waits for the device, so a whole step can
be captured in a CUDA graph. The modules need Triton, which CUDA builds of torch bring along; import them
where they are used, and only there.
"""
