"""Hosts on this machine: each with name, network, processes, home and /tmp/ray of its own, reached by SSH alone.

For use inside namespaces that `test_cluster.py` makes (root, and Linux): there this process is the client, 10.77.0.1.
What `ray stop` finds on a host is that host's; nothing of it is seen, or harmed, outside.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

CLIENT = "10.77.0.1"
NAMESPACES = ["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "--mount-proc", "--kill-child"]
NEEDED = ("hostname", "unshare", "nsenter", "ip", "mount", "ssh", "sshd", "ssh-keygen", "rsync")
"""Programs of util-linux, iproute2, openssh-client, openssh-server and rsync."""


def missing() -> list[str]:
    """What this machine lacks."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    return [name for name in NEEDED if shutil.which(name, path=path) is None]


def isolated() -> bool:
    """Whether this process is the first one of a process namespace, and has no network but its own."""
    return os.getpid() == 1 and set(psutil.net_if_addrs()) <= {"lo", "br0", *(f"host{i}" for i in range(9))}


def run(*command: str) -> None:
    """Run a command that must succeed."""
    subprocess.run(command, check=True, timeout=120)


def passwd_of(home: Path, folder: Path) -> Path:
    """A user database in which root's home is `home`: what SSH takes ~ for, whatever HOME says."""
    others = [line for line in Path("/etc/passwd").read_text().splitlines() if not line.startswith("root:")]
    path = folder / "passwd"
    path.write_text("\n".join([f"root:x:0:0:root:{home}:/bin/bash", *others]) + "\n")
    return path


@dataclass
class Host:
    """A machine that one can only reach by SSH."""

    address: str
    home: Path
    process: subprocess.Popen[bytes]
    """`unshare`; its child is the SSH server, the first process of the host."""

    def processes(self) -> list[str]:
        """Command lines of what runs there beside the SSH server and its sessions."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                words = process.cmdline()
            except psutil.NoSuchProcess:
                continue
            if (
                words
                and process.status() != psutil.STATUS_ZOMBIE
                and not words[0].startswith(("sshd", "/usr/sbin/sshd"))
            ):
                found.append(" ".join(words))
        return found


@contextmanager
def network() -> Iterator[None]:
    """A switch, with this process at `CLIENT`."""
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "add", "br0", "type", "bridge")
    run("ip", "addr", "add", f"{CLIENT}/24", "dev", "br0")
    run("ip", "link", "set", "br0", "up")
    yield
    run("ip", "link", "del", "br0")


@contextmanager
def host(number: int, scratch: Path, public_key: str, python: Path) -> Iterator[Host]:
    """A host at 10.77.0.(10 + number), with the key, and `python`'s environment at ~/sid-ray-env."""
    folder = scratch / f"host{number}"
    home, private = folder / "home", folder / "tmp-ray"
    for path in (home, private):
        path.mkdir(parents=True)
    (home / ".bashrc").write_text("")
    (home / "sid-ray-env").symlink_to(python.parent.parent)
    (folder / "authorized_keys").write_text(public_key)
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "host_key"))
    address = f"10.77.0.{10 + number}"
    (folder / "sshd_config").write_text(
        f"Port 22\nListenAddress {address}\nHostKey {folder}/host_key\nPidFile none\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nPermitRootLogin prohibit-password\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\nStrictModes no\nUsePAM no\n"
        "MaxSessions 100\nMaxStartups 100\n"
    )
    passwd, names = passwd_of(home, folder), folder / "hosts"
    names.write_text("127.0.0.1 localhost\n" + "".join(f"10.77.0.{10 + i} host{i}\n" for i in range(9)))
    start = (
        f"until ip addr show 2>/dev/null | grep -q {address}; do sleep 0.1; done; mkdir -p /tmp/ray /run/sshd; "
        f"mount --bind {private} /tmp/ray; mount --bind {passwd} /etc/passwd; mount -t tmpfs tmpfs /dev/shm; "
        f"mount --bind {names} /etc/hosts; hostname host{number}; "
        f"exec /usr/sbin/sshd -D -e -f {folder}/sshd_config 2>{folder}/sshd.log"
    )
    before = os.readlink("/proc/self/ns/net")
    process = subprocess.Popen([*NAMESPACES, "sh", "-c", start])
    while os.readlink(f"/proc/{process.pid}/ns/net") == before:
        time.sleep(0.05)
    run("ip", "link", "add", f"host{number}", "type", "veth", "peer", "name", "eth0", "netns", str(process.pid))
    run("ip", "link", "set", f"host{number}", "master", "br0", "up")
    inside = ["nsenter", "-t", str(process.pid), "-n", "ip"]
    run(*inside, "link", "set", "lo", "up")
    run(*inside, "addr", "add", f"{address}/24", "dev", "eth0")
    run(*inside, "link", "set", "eth0", "up")
    run(*inside, "route", "add", "default", "via", CLIENT)
    try:
        yield Host(address, home, process)
    finally:
        process.kill()  # and with it, by --kill-child, the first process of the host, and with that all others
        process.wait()


def environment_of_hosts(scratch: Path, record: str) -> Path:
    """A Python environment with this one's packages and `ray`, as deploy/install.sh leaves it; returns its Python."""
    import venv

    folder = scratch / "env"
    venv.create(folder, with_pip=False, symlinks=True)
    site = next((folder / "lib").glob("python*")) / "site-packages"
    packages = next((Path(sys.prefix) / "lib").glob("python*")) / "site-packages"
    (site / "others.pth").write_text(f"import site; site.addsitedir({str(packages)!r})\n")
    ray = folder / "bin" / "ray"
    ray.write_text(f"#!{folder}/bin/python\nimport sys\nfrom ray.scripts.scripts import main\nsys.exit(main())\n")
    ray.chmod(0o755)
    (folder / ".sid-ray-installed").write_text(record)
    return folder / "bin" / "python"
