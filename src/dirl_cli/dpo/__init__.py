"""Preference optimisation: of two answers to a prompt, make the better one likelier than the reference does."""
