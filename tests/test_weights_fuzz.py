# SPDX-License-Identifier: Apache-2.0
"""A slice of ``fuzz_checkpoints.py``."""

import fuzz_checkpoints
import pytest


@pytest.mark.heavy
def test_damaged_checkpoints_load_or_are_refused():
    tally, failures = fuzz_checkpoints.run(range(80))
    assert not failures, "\n".join(failures)
    assert sum(tally.values()) == 80
