"""One script per package: each trains through that package's own training loop, fed by `feed.Feed`.

python -m benchmarks.contestants.NAME --help, in an environment that has the package.
"""
