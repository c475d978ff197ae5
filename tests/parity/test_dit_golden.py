"""DiT (arXiv:2212.09748) against golden/dit, tensors written by the official code on tiny random networks. What is
compared, and how exactly: condit/verify/dit.py.
"""

from pathlib import Path

import pytest

from condit.verify.dit import CHECKS

GOLDEN = Path(__file__).parent / "golden" / "dit"


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.what)
def test_the_official_tensors_are_reproduced(check):
    assert check.run(GOLDEN).exceeding() == []
