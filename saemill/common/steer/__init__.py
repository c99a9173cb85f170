"""An SAE in a running model.

edits.py      what is done to latents: ablate, clamp, scale, steer
splice.py     a module's output replaced by the SAE's
"""
