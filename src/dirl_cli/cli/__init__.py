"""From the words of a command line to a command that runs in its directory, in one process or many."""
