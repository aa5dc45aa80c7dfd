"""The signed budget ledger: rules, signatures, stores."""
