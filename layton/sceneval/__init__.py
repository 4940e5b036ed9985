"""SceneEval: does a generated image show what its prompt says? Exact answers in the Scenes world."""

from __future__ import annotations

from layton.sceneval.checker import CheckResult, check, check_objects
from layton.sceneval.detection import FoundObject, find_objects
from layton.sceneval.prompts import make_prompts, read_prompts, spec_of_scene, write_prompts
from layton.sceneval.report import SceneEvalReport, TaskScore, run_sceneval, score_folder, summarise, verdict
from layton.sceneval.spec import Exclusion, PromptSpec, Requirement

__all__ = [
    "CheckResult",
    "Exclusion",
    "FoundObject",
    "PromptSpec",
    "Requirement",
    "SceneEvalReport",
    "TaskScore",
    "check",
    "check_objects",
    "find_objects",
    "make_prompts",
    "read_prompts",
    "run_sceneval",
    "score_folder",
    "spec_of_scene",
    "summarise",
    "verdict",
    "write_prompts",
]
