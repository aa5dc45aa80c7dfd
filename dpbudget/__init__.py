"""dpbudget."""
