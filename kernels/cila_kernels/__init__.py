"""InfoNCE and relation distillation over very large candidate sets, without the N x M similarities. Needs torch.

from cila_kernels import info_nce_distill, info_nce_distill_loss
"""

from cila_kernels._rows import RowLosses
from cila_kernels.loss import ReducedLoss, info_nce_distill, info_nce_distill_loss

__all__ = ["ReducedLoss", "RowLosses", "info_nce_distill", "info_nce_distill_loss"]
