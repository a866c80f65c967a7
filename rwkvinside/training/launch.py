"""Training on several machines.

Reads a hostfile, checks that every host answers, and hands over to DeepSpeed's own launcher.
"""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

from ..errors import UserError
from ..support.files import read_text

PATIENCE = 10  # seconds to wait for a host
NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")  # of a host; ssh takes what begins with - for an option


def read_hostfile(path: str | Path) -> dict[str, int]:
    """Return hosts and their number of processes.

    Lines are such as `worker-1 slots=8`; # begins a comment.

    Raises:
        UserError: it cannot be read, names no host, names one twice, has a line of another form, or has something else
            than the name or the address of a host.
    """
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"hostfile {path} cannot be read: {error}", "check the path") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([1-9][0-9]{0,5})", text)
        if match is None:
            raise UserError(
                f"hostfile {path}, line {number}: {text!r}", "write `host slots=N`, N processes on that host"
            )
        if not is_host(match[1]):
            raise UserError(
                f"hostfile {path}, line {number}: {match[1]!r} is not the name or the address of a host",
                "letters, digits, points, - and _ make a name; users and ports belong in ~/.ssh/config",
            )
        if match[1] in hosts:
            raise UserError(f"hostfile {path}, line {number}: {match[1]} is listed twice", "name each host once")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise UserError(f"hostfile {path} names no host", "write `host slots=N`, one host a line")
    return hosts


def is_host(text: str) -> bool:
    """Return whether a text is the name of a host, or an IPv4 or IPv6 address, and so never an option of ssh."""
    try:
        ipaddress.ip_address(text.partition("%")[0] if NAME.fullmatch(text.partition("%")[2] or "0") else "")
    except ValueError:
        return NAME.fullmatch(text) is not None
    return True


def check_hosts(hosts: Mapping[str, int]) -> None:
    """Check that each of several hosts lets us in by ssh without a password.

    The launcher needs that. All hosts are asked at once.

    Raises:
        UserError: names the hosts that do not, and what ssh says of the first.
    """
    if len(hosts) == 1:  # the launcher starts processes on this machine
        return
    if shutil.which("ssh") is None:
        raise UserError("a hostfile of several hosts needs ssh, which is not installed", "install an ssh client")
    with ThreadPoolExecutor(len(hosts)) as pool:
        answers = zip(hosts, pool.map(_problem, hosts), strict=True)
        problems = {host: problem for host, problem in answers if problem is not None}
    if problems:
        first, reason = next(iter(problems.items()))
        raise UserError(
            f"{len(problems)} of {len(hosts)} hosts cannot be reached: {', '.join(problems)} ({first}: {reason})",
            f"`ssh {first} true` must work without a password; correct the hostfile or the host",
        )


def launch(hostfile: str | Path, argv: Sequence[str]) -> NoReturn:
    """Become DeepSpeed's launcher, which starts `argv` on all hosts.

    `argv` is a script and its arguments.
    """
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), *argv]
    sys.stdout.flush()
    os.execv(sys.executable, command)


def _problem(host: str) -> str | None:
    command = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={PATIENCE}", "--", host, "true"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=2 * PATIENCE)
    except subprocess.TimeoutExpired:
        return f"no answer in {2 * PATIENCE} seconds"
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"ssh ended with {done.returncode}"])[-1]
