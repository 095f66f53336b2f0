"""What reproduces the paper's experiments: data, streams, models, learners, protocol, plots and the command line.

The library never imports any of it. What the extra `demo` installs is imported where it is needed.
"""
