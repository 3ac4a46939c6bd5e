"""What keeps the pool of a mount while it is served, whatever the requests are: durability, counts,
where there is memory, what is shared with a data plane, growing, giving memory back.

Knows no request and no protocol; `fuse` has those.
"""
