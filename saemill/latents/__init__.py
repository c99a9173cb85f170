"""What judges and viewers elsewhere read of an SAE's latents, from the cache and with no pass of the model.

config.py        the settings of `saemill export-latents`
run.py           a run's SAEs → a folder in one of the formats
inputs.py        the SAEs, their store, the latents that are asked for
rows.py          rows of tokens as the formats number them, and their activations
codes.py         codes on disk, a file for some latents each

delphi.py        latent caches for delphi's explainers and scorers
saedashboard.py  batches for SAEDashboard and Neuronpedia
  firing.py         where a latent fires: strongest places, samples of intervals
  together.py       latents and neurons that go with a latent
  vocabulary.py     tokens as these tools write them
saebench.py      results of SAEBench's core evaluation, and of SAELens', from an assessment
  figures.py        figures of theirs that an assessment does not have
"""
