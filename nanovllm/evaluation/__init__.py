"""Evaluation: loss, perplexity and bits per byte of a checkpoint.

scoring     the loss of every token of a text, by a loaded network
perplexity  reads texts, loads a checkpoint, and computes the figures
"""

from nanovllm.evaluation.perplexity import EvaluationResult, check_windows, evaluate

__all__ = ["EvaluationResult", "check_windows", "evaluate"]
