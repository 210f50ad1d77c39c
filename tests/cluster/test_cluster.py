"""`make test-cluster`: tests/cluster/scenario.py in network, process and mount namespaces of its own.

Nothing that runs there sees, or can end, a process of this machine; when its first process ends, all of it does.
"""

import os
import subprocess
import sys

import pytest

from tests.cluster.hosts import NAMESPACES, missing
from tests.launching import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600)]


def test_the_cluster_path():
    lacking = missing()
    assert not lacking, f"needs {', '.join(lacking)} (Debian: openssh-server openssh-client rsync iproute2 util-linux)"
    assert os.geteuid() == 0, "needs root, to make network and process namespaces"
    command = [sys.executable, "-m", "pytest", "tests/cluster/scenario.py", "-x", "-s", "--show-capture=no"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*NAMESPACES, *command, "--timeout", "1500"], cwd=ROOT, env=environment, timeout=3500)
    assert done.returncode == 0
