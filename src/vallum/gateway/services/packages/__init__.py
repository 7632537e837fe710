"""``service = "packages"``: package indexes through a door that knows what a package is.

Covered: what was given to the guest is an event with name, version and digest, written before the last of its bytes
leaves; bytes that are not those that the index promised are refused; versions younger than the cell's minimum age
are left out of indexes, and their files refused; a cache on the host that only the gateway writes, by URL and digest.
Not covered: what a package does when it is installed or imported; that is the cell's to contain.
"""

from vallum.gateway.services.packages.service import make_service, use_cache

__all__ = ["make_service", "use_cache"]
