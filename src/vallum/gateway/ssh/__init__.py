"""SSH ended at the gateway: sessions are judged one by one, forwarding is never granted."""
