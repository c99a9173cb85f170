"""A pipeline as SLURM jobs: written as scripts, submitted with dependencies, followed to the end.

settings.py   the section slurm of a config
pipeline.py   a config as stages and jobs
script.py     a stage's batch script
submit.py     scripts → jobs that wait for one another
states.py     the states of jobs
progress.py   how far each stage is
status.py     both, and the log of what failed
"""
