"""Attention on one device. Every backend has one signature: (q, k, v, query tokens, key tokens) -> (out, lse)."""
