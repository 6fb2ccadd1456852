"""Where 0.21 had the token permutation; it lives in :mod:`natten.legacy.token_permute`."""

from .legacy.token_permute import token_permute_operation, token_unpermute_operation

__all__ = ["token_permute_operation", "token_unpermute_operation"]
