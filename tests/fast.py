# SPDX-License-Identifier: Apache-2.0
"""How XLA compiles for tests, in this process and in those that they start."""

from importlib.metadata import version

# Compiling takes most of the time of these tiny models. Level 0 halves it, and without
# the newer code generator it takes a third of the rest.
FAST_COMPILE = "--xla_backend_optimization_level=0"
# XLA ends at a flag that it does not know, as another version may not know these.
if version("jaxlib").startswith("0.10."):
    FAST_COMPILE += (
        " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        # Eight devices of a busy machine meet late; XLA aborts after 40 s of waiting.
        " --xla_cpu_collective_call_terminate_timeout_seconds=600"
        " --xla_cpu_collective_call_warn_stuck_timeout_seconds=300"
    )
