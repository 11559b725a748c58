"""The parts of ``benchmarks.on_device``: what is looked at on an accelerator, each in a process of its own."""
