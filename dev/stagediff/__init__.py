"""The difference of two milestones as a reading.

    python -m dev.stagediff m3 m4                      # what m4 adds to m3, in reading order
    python -m dev.stagediff m5 m6 scheduler.py         # one file of it
    python -m dev.stagediff m3 m4 --html m4.html       # a page to read beside the note
    python -m dev.stagediff --stat                     # how large every step is

``diff -r`` shows the same lines by the names of their files. Here they come in the order in which
the newer milestone's README.md wants them read, function by function, each with the README's reason
and the section of the note that explains it.
"""
