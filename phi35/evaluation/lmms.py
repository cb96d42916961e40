"""The model class that lmms-eval finds by the entry point ``phi35``."""

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from phi35.evaluation.visual_questions import LmmsModel


class Phi35(LmmsModel, lmms):
    """See ``LmmsModel``."""


def manifest() -> ModelManifest:
    """What lmms-eval reads from the entry point."""
    return ModelManifest(model_id="phi35", simple_class_path="phi35.evaluation.lmms.Phi35")
