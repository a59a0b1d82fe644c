"""Whole models made of `tsp_jax.nn`."""
