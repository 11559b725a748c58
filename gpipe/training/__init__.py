"""Configuration, data, training loop and command line of `gpipe train` and `gpipe eval`."""
