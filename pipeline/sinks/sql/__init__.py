"""Publish to tables of SQL databases."""
