"""HTTP as the gateway speaks it: servers of both versions make exchanges, services answer them."""
