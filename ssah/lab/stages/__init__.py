"""What is computed of models, each a cached function of a lab."""
