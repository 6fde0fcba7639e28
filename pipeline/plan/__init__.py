"""`plan`: memory per device, tokens/s and hours of a run, before anything is spent, and what fits."""

from pipeline.plan.command import run_plan
from pipeline.plan.estimate import Plan, PlanOptions, make_plan

__all__ = ["Plan", "PlanOptions", "make_plan", "run_plan"]
