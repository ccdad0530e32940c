"""Studies of the library itself, and what writes pages from them; not in the wheel."""
