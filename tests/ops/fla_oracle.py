"""Somebody else's truth for the memory op: the token loop of fla-core's momentum delta rule, as it stands.

MDN (arXiv 2605.05838) writes the rule with other letters and signs, and the loop was written for that paper:

    w_t = p_t S_{t-1} - v_t;  M_t = mu_t M_{t-1} + eta_t k_t^T w_t;  S_t = alpha_t S_{t-1} - beta_t M_t;  o_t = q_t S_t

With p = k, beta = 1, alpha = 1 - our alpha, mu = our eta and eta = our theta, S is our memory and M minus our momentum.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.bench.peers import fla_file

needs_fla_core = pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="fla-core is not installed")


class _Wide:
    """torch, with float64 by the name of float32: the loop turns whatever it is given into float32."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _module(dtype: torch.dtype) -> ModuleType:
    module = fla_file("ops/momentum_delta_rule/naive.py")
    if dtype == torch.float64:
        module.torch = _Wide()
    return module


def momentum_loop(x: Sequence[Tensor]) -> list[Tensor]:
    """y, M, S of q, k, v, alpha, eta, theta, M, S, in float64 where q is, else in float32."""
    q, k, v, alpha, eta, theta, memory, momentum = x
    y, state = _module(q.dtype).recurrent_momentum_delta_rule_ref(
        q, k, v, log_alpha=torch.log1p(-alpha), log_mu=eta.log(), p=k, beta=torch.ones_like(theta), eta=theta,
        scale=1.0, initial_S=memory, initial_M=-momentum, output_final_state=True,
    )  # fmt: skip
    return [y, state[0], -state[1]]
