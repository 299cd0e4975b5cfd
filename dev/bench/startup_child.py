"""A fresh process that serves one prompt and says when it was where; ``dev.bench.startup`` runs it.

    python -m dev.bench.startup_child '{"milestone": "m3_paged", "options": {}, "seed": 0,
        "input_len": 512, "output_len": 16, "imports_only": false}'

The last line of its output is a JSON object. Its times are ``time.perf_counter()``, on Linux and
macOS the system's monotonic clock: the parent can put its own beside them.
"""

from __future__ import annotations

import time

_STARTED = time.perf_counter()

import importlib  # noqa: E402 (the clock comes first)
import json  # noqa: E402
import sys  # noqa: E402
from importlib.util import find_spec  # noqa: E402
from typing import Any  # noqa: E402


def serve(job: dict[str, Any]) -> dict[str, Any]:
    """Load the engine of ``job`` and have one random prompt continued, greedily.

    Returns:
        ``times``: started, imported, constructed, first_token, last_token, in seconds, of which
        ``imports_only`` leaves the first two; ``options``, ``stats`` and ``device`` of the engine.
    """
    importlib.import_module(job["milestone"])
    from dev.bench.runner import EngineSubject
    from dev.bench.workloads import Lengths, random_requests

    times = {"started": _STARTED, "imported": time.perf_counter()}
    if job["imports_only"]:
        if find_spec("triton") is not None:
            importlib.import_module("triton")  # which engines leave until they need it
        return {"times": times}
    subject = EngineSubject(job["milestone"], job["options"])
    times["constructed"] = time.perf_counter()
    requests = random_requests(
        1,
        *(Lengths(job[name], job[name]) for name in ("input_len", "output_len")),
        vocab_size=subject.model_config.vocab_size,
        seed=job["seed"],
    )
    (metrics,) = subject.run(requests, temperature=0.0).metrics
    times |= {"first_token": metrics.token_times[0], "last_token": metrics.token_times[-1]}
    return {
        "times": times,
        "options": subject.describe(),
        "stats": subject.engine.stats(),
        "device": str(subject.device),
    }


if __name__ == "__main__":
    print(json.dumps(serve(json.loads(sys.argv[1]))))
