"""Faults by kind: each case has numbers of its own from the seed; a table at the end says how many were survived."""

import random
from collections import Counter

import pytest
from disturbed import World
from faults import SEED


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Undisturbed commands, to compare with."""
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def rng(request):
    """Random numbers of this case, the same whichever others run."""
    return random.Random(f"{SEED} {request.node.originalname} {request.node.callspec.params['number']}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call" and (marker := item.get_closest_marker("faults")):
        report.user_properties.append(("fault", marker.args[0]))
    return report


def pytest_terminal_summary(terminalreporter):
    """Print kind, tried, survived, failed; a test that tries several says so with `record_property("tried", n)`."""
    tried, failed = Counter(), Counter()
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        properties = dict(report.user_properties)
        if report.when == "call" and "fault" in properties:
            tried[properties["fault"]] += properties.get("tried", 1)
            failed[properties["fault"]] += report.failed
    if tried:
        rows = [(kind, tried[kind], tried[kind] - failed[kind], failed[kind]) for kind in sorted(tried)]
        rows.append(("all", tried.total(), tried.total() - failed.total(), failed.total()))
        terminalreporter.section(f"faults of SEED={SEED}")
        for row in [("kind", "tried", "survived", "failed"), *rows]:
            terminalreporter.write_line("{:<32}{:>8}{:>10}{:>8}".format(*row))
