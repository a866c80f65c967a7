"""Which of many cases a run of the tests has."""

import itertools
import os

import torch


def pairwise(*values):
    """Return cases of several parameters: every two values together, on a GPU all products."""
    cases = list(itertools.product(*values))
    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return cases

    def pairs(case):
        return set(itertools.combinations([(place, repr(value)) for place, value in enumerate(case)], 2))

    chosen, missing = [], set().union(*map(pairs, cases))
    while missing:
        chosen.append(max(cases, key=lambda case: len(pairs(case) & missing)))
        missing -= pairs(chosen[-1])
    return chosen
