"""SAEs in training.

initial.py    where one starts
bank.py       those of one site and width, stepped together
"""
