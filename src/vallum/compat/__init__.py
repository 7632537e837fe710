"""Other people's interfaces, spoken over the client."""
