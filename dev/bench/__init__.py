"""How fast a milestone is, how much memory it takes, and how far that is from what is possible.

    python -m dev.bench throughput --milestone m3_paged --num-requests 256 --input-len 100:1024 \\
        --output-len 100:1024
    python -m dev.bench throughput --milestone m3_paged --against hf --batch-size 8
    python -m dev.bench latency --milestone m1_basic --batch-size 1,8 --json latency.json
    python -m dev.bench throughput --milestone m1 --milestone m2 --milestone m3     # side by side
    python -m dev.bench serve --milestone m4 --request-rate 4,8,16 --goodput ttft:200
    python -m dev.bench mixed --milestone m4 --model random:qwen3-0.6b
    python -m dev.bench startup --milestone m3_paged --model random:qwen3-0.6b
    python -m dev.bench kernels --suite prefill

``workloads`` says what is asked, ``runner``, ``load`` and ``hf`` do it, ``roofline`` knows what it
costs at least, ``report`` shows and documents the result.
"""
