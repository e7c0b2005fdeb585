"""EICAP: measure, improve and understand the emotional intelligence of open language models."""


class InputError(Exception):
    """Something the user gave is wrong. The message says where, what, and what to do; the command prints it."""
