"""Where a ledger lives: one store a file."""
