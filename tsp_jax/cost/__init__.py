"""Closed forms of what a layout computes, moves and holds, to be checked against compiled programs."""
