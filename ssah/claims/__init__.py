"""The statements that measurements decide: ``claims.csv``, and the claims table."""
