"""`saemill plan`, and `--dry-run` of the stages: what they will do, need and take, with nothing written.

run.py      the plan told as it grows; its sum
planner.py  stage by stage: checked where its input is there, looked ahead to where it is not
ahead.py    the outlook of stages whose input is not there
device.py   a GPU of this machine, or of another
sample.py   some rows to measure on
probe.py    a little of each stage, really run in a temporary folder → seconds and bytes of the whole
child.py    one stage in a process of its own, timed on more and more
"""
