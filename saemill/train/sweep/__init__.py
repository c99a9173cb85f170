"""Which SAEs a run trains, on which process, and for how long.

variant.py      one SAE, in settings
variants.py     lists → the SAEs
grid.py         combinations of lists, or what is listed
sources.py      what they start from, where not from random directions
sizes.py        an SAE → bytes while it is trained
placement.py    SAEs → processes
schedule.py     the learning rate over the run
halving.py      which stop early
"""
