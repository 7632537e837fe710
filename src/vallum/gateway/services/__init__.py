"""Who answers an exchange: the granted server, the package cache, the model gateway, the node's tools."""
