"""Saves of a run: written by any number of processes, read by any other."""
