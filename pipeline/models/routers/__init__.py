"""Routers: who takes part in a step of a recursion."""

from pipeline.models.routers.base import Router
from pipeline.models.routers.fixed import FixedRouter
from pipeline.models.routers.gate import Gate
from pipeline.models.routers.random_drop import RandomDrop

__all__ = ["FixedRouter", "Gate", "RandomDrop", "Router"]
