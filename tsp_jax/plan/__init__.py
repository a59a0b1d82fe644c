"""Which configuration to run: closed forms of a step's memory and time, what memory is free for it, and the search."""
