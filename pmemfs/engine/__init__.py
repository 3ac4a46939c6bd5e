"""What looks after the pool of a mount while it is served, whatever the requests are: durability,
counts, where memory is, what is shared with a data plane, growing, and giving memory back.

It knows no request and no protocol, because `fuse` does that.
"""
