"""The spine: typed events, who they belong to, verdicts, limits, errors and ports.

No I/O, and nothing but the standard library and msgspec, so that every other package
(and the fuzzers, and the replayer) can import it.
"""
