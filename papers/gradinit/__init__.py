"""GradInit (Zhu et al., NeurIPS 2021): learn one scale a tensor from the loss after a first step of training."""

from papers.gradinit.algorithm import gradinit as gradinit
from papers.gradinit.batching import batch_pairs as batch_pairs
from papers.gradinit.objective import constraint as constraint
from papers.gradinit.objective import gradient_norm as gradient_norm
from papers.gradinit.objective import look_ahead_loss as look_ahead_loss
from papers.gradinit.objective import scale_gradients as scale_gradients
from papers.gradinit.objective import step_direction as step_direction
from papers.gradinit.variance import relative_gradient_variance as relative_gradient_variance
