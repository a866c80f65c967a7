"""Commands killed, stopped or interrupted at any moment: what is left is whole, and the next try ends as an undisturbed.

The moments are seeded, and relative to the time that the command takes undisturbed.
"""

import signal
import time

import pytest
from command_process import finish, start
from disturbed import COMMANDS, arguments, make_world, result
from faults import faults

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
ENDS = {signal.SIGKILL: {-9}, signal.SIGTERM: {-15, 75, 130}, signal.SIGINT: {75, 130}}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@faults("kills and signals", small=3, full=50)
def test_a_command(world, tmp_path, rng, number):
    name = COMMANDS[number // 2 % len(COMMANDS)] if number % 2 else "train"
    out, log = tmp_path / "out", tmp_path / "log"
    more = []
    for _ in range(rng.choice((1, 1, 2))):
        signum, moment = rng.choice(SIGNALS), rng.random() * world.seconds[name]
        process = start(arguments(world, name, out, *more), log)
        time.sleep(moment)
        if process.exitcode is None:
            process._popen and __import__("os").kill(process.pid, signum)
        code = finish(process)
        said = log.read_text()
        assert code in ENDS[signum] | {0}, (name, signum, moment, code, said)
        assert "Traceback" not in said, said
        if name in ("pack", "export", "eval") and out.exists():  # complete or absent
            assert result(name, out) == world.results[name]
            return
        more = ["--resume"] if name == "train" and (out / "run.json").exists() else []
    if name == "train" and code == 0:
        more = ["--resume"]
    code = finish(start(arguments(world, name, out, *more), log))
    assert code == 0, log.read_text()
    assert result(name, out) == world.results[name]
    left = [path for path in tmp_path.rglob("*") if path.name.endswith(".unfinished")]
    assert not left
