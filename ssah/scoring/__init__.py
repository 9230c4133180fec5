"""Which units matter: attribution (eq. 1), gradient conflict, control selections."""
