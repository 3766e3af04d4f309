"""Whether a run fits into memory, what would, and how long it takes."""
