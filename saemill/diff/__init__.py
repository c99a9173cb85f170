"""`saemill diff`: what two models, or two sites, have in common and what one has alone, by a crosscoder.

config.py      the settings, and the crosscoder that they ask for
run.py         train → measure → contexts → write
measure.py     passes over held-out tokens: sums of each latent
latents.py     sums → norms, cosines, latent scaling, and the kind of each latent
report.py      the table; the page, whose template is report.html
charts.py      where the marks of its charts are
"""
