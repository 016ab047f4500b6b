"""No line that a user did not cause: importing the packages and asking for help write nothing to stderr."""

import subprocess
import sys

import pytest


# Those two print lines of their own wherever transformers or PEFT are imported, and are not installed for the demo.
PROGRAM = """
import sys
sys.modules.update(torchao=None, bitsandbytes=None)
import hf_based_kernel
from hf_hierarchical_sae.cli import main as hierarchical_sae
from peft_bias_steer.cli import main as bias_steer
for command in (hierarchical_sae, bias_steer):
    try:
        command(["--help"])
    except SystemExit as stopped:
        assert not stopped.code
"""


@pytest.mark.slow
def test_imports_and_help_write_nothing_to_stderr():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: hierarchical-sae" in done.stdout and "usage: bias-steer" in done.stdout
