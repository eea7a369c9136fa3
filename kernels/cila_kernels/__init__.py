"""InfoNCE and relation distillation over very large candidate sets, without the N x M similarities. Needs torch, and
triton for CUDA tensors.

from cila_kernels import info_nce_distill, info_nce_distill_loss
"""

from cila_kernels._rows import RowLosses
from cila_kernels.loss import ReducedLoss, info_nce_distill, info_nce_distill_loss
from cila_kernels.recipes import clip_distill_loss, co2l_loss, nt_xent_loss

__all__ = [
    "ReducedLoss",
    "RowLosses",
    "clip_distill_loss",
    "co2l_loss",
    "info_nce_distill",
    "info_nce_distill_loss",
    "nt_xent_loss",
]
