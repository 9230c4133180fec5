"""The statements that the claims table decides, each with its limit and the paper's number."""

from .budget import BUDGET
from .claim import Claim
from .freezing import FREEZING
from .reasoning import REASONING
from .roles import ROLES

CLAIMS = (*REASONING, *ROLES, *FREEZING, *BUDGET)

__all__ = ["CLAIMS", "Claim"]
