"""What is seen of SAEs while they train, on text that they do not train on.

plan.py       at which steps, on how much
held_out.py   an SAE as it will be used → FVU, L0, dead share on held-out rows
losses.py     the losses of the model with it spliced in
watch.py      all SAEs of this process at one step
"""
