"""Runs: the protocol, checkpoints, the run cache, several processes, and tables of many runs."""
