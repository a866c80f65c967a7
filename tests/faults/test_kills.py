"""Commands killed, stopped or interrupted at any moment: what is left is whole, the next try ends as if undisturbed.

The moments are seeded, and relative to the time that the command takes undisturbed.
"""

import os
import re
import signal

from command_process import finish, start
from disturbed import arguments, result
from faults import faults

# Training is what takes days; the first three are those of the small part.
COMMANDS = ("train", "pack", "logits", "train", "export", "train", "verify", "train", "eval")
# Python drops a Ctrl-C that comes within the __del__ of a library, and says so; the command goes on to its end.
LOST = re.compile(r"Exception ignored in:.*?^KeyboardInterrupt: *$", re.DOTALL | re.MULTILINE)
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
ENDS = {signal.SIGKILL: {-9}, signal.SIGTERM: {-15, 75, 130}, signal.SIGINT: {75, 130}}


@faults("kills and signals", small=3, full=50)
def test_a_command(world, tmp_path, rng, number):
    name = COMMANDS[number % len(COMMANDS)]
    seconds, expected = world.undisturbed(name)
    out, log = tmp_path / "out", tmp_path / "log"

    def begin():
        goes_on = name == "train" and (out / "run.json").exists()
        return start(arguments(world, name, out, *(["--resume"] if goes_on else [])), log)

    for _ in range(rng.choice((1, 1, 2))):
        signum, process = rng.choice(SIGNALS), begin()
        process.join(rng.random() * seconds)
        if process.exitcode is None:
            os.kill(process.pid, signum)
        code = finish(process)
        assert code in ENDS[signum] | {0}, (signum, code, log.read_text())
        assert "Traceback" not in LOST.sub("", log.read_text()), log.read_text()
        if name in ("pack", "export", "eval") and out.exists():  # complete or absent
            assert result(name, out) == expected
            return
    code = finish(begin())
    assert code == 0, log.read_text()
    assert result(name, out) == expected
    assert not list(out.rglob("*.unfinished"))
