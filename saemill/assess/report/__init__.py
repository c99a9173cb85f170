"""The page of an assessment, `report.html`: what to take, what its latents are, what is wrong with it.

page.py        the sections, in one file that fetches nothing
compared.py    1. what was compared, and how far to trust it
charts.py      2. FVU and ΔCE against L0
picture.py     the same as a picture of its own, for cards and wandb
variants.py    3. and 4. the table; each SAE: densities, where it errs
latents.py     5. latents: where they fire, what they promote, what they go with
contexts.py    tokens shaded by activation
bars.py        where the bars of small charts are
visible.py     text of a corpus, which may hold anything, as it can be shown

pareto.svg                                              template of the picture
report.html, variants.html, latents.html, marks.html   templates of the sections, and of what they share
script.js                                               sorting and searching; common/page.css is how it looks
"""
