"""The functions that the contract asks for, by its names. Importing them imports Triton."""

from . import group_infonce, label_alignment, scale, sequence_score, token_logprob

align = label_alignment.align
token_logprob_forward = token_logprob.forward
token_logprob_backward = token_logprob.backward
token_logprob_forward_backward = token_logprob.forward_backward
sequence_score_forward = sequence_score.forward
sequence_score_backward = sequence_score.backward
token_coefficients = sequence_score.coefficients
masked_coefficients = sequence_score.masked
weighted_sum = sequence_score.weighted_sum
infonce = group_infonce.infonce
scale_ = scale.scale_
