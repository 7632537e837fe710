"""Turn what the kernel says into events. They state facts and never judge."""
