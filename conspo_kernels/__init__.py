"""ConSPO (arXiv:2605.12969), the group-contrastive loss for RL with verifiable rewards, as fused kernels."""

from .logprobs import sequence_scores, token_logprobs
from .loss import ConSPOOutput, conspo_loss, conspo_loss_from_scores
from .margin import CosineMargin
from .modules import ConSPOLoss
from .two_phase import conspo_scores

__version__ = "0.1.0"

__all__ = [
    "ConSPOLoss",
    "ConSPOOutput",
    "CosineMargin",
    "conspo_loss",
    "conspo_loss_from_scores",
    "conspo_scores",
    "sequence_scores",
    "token_logprobs",
]
