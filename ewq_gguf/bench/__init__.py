"""Measuring models: perplexity, KL divergence, questions, answers, speed and memory.

Every model is loaded in a child process. The tasks see it through `Scorer`, so that
they do not know which engine computes.
"""
