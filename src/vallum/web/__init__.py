"""Read-only views over a record for a browser. They never write to it, never judge, and trust nothing a guest named."""
