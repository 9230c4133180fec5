"""Units of a transformer (paper, section 3.1): families, layouts, masks and roles."""
