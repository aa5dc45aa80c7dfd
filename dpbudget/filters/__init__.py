"""What may still be spent: the arithmetic that a ledger asks before it admits a plan.

A ledger holds rules and no privacy arithmetic; it is given a filter. ``portfolio``: the plans of one portfolio are
fixed before any of them touches data and compose jointly; portfolios add up. ``renyi``: every step is chosen freely.
"""

from dpbudget.filters.ledger_filter import LedgerFilter
from dpbudget.filters.portfolio import PortfolioFilter
from dpbudget.filters.renyi import RDPFilter, Spent

__all__ = ["LedgerFilter", "PortfolioFilter", "RDPFilter", "Spent"]
