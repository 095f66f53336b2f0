"""What an integration says where its framework is not installed."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
sys.modules["{framework}"] = None  # as where it is not installed
import gem_fast.integrations.{extra}
"""


@pytest.mark.parametrize(
    ("extra", "framework"), [("avalanche", "avalanche"), ("torchjd", "torchjd"), ("transformers", "transformers")]
)
def test_one_sentence_names_the_extra(extra: str, framework: str):
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(extra=extra, framework=framework)], capture_output=True, text=True
    )
    assert run.stderr.splitlines()[-1] == (
        f"ModuleNotFoundError: gem_fast.integrations.{extra} needs {framework}, which is not installed: "
        f"pip install 'gem_fast[{extra}]'"
    )
