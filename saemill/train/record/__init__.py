"""What a run writes while it trains.

folder.py       the run's folder, locked before anything in it changes
metrics.py      metrics.jsonl, console, TensorBoard
checkpoint.py   kill and resume
inspect.py      whether a run is whole
"""
