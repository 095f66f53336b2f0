"""What reproduces the paper's experiments: data, streams, models, learners, protocol, plots and the command line.

Everything here is a user of the library; the library itself never imports it. Pillow, mlxtend, matplotlib and tqdm
(the extra `demo`) are imported where they are needed.
"""
