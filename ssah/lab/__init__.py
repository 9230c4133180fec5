"""The study's configuration, and its computations, each cached by content."""
