"""`saemill plan`, and `--dry-run` of the stages: what they will do, need and take, with nothing written.

run.py      stage by stage: checked, told, measured; the sum
ahead.py    the outlook of stages whose input is not there yet
probe.py    a little of each stage, really run in a temporary folder → seconds and bytes of the whole
child.py    one stage in a process of its own, three times, timed
"""
