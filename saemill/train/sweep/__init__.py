"""Which SAEs a run trains, on which process, and for how long.

variants.py     lists → the SAEs
placement.py    SAEs → processes
schedule.py     the learning rate over the run
halving.py      which stop early
"""
