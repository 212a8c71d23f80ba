"""Measuring: products of single layers, and whole models."""
