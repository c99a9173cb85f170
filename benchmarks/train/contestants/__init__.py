"""One script per package: each trains through that package's own training loop, fed by `feed.Feed`.

    python -m benchmarks.train.contestants.NAME --help

in an environment that has the package.

saemill.py  sparsify.py  saelens.py  dictionary_learning.py   the packages
feed.py   the batches and the clock, the evaluation, the JSON that is written
"""
