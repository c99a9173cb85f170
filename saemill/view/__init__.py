"""`saemill view`: the page of an assessment with every latent at hand, and a model to try them on.

config.py   the settings
run.py      a run → a page at an address of this machine
page.py     the page, and what is asked of it: latents, and those that fire on a word
trial.py    the model: which latents fire on a text, how it goes on when one is added
server.py   who may ask what, over HTTP
"""
