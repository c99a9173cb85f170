"""What an SAE is: each architecture one short file, with the dense loss that defines it.

topk.py       k latents per token, AuxK for the dead
abs_topk.py   the same by absolute value, with signs
initial.py    where parameters start
layered.py    where those of a cross-layer transcoder start
"""
