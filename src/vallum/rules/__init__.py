"""Security rules as data: load, check, explain, decide. Pure functions from facts to a Decision; no I/O but reading a rule file."""
