"""Evaluation: loss, perplexity and bits per byte of a checkpoint, whole and without its parts.

scoring     the loss of every token of a text, by a loaded network
perplexity  reads texts, loads a checkpoint, and computes the figures
ablation    the same with each part of the network switched off in turn
"""

from nanovllm.evaluation.ablation import AblatedLoss, AblationResult, ablate
from nanovllm.evaluation.perplexity import EvaluationResult, check_windows, evaluate

__all__ = [
    "AblatedLoss",
    "AblationResult",
    "EvaluationResult",
    "ablate",
    "check_windows",
    "evaluate",
]
