"""What a language model says of the latents that an assessment shows, and whether that tells where they fire.

config.py      the settings of `saemill explain`
run.py         a finished assessment → explanations, with their scores, on its page
contexts.py    which contexts an explanation is written from, and which it is tested on
silent.py      places drawn at random where a latent is silent
neighbours.py  places where it is silent and one much like it fires
rounds.py      explanations; judgements by them, and by another latent's
asking.py      several questions at once
prompts.py     the two questions, and how answers are read
endpoint.py    the server that answers
answers.py     questions and answers on disk: nothing is asked twice
scores.py      balanced accuracy, with intervals
"""
