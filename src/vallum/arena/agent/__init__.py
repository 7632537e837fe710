"""The programs of the scripted agent, copied into wherever it works. Plain Python that any Debian runs; nothing imports them."""
