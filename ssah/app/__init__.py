"""The front doors: command line, notebooks, reports and benchmarks."""
