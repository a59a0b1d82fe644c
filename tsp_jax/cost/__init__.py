"""Closed forms of what a layout moves and holds, to be checked against compiled programs."""
