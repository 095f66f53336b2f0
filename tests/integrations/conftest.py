import warnings

# What the frameworks' own imports warn of is theirs to mend; here it would be an error. A missing one ends the run.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import avalanche.training  # noqa: F401
    import torchjd.aggregation  # noqa: F401
