"""The instruments: they stand on top of the milestones and run any of them by name.

    python -m dev.bench throughput --milestone m3_paged

Nothing in a milestone or in ``common`` imports from here.
"""
