"""Dictionaries out to, and in from, the formats of other programs. One file a format, each with `write` and `read`."""
