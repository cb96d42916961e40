"""Evaluation of models on data at hand."""
