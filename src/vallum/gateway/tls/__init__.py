"""TLS as the gateway sees and speaks it: what a ClientHello says, ending TLS towards the guest, starting it outwards."""
