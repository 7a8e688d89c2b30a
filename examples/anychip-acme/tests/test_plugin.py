"""The plugin announces itself without torch, and passes the quick part of conformance."""

import subprocess
import sys

from anychip_acme import MANIFEST
from anychip_acme.probe import probe


def test_announcing_needs_no_torch():
    program = "import sys, anychip_acme; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"


def test_the_probe_answers():
    found = probe()
    assert found.devices or (found.reason and found.remedy)


def test_conforms():
    command = [sys.executable, "-m", "anychip.entrypoints.cli.main", "conformance", "--profile", "quick"]
    done = subprocess.run([*command, "--device", MANIFEST.name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
