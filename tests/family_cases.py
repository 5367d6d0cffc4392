# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the wider family with the outputs of independent implementations."""

from pathlib import Path

HERE = Path(__file__).parent / "golden" / "families"
SHARED = Path(__file__).parent.parent.parent / "shared"
CASES = sorted(
    {p.parent.name: p.parent for root in (SHARED / "golden" / "families", HERE)
     for p in root.glob("*/meta.json")}.values()
)  # fmt: skip
