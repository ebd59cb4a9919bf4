"""NIO (Yang et al., NeurIPS 2022): learn one scale a tensor so that examples' gradients agree (GradCosine)."""

from papers.nio.algorithm import EXAMPLES_AT_ONCE as EXAMPLES_AT_ONCE
from papers.nio.algorithm import SUB_BATCHES_AT_ONCE as SUB_BATCHES_AT_ONCE
from papers.nio.algorithm import example_losses as example_losses
from papers.nio.algorithm import gradient_tensors as gradient_tensors
from papers.nio.algorithm import nio as nio
from papers.nio.batching import expected_cosine as expected_cosine
from papers.nio.batching import grad_cosine_floor as grad_cosine_floor
from papers.nio.batching import signal_of as signal_of
from papers.nio.batching import windows as windows
from papers.nio.diagnostics import grad_sign as grad_sign
from papers.nio.diagnostics import layer_cosines as layer_cosines
from papers.nio.diagnostics import optima as optima
from papers.nio.diagnostics import optima_bound as optima_bound
from papers.nio.diagnostics import optima_density as optima_density
from papers.nio.objective import cotangents as cotangents
from papers.nio.objective import grad_cosine as grad_cosine
from papers.nio.objective import grad_norm as grad_norm
from papers.nio.objective import grad_variance as grad_variance
from papers.nio.objective import measure as measure
from papers.nio.objective import objective_value as objective_value
from papers.nio.objective import scale_gradients as scale_gradients
