"""What cannot be trained privately, why, and the way out: seen in the model itself, before any example is read."""

from dptrainer.validation.checks import check, check_step, validate
from dptrainer.validation.problem import Problem
from dptrainer.validation.repair import Change, fix

__all__ = ["Change", "Problem", "check", "check_step", "fix", "validate"]
