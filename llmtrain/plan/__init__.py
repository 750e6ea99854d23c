"""What a run will be, before anything starts: derived from its config, frozen, and explained."""

from llmtrain.plan.make import make_plan, packs, reads_teacher, setting_of
from llmtrain.plan.record import DTYPES, Plan

__all__ = ["DTYPES", "Plan", "make_plan", "packs", "reads_teacher", "setting_of"]
