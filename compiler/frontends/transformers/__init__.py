"""Imports causal LMs of transformers: checkpoint folders and live models."""
