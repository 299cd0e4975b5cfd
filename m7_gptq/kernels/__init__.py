"""The kernels of this milestone, the plans they work by, and their plain twins.

* ``flash_prefill``, with ``prefill_plan``, ``prefill_tiles`` and ``prefill_parts``: attention of
  packed prompts. The twin is ``prefill_reference``.
* ``flash_decode``, with ``decode_plan`` and ``decode_parts``: attention of one token of each
  sequence. The twin is ``reference``.
* ``decode_inputs``: the integers of a decode step, spread out on the GPU; the twin stands beside.
* ``triton_kernels`` with ``launch``: m3's, which still write the cache.

Importing this package imports none of them: the twins need no Triton.
"""
