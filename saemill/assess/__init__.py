"""Stage 4: what the trained SAEs are worth, on tokens that training did not see.

config.py           the settings
run.py              a run → an assessment on disk
done.py             whether it is there already
inputs.py           the run's SAEs, their activations, the model
evalset.py          the tokens: held out, or other text
dealing.py          this process's share of them
outlook.py          what they go over, and what they need
measure.py          the passes over the tokens
baselines.py        a random dictionary and PCA
frozen.py           SAEs with a frozen decoder, as controls
reconstruction.py   FVU, cosine, L0, density
latent_figures.py   dead and dense latents, and how decoder rows lie
cosines.py          how similar, how opposite, how mixed decoder rows are
dense.py            what latents follow that fire nearly always
health.py           tables of these, and the L0 with the least c_dec
probes/             what latents tell of labels, and what hides a concept
spread.py           the variance of the activations, and rows far from all others
splicing.py         the losses of the model with an SAE spliced in
sums.py             sums per document → figures with intervals
by_source.py        figures on the documents of each source
entries.py          the entry of each variant
verdict.py          thresholds, order, the best
profile.py          where an SAE errs: positions, lengths, worst tokens
positions.py        groups of positions in a row
features.py         the latents that are shown, and what is told of each
firing.py           one pass: where they fire, how often, with which others
directions.py       what weights tell: neighbours, other seeds
vocabulary.py       and the tokens that latents promote and suppress
reader.py           addresses as text
table.py            the assessment in the terminal
report/             the assessment as a page
write.py            the files
explained.py        what `saemill explain` found, in words
latent.py           any latents of an SAE, in the terminal and on a page
"""
