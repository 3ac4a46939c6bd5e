"""Process lifetimes: parse, wire, run, stop. Nothing imports them."""
