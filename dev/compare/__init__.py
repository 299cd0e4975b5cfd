"""Milestones side by side: the same work in one run, each milestone in a fresh process.

    python -m dev.compare                                  # all but m0, in about a minute on a CPU
    python -m dev.compare --milestone m3 --milestone m4 --html compare.html
    python -m dev.compare --preset h200 --json docs/results/h200-compare.json
    python -m dev.compare report --from docs/results/h200-compare.json \\
        --markdown docs/technical_comparison.md --chart docs/images/ladder.svg

``parts`` says what is measured, ``counting`` measures without a clock, ``run`` has it done within a
budget of time, ``metrics`` and ``changes`` say what differs from the milestone before, ``claims``
whether each milestone keeps its own promise. ``terminal`` and ``page`` show all that; ``document``
and ``ladder`` put it beside the figures of others (``peers.json``).
"""
