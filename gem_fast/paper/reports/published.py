"""The paper's numbers, on all of MNIST and CIFAR-100, which the tables show beside ours."""

Numbers = dict[str, float]

MEASURES = ("acc", "bwt", "fwt")

# Table 1: (stream, learner) -> seconds of training on a CPU.
PAPER_TABLE1: dict[tuple[str, str], Numbers] = {
    (stream, learner): {"seconds": seconds}
    for stream, row in {
        "permutations": {"single": 11, "independent": 11, "multimodal": 14, "ewc": 179, "gem": 77},
        "rotations": {"single": 11, "independent": 16, "multimodal": 13, "ewc": 169, "gem": 135},
    }.items()
    for learner, seconds in row.items()
}

# Table 2: (learner, examples in the memory of all 20 tasks together) -> ACC on CIFAR-100.
MEMORIES = (200, 1280, 2560, 5120)
PAPER_TABLE2: dict[tuple[str, int], Numbers] = {
    (learner, memory): {"acc": acc}
    for learner, row in {"gem": (0.487, 0.579, 0.633, 0.654), "icarl": (0.436, 0.494, 0.500, 0.508)}.items()
    for memory, acc in zip(MEMORIES, row, strict=True)
}

# Table 3: (learner, epochs) -> ACC and BWT on rotations; joint is its row "single, shuffled data".
PAPER_TABLE3: dict[tuple[str, int], Numbers] = {
    (learner, epochs): {"acc": acc, "bwt": bwt}
    for learner, row in {
        "joint": [(0.83, 0.00), (0.87, 0.00), (0.89, 0.00)],
        "single": [(0.53, -0.08), (0.49, -0.25), (0.43, -0.40)],
        "independent": [(0.56, 0.00), (0.64, 0.00), (0.67, 0.00)],
        "multimodal": [(0.76, -0.02), (0.72, -0.11), (0.59, -0.28)],
        "ewc": [(0.55, -0.19), (0.59, -0.17), (0.61, -0.11)],
        "gem": [(0.86, 0.05), (0.88, 0.02), (0.89, -0.02)],
    }.items()
    for epochs, (acc, bwt) in zip((1, 2, 5), row, strict=True)
}

# Figure 1 prints no numbers: these are of the matrices of Appendix B, whose BWT and FWT are divided by T.
PAPER_FIGURE1: dict[tuple[str, str], Numbers] = {
    (stream, learner): dict(zip(MEASURES, numbers, strict=True))
    for (stream, learner), numbers in {
        ("permutations", "single"): (0.602, -0.198, 0.009),
        ("permutations", "multimodal"): (0.756, -0.028, 0.006),
        ("permutations", "ewc"): (0.619, -0.165, 0.005),
        ("permutations", "gem"): (0.826, 0.025, 0.009),
        ("rotations", "single"): (0.531, -0.090, 0.425),
        ("rotations", "multimodal"): (0.759, -0.024, 0.018),
        ("rotations", "ewc"): (0.546, -0.205, 0.552),
        ("rotations", "gem"): (0.861, 0.005, 0.665),
        ("cifar100", "single"): (0.463, -0.123, -0.001),
        ("cifar100", "ewc"): (0.498, -0.080, -0.008),
        ("cifar100", "icarl"): (0.546, -0.083, 0.000),
        ("cifar100", "gem"): (0.678, 0.004, -0.008),
    }.items()
}
