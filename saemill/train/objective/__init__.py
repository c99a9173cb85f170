"""What is minimised.

squared_error.py    the error of the reconstruction, over the variance or per dimension
"""
