"""Shows what an engine did at each step, from the file that ``--trace`` wrote.

    python -m m6_prefix.run --trace m6.jsonl
    python -m dev.trace view m6.jsonl                        # a page to watch it, in the browser
    python -m dev.trace view m3.jsonl m6.jsonl               # two of them side by side
    python -m dev.trace summary m6.jsonl                     # a table in the terminal
    python -m dev.trace export m6.jsonl --perfetto m6.json   # for ui.perfetto.dev
    python -m dev.trace screenshot m6.jsonl --frame 20 --output m6.png
    python -m dev.trace cost --milestone m6_prefix           # what tracing costs

``reader`` reads the file, ``story`` tells what became of each request, ``page`` holds the parts of
the page.
"""
