"""What this machine has, what of it works, and what to do about the rest."""
