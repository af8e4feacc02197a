"""Emulates several hosts on one Linux machine, with a wire of limited rate to each, and runs MPI programs across them.

    with hosts.emulate(2, "1gbit") as two:
        two.mpirun(4, [sys.executable, "script.py"])    # ranks 0 and 1 on host0, 2 and 3 on host1

    python bench/hosts.py --hosts 2 --ranks 4 --rate 1gbit -- python script.py

Each host has namespaces of its own for network, host name, System V memory, processes and mounts, with a /dev/shm of
its own: MPI finds no memory to share with another host, and only eth0 leads there, over a bridge that has a network
namespace of its own. The machine's network is not touched. Needs root (that of a user namespace will do), util-linux,
iproute2, and the mpirun of MPICH or Open MPI; `why_not` tells what is missing.

The namespaces live as long as the processes that hold them, which end when this process ends, however it ends: the
kernel then ends what still runs on the hosts, and takes the network down. Nothing has a name outside of the namespaces,
so that runs do not meet.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# These addresses exist in the namespaces only.
SUBNET = "10.77.0"
SWITCH = f"{SUBNET}.254"  # where mpirun runs
MAX_HOSTS = 253

# What a card sends at once after a pause, in seconds of its rate. Timers are late: with half of it, 1 Gbit/s lost 6 %;
# with twice as much, 64 KiB went at up to 1.3 Gbit/s.
BURST_SECONDS = 262e-6
# Of a packet that the kernel cuts into frames later, in bytes; 64 KiB unless told. tbf cuts what exceeds its burst into
# frames itself, and each waits for a timer: 1 MiB took 12 ms instead of 8.7.
PACKET = 16_000


class Unavailable(RuntimeError):
    """Hosts cannot be emulated here; the text says why."""


class Hosts:
    """Hosts 0 to count-1. Made by `emulate`."""

    def __init__(self, switch: int, holders: Sequence[int]) -> None:
        self.count = len(holders)
        self._switch = switch
        self._holders = holders

    def mpirun(self, ranks: int, command: Sequence[str], **how: Any) -> subprocess.CompletedProcess[Any]:
        """Run `command` on `ranks` ranks, equally many on each host, the first ones on host0.

        how: what subprocess.run takes.
        """
        if ranks < 1 or ranks % self.count:
            raise ValueError(f"ranks={ranks}: must be a multiple of the number of hosts, {self.count}")
        each = ranks // self.count
        places = ",".join(f"{address(host)}:{each}" for host in range(self.count))
        mpirun, agent = find("mpirun"), launcher(self._switch)
        if "Open MPI" in run(f"{mpirun} --version"):
            # Hosts that start others would look for the launcher.
            flags = f"--prtemca plm_ssh_agent {agent} --prtemca plm_ssh_no_tree_spawn 1"
            flags += f" --host {places} --map-by ppr:{each}:node:oversubscribe"
            allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
            how["env"] = {**(how.get("env") or os.environ), **allowed}
        else:
            flags = f"-launcher ssh -launcher-exec {agent} -localhost {SWITCH} -hosts {places}"
        enter = ["nsenter", f"--target={self._switch}", "--net", "--uts"]
        return subprocess.run([*enter, mpirun, *flags.split(), "-n", str(ranks), *command], **how)

    def sent(self, host: int) -> int:
        """Bytes that have left the card of `host`, headers included."""
        lines = Path(f"/proc/{self._holders[host]}/net/dev").read_text().splitlines()
        [counters] = [line.split() for line in lines if line.strip().startswith("eth0:")]
        return int(counters[9])


@contextlib.contextmanager
def emulate(count: int, rate: str | None = None) -> Iterator[Hosts]:
    """`count` hosts, each on a full-duplex wire of `rate`: "100mbit", "1gbit"; None: as fast as this machine copies.

    Raises Unavailable where that is not possible.
    """
    if not 1 <= count <= MAX_HOSTS:
        raise ValueError(f"count={count}: must be in [1, {MAX_HOSTS}]")
    limit = "" if rate is None else f"root tbf rate {rate} burst {burst(rate)} latency 50ms"
    if os.geteuid() != 0:
        raise Unavailable("needs root; `unshare --map-root-user` may do")
    for tool in ("unshare", "nsenter", "ip", "tc", "mpirun"):
        find(tool)
    with contextlib.ExitStack() as stack:
        switch = stack.enter_context(hold("switch", "--net --uts --mount"))
        in_switch = f"nsenter --target={switch} --net"
        run(f"{in_switch} ip link add name switch type bridge")
        run(f"{in_switch} ip address add {SWITCH}/24 dev switch")
        run(f"{in_switch} ip link set switch up")
        holders = []
        for host in range(count):
            own = "--net --uts --ipc --mount --pid --fork --kill-child --mount-proc"
            holders.append(pid := stack.enter_context(hold(f"host{host}", own)))
            in_host = f"nsenter --target={pid} --net"
            run(f"{in_switch} ip link add name host{host} type veth peer name eth0 netns {pid}")
            run(f"{in_switch} ip link set host{host} master switch up")
            run(f"{in_host} ip address add {address(host)}/24 dev eth0")
            run(f"{in_host} ip link set eth0 up")
            if limit:
                run(f"{in_host} ip link set eth0 gso_max_size {PACKET}")
                # Both ways: hosts that send to the same one share its wire.
                run(f"{in_host} tc qdisc add dev eth0 {limit}")
                run(f"{in_switch} tc qdisc add dev host{host} {limit}")
        write_launcher(switch, holders)
        yield Hosts(switch, holders)


@contextlib.contextmanager
def hold(hostname: str, own: str) -> Iterator[int]:
    """The id of a process with namespaces of its own, as unshare calls them."""
    # It ends with its standard input, whose other end is here.
    setup = f"hostname {hostname} && mount -t tmpfs tmpfs /dev/shm && ip link set lo up && echo ready && exec cat"
    process = subprocess.Popen(
        ["unshare", *own.split(), "sh", "-c", setup],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # Ctrl-C is for mpirun, which still needs these
    )
    assert process.stdin and process.stdout
    with process:
        said = process.stdout.readline()
        if said != "ready\n":
            raise Unavailable(f"no namespaces: {said}{process.stdout.read()}".strip())
        yield process.pid


def write_launcher(switch: int, holders: Sequence[int]) -> None:
    """What mpirun calls in the place of ssh, as `LAUNCHER [-x] ADDRESS COMMAND`."""
    cases = "\n".join(f"{address(host)}) pid={pid} ;;" for host, pid in enumerate(holders))
    file = Path(launcher(switch))
    # unshare has its children in the new process namespace, but stays outside itself. /tmp and the user's cache are the
    # machine's: Open MPI names files by process ids, alike on all hosts, and fastdp keeps there what messages cost.
    file.write_text(f"""#!/bin/sh
[ "$1" = -x ] && shift
case "$1" in
{cases}
*) echo "$1 is not one of the hosts" >&2; exit 1 ;;
esac
shift
export TMPDIR=/dev/shm XDG_CACHE_HOME=/dev/shm
exec nsenter --target=$pid --net --uts --ipc --mount --pid=/proc/$pid/ns/pid_for_children sh -c "$*"
""")
    file.chmod(0o700)


def launcher(switch: int) -> str:
    return f"/proc/{switch}/root/dev/shm/launcher"  # in the switch's /dev/shm: gone when that is


def address(host: int) -> str:
    return f"{SUBNET}.{host + 1}"


def burst(rate: str) -> int:
    """Bytes; two packets at least."""
    match = re.fullmatch(r"([0-9.]+)([kmg])bit", rate)
    if match is None:
        raise ValueError(f"rate={rate!r}: must be a number of kbit, mbit or gbit, such as '1gbit'")
    bits = float(match[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[match[2]]
    return max(2 * PACKET, round(bits / 8 * BURST_SECONDS))


def find(tool: str) -> str:
    """What is beside python comes first: the mpirun of this environment."""
    beside_python = Path(sys.executable).with_name(tool)
    path = str(beside_python) if beside_python.exists() else shutil.which(tool)
    if path is None:
        raise Unavailable(f"no {tool} on PATH")
    return path


def run(command: str) -> str:
    done = subprocess.run(shlex.split(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise Unavailable(f"{command}: {done.stdout.strip()}")
    return done.stdout


@functools.cache
def why_not(rate: str | None = "1gbit") -> str:
    """Why hosts cannot be emulated here; empty where they can. Found by trying."""
    try:
        with emulate(1, rate):
            return ""
    except Unavailable as error:
        return str(error)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run an MPI program across emulated hosts.")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--ranks", type=int, help="on all hosts together; one per host unless told")
    parser.add_argument("--rate", help="of the wire to each host, such as 1gbit; as fast as possible unless told")
    parser.add_argument("command", nargs="+", help="after --")
    options = parser.parse_args()
    try:
        with emulate(options.hosts, options.rate) as hosts:
            return hosts.mpirun(options.ranks or options.hosts, options.command).returncode
    except (Unavailable, ValueError) as error:
        print(f"hosts.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
