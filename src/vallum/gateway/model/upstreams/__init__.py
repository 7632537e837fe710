"""Where answers come from: a server, a script, or a record."""
