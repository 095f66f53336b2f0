"""One forward and one backward for all past tasks: an answer to the paper's third open point (its Section 6)."""
