"""Runs as a user runs them: whole, or over several processes.

pipeline.py    every stage on real input: time and peak memory
processes.py   what a second process brings, for each way of spreading
"""
