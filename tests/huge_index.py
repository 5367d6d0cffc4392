# SPDX-License-Identifier: Apache-2.0
"""Sets of 300 million and of 3 billion records in 30,000 shards, which are not there.

    python tests/huge_index.py          prints the table of docs/data.md, in minutes

The index, the sidecars and the shards come from the bucket of bucket.py, 5 ms away, and
are read by one host of 16 as in training.
"""

import resource
import time

from bucket import BATCH, HOSTS, ROOT, STEP_MS, Bucket, apart, bucket, draws

SHARDS, SIZE, FAR = 30_000, 29_000, 1_000_000
LINK = {"latency": 0.005, "speed": 200e6}
NEED = BATCH / HOSTS / STEP_MS["B/16"] * 1e3  # images/s and host


def gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def first_batch(connection, url: str, access: str, step: int) -> None:
    """Seconds until a new process that goes on at a step has its first records."""
    from vit_jax.config import DataConfig

    cfg = DataConfig(source="records", path=ROOT, access=access)
    draw = draws(cfg)
    started = time.monotonic()
    draw(step)
    connection.send(time.monotonic() - started)


def measure(connection, url: str, access: str) -> None:
    from vit_jax import data
    from vit_jax.config import DataConfig
    from vit_jax.data import graph  # noqa: F401, so that tensorflow is counted before

    before, server = gib(), Bucket(url)
    cfg = DataConfig(source="records", path=ROOT, access=access)
    started = time.monotonic()
    size = data.describe(cfg).num_train
    described = time.monotonic() - started
    found = {
        "records": size,
        "start_s": described,
        "start_requests": server.set(**LINK),
    }
    draw = draws(cfg)
    started = time.monotonic()
    draw(FAR)
    found["resume_s"] = time.monotonic() - started
    server.set(**LINK)
    steps = 64 if access == "sequential" else 8
    for step in range(FAR + 1, FAR + 1 + steps):
        draw(step)
    seen = server.set(**LINK)
    images = steps * BATCH // HOSTS
    found |= {k: v / images for k, v in seen.items()}
    connection.send(found | {"gib": gib(), "gib_of_imports": before})


def main() -> None:
    print(
        "| records | access | start-up | first batch | resume at step 1,000,000 | "
        "peak memory (of it imports) | requests/s per host | requests/s of the bucket | MB/s per host |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for records in (300_000_000, 3_000_000_000):
        with bucket(records, SHARDS, SIZE, **LINK) as server:
            for access in ("sequential", "random"):
                m = apart(measure, server.url, access)
                first = apart(first_batch, server.url, access, 0)
                requests = NEED * m["requests"]
                print(
                    f"| {m['records']:,} | {access} | {m['start_s']:.1f} s | {first:.1f} s | "
                    f"{m['resume_s']:.1f} s | {m['gib']:.2f} ({m['gib_of_imports']:.2f}) GiB | "
                    f"{requests:,.0f} | {HOSTS * requests:,.0f} | {NEED * m['bytes'] / 1e6:,.0f} |",
                    flush=True,
                )  # fmt: skip


if __name__ == "__main__":
    main()
