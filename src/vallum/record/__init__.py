"""What happened, kept so that it can be proved: one append-only, hash-chained log per run, and views of it.

The log is the truth; the index, the story and the report are views that can be thrown away and made
again. Only ``ledger`` writes; everything else reads without the node. It never judges.
"""
