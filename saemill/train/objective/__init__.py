"""What is minimised.

squared_error.py    the error of the reconstruction, over the variance or per dimension
at_output.py        what else depends on the reconstruction: its gradient there
model.py            the loss of the model that runs on with it
"""
