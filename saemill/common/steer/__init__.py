"""An SAE in a running model.

edits.py        what is done to latents: ablate, clamp, scale, steer
substitute.py   an activation → what the SAE makes of it, at some positions
splice.py       a model whose forward pass computes on with that
losses.py       what a model loses by it, token by token
"""
