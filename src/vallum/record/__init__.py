"""What happened, kept: one append-only hash-chained ledger per run, an index that can be rebuilt from it, verification and views."""
